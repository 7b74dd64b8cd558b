# Machines: what they have and what they lack.


# No output: a machine is looked at whenever it is asked for.
rule doctor:
    log:
        "<results>/doctor.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        inventory=PROJECT.inventory,
    shell:
        "exec python -m harness.doctor --inventory {params.inventory:q} --log {log:q}"
