"""Makes hosts ready for experiments, and unmakes them: `snakemake provision`, `snakemake deprovision`.

Steps, in order: reach, facts, sync, environment (or image), smoke, ready. What a step depends on is its key; a step whose key
is what the host's state says is passed over, and what it made is looked at again each time (by SHA-256). So a second
run changes nothing, and one that was cut off goes on where it was. `docs/hosts.md` explains what ends up where.
"""
