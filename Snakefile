# Fivefold: `snakemake fig8a` makes every system's figure of that name, `snakemake llmstation_fig8a` one,
# `snakemake llmstation` all of a system, `snakemake all` everything, `snakemake claims` the table of verdicts.

from snakemake.utils import min_version

min_version("9.14")

from harness import calibration, retries, runlock, streams, targets
from harness.warm import start

PROJECT = targets.load(config)
start.keep(workflow, PROJECT.config.backend)
runlock.guard(workflow)
streams.outlive_readers(logger)
retries.only_where_they_may_help()
targets.use_this_python()
targets.use_inventory(PROJECT.config)


pathvars:
    run=PROJECT.run,
    results=PROJECT.config.results,


wildcard_constraints:
    system="[a-z][a-z0-9_]*",
    figure="[A-Za-z][A-Za-z0-9_]*",
    series="[A-Za-z][A-Za-z0-9_]*",
    dataset="[A-Za-z0-9_.-]+",
    gpu="[a-z0-9-]+",
    model="[a-z0-9.-]+",


include: "workflows/figures.smk"
include: "workflows/provision.smk"
include: "workflows/containers.smk"
include: "workflows/calibrate.smk"


rule all:
    default_target: True
    input:
        PROJECT.products(PROJECT.figures),
    localrule: True


for _figure in PROJECT.figures:

    rule:
        name:
            _figure.target
        input:
            PROJECT.wanted(_figure),
        localrule: True


for _name, _figures in PROJECT.groups.items():

    rule:
        name:
            _name
        input:
            PROJECT.wanted(*_figures),
        localrule: True
