# Container images: built where they can be, from containers/images.yaml and what containers/site.yaml says of this site.


# No output: the images are the engine's, and it is asked whenever the target is.
rule containers:
    log:
        "<results>/containers/containers.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        results=PROJECT.results,
    shell:
        "exec python -m harness.containers build --logs {params.results:q}/containers --log {log:q}"
