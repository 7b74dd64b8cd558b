# Measuring a GPU for the simulator, and telling how far the simulator then is from measurements.


# On the machine that has the GPU: here, or where the Slurm profile sends it. `--config hardware=` says which GPU it is.
rule measure_operators:
    output:
        "<results>/calibrated/{gpu}/{model}/meta.yaml",
    log:
        "<results>/calibrated/{gpu}/{model}.log",
    conda:
        "envs/fivefold.yaml"
    resources:
        gpu=1,
        gpu_model=calibration.gpu_model,
    params:
        commit=calibration.commit_name,
        folder=calibration.folder,
    shell:
        "python -m systems.common.calibrate --model {wildcards.model:q} --gpu {wildcards.gpu:q}"
        " --commit {params.commit:q} --out {params.folder:q} 2> >(tee {log:q} >&2)"


# What serving and tuning on one GPU do to each other, and tuning alone: into the same folder, corun.csv and tuning.csv beside this.
rule measure_corun:
    input:
        "<results>/calibrated/{gpu}/{model}/meta.yaml",
    output:
        "<results>/calibrated/{gpu}/{model}/corun.yaml",
    log:
        "<results>/calibrated/{gpu}/{model}.corun.log",
    conda:
        "envs/fivefold.yaml"
    resources:
        gpu=1,
        gpu_model=calibration.gpu_model,
    params:
        commit=calibration.commit_name,
        folder=calibration.folder,
    shell:
        "python -m systems.llmstation.calibrate --model {wildcards.model:q} --gpu {wildcards.gpu:q}"
        " --commit {params.commit:q} --out {params.folder:q} 2> >(tee {log:q} >&2)"


# Where `hardware` names several GPUs: what two of them take to add up, by size. Last, lest two measurements share a GPU.
rule measure_all_reduce:
    input:
        f"<results>/calibrated/{{gpu}}/{calibration.MODEL}/corun.yaml",
    output:
        "<results>/calibrated/{gpu}/all_reduce.csv",
    log:
        "<results>/calibrated/{gpu}/all_reduce.log",
    conda:
        "envs/fivefold.yaml"
    resources:
        gpu=2,
        gpu_model=calibration.gpu_model,
    shell:
        "python -m systems.common.calibrate.all_reduce --gpus 2 --out {output:q} 2> >(tee {log:q} >&2)"


rule calibrate:
    input:
        calibration.calibrations(PROJECT.config, targets.refuse),
    localrule: True


rule compare_with_measured:
    input:
        calibration.measured_runs,
    output:
        "<results>/fidelity/{gpu}/{model}/table.csv",
    log:
        "<results>/fidelity/{gpu}/{model}/table.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        options=calibration.fidelity_options,
        code=calibration.simulator_version,
    shell:
        "python -m systems.common.fidelity_table --model {wildcards.model:q} --hardware {wildcards.gpu:q}"
        " {params.options:q} --out {output:q} 2> >(tee {log:q} >&2)"


rule draw_fidelity:
    input:
        "<results>/fidelity/{gpu}/{model}/table.csv",
    output:
        "<results>/fidelity/{gpu}/{model}/fidelity.pdf",
    log:
        "<results>/fidelity/{gpu}/{model}/draw.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        code=PROJECT.draw_code,
    shell:
        "exec $FIVEFOLD_HERE python -m harness.fidelity --gpu {wildcards.gpu:q} --table {input:q} --out {output:q} --log {log:q}"


# The same for runs in which tuning shared the GPU.
rule compare_colocated:
    input:
        calibration.colocated_runs,
    output:
        "<results>/fidelity/{gpu}/{model}/colocation.csv",
    log:
        "<results>/fidelity/{gpu}/{model}/colocation.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        code=calibration.colocation_version,
    shell:
        "python -m systems.llmstation.colocation_fidelity compare --model {wildcards.model:q}"
        " --hardware {wildcards.gpu:q}x1 --measured reference/{wildcards.gpu:q}/colocation/{wildcards.model:q}"
        " --out {output:q} 2> >(tee {log:q} >&2)"


rule draw_colocated:
    input:
        "<results>/fidelity/{gpu}/{model}/colocation.csv",
    output:
        "<results>/fidelity/{gpu}/{model}/colocation.pdf",
    log:
        "<results>/fidelity/{gpu}/{model}/draw_colocation.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        code=PROJECT.draw_code,
    shell:
        "exec $FIVEFOLD_HERE python -m harness.fidelity --colocated --gpu {wildcards.gpu:q} --table {input:q} --out {output:q}"
        " --log {log:q}"


# Every GPU and model that has recorded runs, on any machine.
rule fidelity:
    input:
        calibration.fidelity(PROJECT.config),
    localrule: True
