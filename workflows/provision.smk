# Machines: what they have and lack, making them ready, and unmaking that. No rule here has an output: machines change
# without asking, so they are looked at whenever a target is asked for; what is done already is found done.


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


# Shows what is pinned and what hosts show; pinning a key takes the command that it prints.
rule trust:
    log:
        "<results>/trust.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        inventory=PROJECT.inventory,
    shell:
        "exec python -m harness.remote.trust {params.inventory:q} --log {log:q}"


rule provision:
    log:
        "<results>/provision.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        inventory=PROJECT.inventory,
        results=PROJECT.results,
        datasets=PROJECT.dataset_options,
    shell:
        "exec python -m harness.provision --inventory {params.inventory:q} --results {params.results:q}"
        " {params.datasets:q} --log {log:q}"


rule deprovision:
    log:
        "<results>/deprovision.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        inventory=PROJECT.inventory,
        results=PROJECT.results,
    shell:
        "exec python -m harness.provision --inventory {params.inventory:q} --results {params.results:q}"
        " --remove --log {log:q}"
