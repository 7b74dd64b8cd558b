"""MaverIQ on H200s: fingerprints, whole models, uneven pipelines, and the estimators' error. One script for 1, 2 and 4 GPUs.

    python benchmarks/maveriq_gpu.py --out DIR                                         # one GPU
    python benchmarks/maveriq_gpu.py --out DIR --with reference/h200/maveriq/profile_1 # two, four: with what smaller ones gave
    python benchmarks/maveriq_gpu.py --out DIR --skip EARLIER                          # what a run before has left out

What is measured follows from the GPUs present; `--dry-run` lists it. After each engine DIR holds `fingerprints.csv`,
`whole.csv`, `uneven.csv`, `scaling.csv` (columns of `python -m systems.maveriq.profile`) and `provenance.json`; at the end
`errors.csv`, `errors.md` and `summary.json`: estimators against the whole models, uneven maps against even ones, int8 and int4
against 16 bit. An engine that fails is named in `provenance.json` and the rest goes on; so is what the budget leaves out.

* one GPU: fingerprints on (1,1); whole models at batch 1 and 8, Llama-2-7B also at 2 and 32, and at 1 to 32 layers.
* two: fingerprints on (1,2), (2,1), without `--with` also (1,1); whole models; Llama-2-7B over [20, 12], [24, 8], [28, 4].
* four: fingerprints on (4,1); whole models on (4,1), (1,4), (2,2), (1,3); Llama-2-7B over uneven maps of four stages.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from systems.common.errors import InputError  # noqa: E402
from systems.common.models import model  # noqa: E402
from systems.maveriq.fingerprint import Fingerprints, Layout, read_fingerprints  # noqa: E402
from systems.maveriq.profile import judge, tables  # noqa: E402
from systems.maveriq.profile.crew import Done  # noqa: E402
from systems.maveriq.profile.jobs import DTYPES, INT8_KV, TABLES, Job, even_map, fingerprint_jobs, map_jobs, whole_jobs  # noqa: E402
from systems.maveriq.profile.run import profile  # noqa: E402

LENGTHS = (10, 20, 100)
WHOLE_REPEATS, WHOLE_WARMUPS = 3, 1
"""A whole request takes half a second or more and varies little."""


def jobs(gpus: int, models: Sequence[str], base: Job, with_one: bool = False) -> list[Job]:
    """What to measure on `gpus` GPUs, most important first; `with_one`: fingerprints of one GPU are there already."""
    prints = replace(base, output_lengths=(10, 20))
    whole = replace(base, output_lengths=LENGTHS, repeats=WHOLE_REPEATS, warmups=WHOLE_WARMUPS)
    each = [(replace(prints, model=name), replace(whole, model=name)) for name in models]
    if gpus == 1:
        found = [job for p, _ in each for job in fingerprint_jobs(p, [(1, 1)], DTYPES)]
        found += [job for _, w in each for job in whole_jobs(w, [(1, 1)], DTYPES)]
        first_prints, first_whole = each[0]
        found += fingerprint_jobs(first_prints, [(1, 1)], DTYPES, batches=(2,))
        found += _depths(first_whole)
        found += whole_jobs(replace(first_whole, output_lengths=LENGTHS[1:]), [(1, 1)], DTYPES, batches=(8, 2, 32))
        found += [job for _, w in each[1:] for job in whole_jobs(w, [(1, 1)], DTYPES, batches=(8,))]
        found += fingerprint_jobs(first_prints, [(1, 1)], [f"int4{INT8_KV}"])
        return found + whole_jobs(
            replace(first_whole, output_lengths=LENGTHS[1:]), [(1, 1)], [f"int4{INT8_KV}"], batches=(1, 32)
        )
    if gpus < 4:
        return _two(each, _uneven(models[0], 2), with_one)
    found = [job for p, _ in each for job in fingerprint_jobs(p, [(4, 1)], ("float16",), extra_layers=(0,))]
    found += [job for _, w in each for job in whole_jobs(w, [(4, 1), (1, 4), (2, 2)], ("float16",))]
    found += map_jobs(replace(whole, model=models[0]), _uneven(models[0], 4))
    found += [job for _, w in each for job in whole_jobs(w, [(4, 1), (2, 2), (1, 4)], DTYPES[1:])]
    found += [job for p, _ in each for job in fingerprint_jobs(p, [(1, 4), (2, 2)], ("float16",))]
    return found + [job for _, w in each for job in whole_jobs(w, [(1, 3)], ("float16",))]


def _two(each: Sequence[tuple[Job, Job]], maps: Sequence[tuple[int, ...]], with_one: bool) -> list[Job]:
    """Two GPUs: engines take nine seconds there, so the first 250 s hold all of 16 bit and the first model's int8 and int4."""
    layouts: list[Layout] = [(2, 1), (1, 2)]
    each = [(p, replace(w, output_lengths=LENGTHS[1:])) for p, w in each]
    (first_prints, first_whole), others = each[0], each[1:]

    def of(pair: tuple[Job, Job], dtypes: Sequence[str]) -> list[Job]:
        return fingerprint_jobs(pair[0], layouts, dtypes) + whole_jobs(pair[1], layouts, dtypes)

    found = of(each[0], DTYPES[:1]) + map_jobs(first_whole, maps)
    found += [job for pair in others for job in of(pair, DTYPES[:1])]
    found += map_jobs(first_whole, maps[::2][:2], batches=(8,))
    found += [job for dtype in DTYPES[:0:-1] for job in of(each[0], (dtype,))]  # int4 first: it differs most
    found += whole_jobs(first_whole, layouts, DTYPES[:1], batches=(8, 32))
    found += fingerprint_jobs(first_prints, layouts, DTYPES[:1], batches=(2,))
    found += [job for pair in others for job in of(pair, DTYPES[1:])]
    return found if with_one else [job for p, _ in each for job in fingerprint_jobs(p, [(1, 1)], DTYPES[:1])] + found


def _depths(base: Job) -> list[Job]:
    """The model at some depths, timed as fingerprints are: are latency and memory straight in depth?"""
    layers = model(base.model).layers
    return [replace(base, pp_map=(n,), clock="launched", table="scaling") for n in (1, 2, 4, 8, 16, layers) if n <= layers]


def _uneven(name: str, stages: int) -> list[tuple[int, ...]]:
    """Maps of `stages` stages: even (the yardstick of the same run), then quarters of the last stage moved to the first."""
    even = even_map(model(name).layers, stages)
    steps = [even[-1] * quarters // 4 for quarters in range(4)]
    return list(dict.fromkeys((even[0] + step, *even[1:-1], even[-1] - step) for step in steps))


def sums_up(out: Path, others: Sequence[Path], prompt_tokens: int) -> dict[str, Any]:
    """What the tables say; each part by itself, its error in its place."""
    parts: dict[str, Callable[[], Any]] = {
        "errors": lambda: _errors(out, others, prompt_tokens), "uneven": lambda: _maps(out), "gains": lambda: _gains(out),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, work in parts.items():
        try:
            found[name] = work()
        except (InputError, OSError, ValueError, KeyError, ZeroDivisionError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return found


def _files(name: str, folders: Sequence[Path]) -> list[Path]:
    return [folder / name for folder in folders if (folder / name).is_file()]


def _errors(out: Path, others: Sequence[Path], prompt_tokens: int) -> dict[str, Any]:
    prints = judge.together(_files("fingerprints.csv", [out, *others]))
    found, silent = judge.judge(prints, judge.together([out / "whole.csv"]), prompt_tokens)
    if not found:
        raise InputError(out, "whole.csv", len(silent), silent[0] if silent else "no whole model that was fingerprinted too")
    rows = judge.summary(found)
    tables.put(out / "errors.csv", judge.as_csv(found))
    tables.put(out / "errors.md", judge.shown(rows) + "\n")
    print(judge.shown(rows), flush=True)
    return {"summary": rows, "silent": silent, "fingerprints": prints.source}


def _maps(out: Path) -> list[dict[str, Any]]:
    """Latency of each uneven map over that of the even one."""
    rows = tables.read(out / "uneven.csv")
    key = ("Model", "TP", "DTYPE", "Batch_Size", "Output_Lenght")
    even = {tuple(row[k] for k in key): row for row in rows if _spread(row) <= 1}
    return [
        {**{k: row[k] for k in (*key, "PP_Map", "Latency")}, "over_even": float(row["Latency"]) / float(base["Latency"])}
        for row in rows
        if (base := even.get(tuple(row[k] for k in key))) is not None
    ]


def _spread(row: dict[str, str]) -> int:
    layers = [int(part) for part in row["PP_Map"].split()]
    return max(layers) - min(layers)


def _gains(out: Path) -> list[dict[str, Any]]:
    """How many times faster than 16 bit, and how much less memory, by layout, batch and output length."""
    whole: Fingerprints = read_fingerprints(out / "whole.csv")
    dense = {replace(s, dtype=""): p for s, p in whole.points.items() if s.dtype == "float16" and not s.int8_kv}
    return [
        {
            "model": s.model, "tp": s.tp, "pp": s.pp, "dtype": s.dtype, "int8_kv": s.int8_kv, "batch": s.batch,
            "output_length": s.output_length, "faster": base.latency_s / p.latency_s,
            "memory_share": p.memory_gib / base.memory_gib,
        }
        for s, p in whole.points.items()
        if (base := dense.get(replace(s, dtype="", int8_kv=False))) is not None and base is not p
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, sum up; 0, or 1 where nothing could be measured, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--with", dest="others", type=Path, nargs="*", default=[], help="folders whose fingerprints count too")
    parser.add_argument("--skip", type=Path, nargs="*", default=[], help="folders of runs whose points are not measured again")
    parser.add_argument("--gpus", type=int, help="how many GPUs (default: those that torch sees)")
    parser.add_argument("--models", default="llama-2-7b,llama-2-13b", help="default: %(default)s")
    parser.add_argument(
        "--budget", type=float, default=285.0, help="begin nothing after so many seconds (default: %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=923, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="timed requests per fingerprint (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the procedure only, with --models tiny")
    parser.add_argument("--commit", default="", help="of this code, where there is no git to ask")
    parser.add_argument("--dry-run", action="store_true", help="list what would be measured")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """The command. Raises InputError for bad input."""
    names = [name.strip() for name in options.models.split(",") if name.strip()]
    gpus = options.gpus or (_gpus() if options.device == "cuda" else 1)
    if gpus < 1:
        raise InputError("maveriq_gpu", "--gpus", gpus, "torch sees no GPU here: run it where there is one, or --device cpu")
    compute = "bf16" if options.device == "cuda" else "fp32"
    base = Job(
        names[0], 1, (1,), device=options.device, compute=compute, prompt_tokens=options.prompt_tokens, repeats=options.repeats
    )
    before = {point for folder in options.skip for point in _there(folder)}
    wanted = [
        job
        for job in jobs(gpus, names, base, bool(_files("fingerprints.csv", options.others)))
        if job.layers <= model(job.model).layers and not _points(job) <= before
    ]
    for job in wanted:
        job.check()
    if options.dry_run:
        print("\n".join(f"{job.table}: {job.name}, {list(job.output_lengths)} tokens" for job in wanted))
        return 0
    began = time.monotonic()
    files = {table: options.out / f"{table}.csv" for table in TABLES}
    done: list[Done] = profile(
        wanted, files, options.out / "provenance.json", budget_s=options.budget, commit=options.commit,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    rows = [row for one in done for row in tables.rows_of(one)]
    told = {"gpus": gpus, "seconds": time.monotonic() - began, "engines": len(done), "of": len(wanted), "points": len(rows)}
    told |= {
        "host_bound": tables.host_bound(rows),
        **sums_up(options.out, [*options.others, *options.skip], options.prompt_tokens),
    }
    tables.put(options.out / "summary.json", json.dumps(told, indent=1) + "\n")
    print(f"{told['engines']} of {told['of']} engines, {told['points']} points in {told['seconds']:.0f} s", flush=True)
    return 0 if rows else 1


def _points(job: Job) -> set[tuple[str, ...]]:
    """What a job would measure, as `_there` calls it."""
    words = (job.table, job.model, str(job.tp), " ".join(map(str, job.pp_map)), job.weights, str(job.int8_kv), str(job.batch))
    return {(*words, str(length)) for length in job.output_lengths}


def _there(folder: Path) -> set[tuple[str, ...]]:
    """The points in the tables of a run. Raises InputError where there are none."""
    keys = ("Model", "TP", "PP_Map", "DTYPE", "INT8_KV_Cache", "Batch_Size", "Output_Lenght")
    found = {
        (table, *(row[key] for key in keys))
        for table in TABLES
        for file in _files(f"{table}.csv", [folder])
        for row in tables.read(file)
    }
    if not found:
        raise InputError("maveriq_gpu", "--skip", str(folder), f"holds none of {', '.join(f'{t}.csv' for t in TABLES)}")
    return found


def _gpus() -> int:
    from systems.maveriq.profile.__main__ import _gpus as seen

    return seen()


if __name__ == "__main__":
    sys.exit(main())
