# A figure: manifests of its datasets -> a parquet file per series -> table.csv -> PDFs and verdicts.


rule find_dataset:
    output:
        "<results>/datasets/{dataset}.json",
    log:
        "<results>/datasets/{dataset}.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        options=PROJECT.dataset_options,
        state=PROJECT.dataset_state,
    shell:
        "python -m harness.datasets {wildcards.dataset:q} {params.options:q} --out {output:q} 2> >(tee {log:q} >&2)"


# Only on other hardware than the paper's: by how much faster or slower it is.
rule find_factors:
    input:
        figure="figures/{system}/{figure}.yaml",
        datasets=PROJECT.manifests,
    output:
        "<run>/{system}/{figure}/rescale.json",
    log:
        "<run>/{system}/{figure}/logs/rescale.log",
    group:
        PROJECT.group
    conda:
        "envs/fivefold.yaml"
    resources:
        gpu=PROJECT.gpu,
        gpu_model=PROJECT.gpu_model,
    params:
        results=PROJECT.results,
        config=PROJECT.series_config,
        code=PROJECT.series_code,
    shell:
        "exec $FIVEFOLD_DISPATCH python -m harness.rescale --figure {input.figure:q} --results {params.results:q}"
        " --config-json {params.config:q} --datasets {input.datasets:q} --out {output:q} --log {log:q}"


rule run_series:
    input:
        figure="figures/{system}/{figure}.yaml",
        datasets=PROJECT.manifests,
        rescale=PROJECT.rescale,
    output:
        "<run>/{system}/{figure}/series/{series}.parquet",
    log:
        "<run>/{system}/{figure}/logs/{series}.log",
    group:
        PROJECT.group
    conda:
        "envs/fivefold.yaml"
    resources:
        gpu=PROJECT.gpu,
        gpu_model=PROJECT.gpu_model,
    params:
        results=PROJECT.results,
        config=PROJECT.series_config,
        code=PROJECT.series_code,
    shell:
        "exec $FIVEFOLD_DISPATCH python -m harness.series --figure {input.figure:q} --series {wildcards.series:q}"
        " --results {params.results:q} --config-json {params.config:q} --datasets {input.datasets:q}"
        " --rescale {input.rescale:q} --out {output:q} --log {log:q}"


rule write_table:
    input:
        figure="figures/{system}/{figure}.yaml",
        series=PROJECT.series,
    output:
        "<run>/{system}/{figure}/table.csv",
    log:
        "<run>/{system}/{figure}/logs/table.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        code=PROJECT.table_code,
    shell:
        "exec $FIVEFOLD_HERE python -m harness.table --figure {input.figure:q} --series {input.series:q}"
        " --out {output:q} --log {log:q}"


rule draw_figure:
    input:
        figure="figures/{system}/{figure}.yaml",
        table="<run>/{system}/{figure}/table.csv",
        series=PROJECT.series,
        rescale=PROJECT.rescale,
    output:
        "<run>/{system}/{figure}/{figure}.pdf",
    log:
        "<run>/{system}/{figure}/logs/draw.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        code=PROJECT.draw_code,
    shell:
        "exec $FIVEFOLD_HERE python -m harness.draw figure --figure {input.figure:q} --table {input.table:q}"
        " --series {input.series:q} --rescale {input.rescale:q} --out {output:q} --log {log:q}"


rule draw_search:
    input:
        figure="figures/{system}/{figure}.yaml",
        table="<run>/{system}/{figure}/table.csv",
        series=PROJECT.series,
        rescale=PROJECT.rescale,
    output:
        "<run>/{system}/{figure}/search.pdf",
    log:
        "<run>/{system}/{figure}/logs/draw_search.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        code=PROJECT.draw_code,
    shell:
        "exec $FIVEFOLD_HERE python -m harness.draw search --figure {input.figure:q} --table {input.table:q}"
        " --series {input.series:q} --rescale {input.rescale:q} --out {output:q} --log {log:q}"


rule judge_claims:
    input:
        figure="figures/{system}/{figure}.yaml",
        table="<run>/{system}/{figure}/table.csv",
        series=PROJECT.series,
    output:
        "<run>/{system}/{figure}/claims.json",
    log:
        "<run>/{system}/{figure}/logs/claims.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    params:
        code=PROJECT.claims_code,
    shell:
        "exec $FIVEFOLD_HERE python -m harness.verdicts --figure {input.figure:q} --table {input.table:q}"
        " --series {input.series:q} --out {output:q} --log {log:q}"


# No output: the table is printed whenever it is asked for.
rule claims:
    input:
        PROJECT.claims(),
    log:
        "<run>/claims.log",
    localrule: True
    conda:
        "envs/fivefold.yaml"
    shell:
        "exec $FIVEFOLD_HERE python -m harness.claims {input:q} --docs docs --log {log:q}"
