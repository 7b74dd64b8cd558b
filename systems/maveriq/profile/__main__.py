"""Measure a model's fingerprints with our engine, for `estimate`, `decide` and the controller.

    python -m systems.maveriq.profile --model llama-2-7b --out llama-2-7b.csv                       # the paper's grid, on GPUs
    python -m systems.maveriq.profile --model llama-2-7b --out whole.csv --whole --layouts 1x1,2x1  # the truth, to compare
    python -m systems.maveriq.profile --model llama-2-7b --out maps.csv --maps "20 12,24 8"         # uneven pipelines
    python -m systems.maveriq.profile --model tiny --device cpu --out tiny.csv                      # no GPU: the procedure only

FILE.csv has the authors' columns and a few of ours; FILE.provenance.json beside it says where they come from and what failed.
Layouts are TPxPP; those that need more GPUs than there are are left out and counted. Exit status: 0; 1 where some points failed
(the others are there); 2 for bad input, one line on stderr.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from systems.common.errors import InputError
from systems.common.models import ModelShape, model
from systems.maveriq.fingerprint import PAPER_GRID, Layout
from systems.maveriq.profile import jobs as plan
from systems.maveriq.profile import tables
from systems.maveriq.profile.jobs import Job
from systems.maveriq.profile.run import JOB_S, profile

_FEW, _DEEP = "left out: they need more GPUs than there are", "left out: they need more layers than the model has"
_LATE = "left out: the budget was spent"
SMALL = 10**8
"""Parameters of what `--device auto` is ready to run on a CPU."""


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> Any:  # noqa: ANN401
        raise InputError("command line", "options", message, "see --help")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = _OneLine(prog="python -m systems.maveriq.profile", description="Measure fingerprints of a model.")
    add = made.add_argument
    add("--model", required=True, help="a model shape, such as llama-2-7b")
    add("--out", type=Path, required=True, help="CSV file to write; one that is there is replaced")
    add("--layouts", default="1x1,1x2,2x1", help="TPxPP, several with commas (default: %(default)s, the paper's)")
    add(
        "--dtypes",
        default=",".join(plan.DTYPES),
        help="weight precisions, with +kv8 for int8 keys and values (default: %(default)s)",
    )
    add("--batches", default=",".join(map(str, PAPER_GRID.batches)), help="requests at once (default: %(default)s)")
    add("--output-lengths", default=",".join(map(str, PAPER_GRID.output_lengths)), help="output tokens (default: %(default)s)")
    add("--extra-layers", default="0,1", help="layers beyond one per stage (default: %(default)s)")
    add("--whole", action="store_true", help="the whole model instead of fingerprints")
    add("--maps", help='layers per stage of the whole model on TP 1, several with commas: "20 12,24 8"')
    add("--prompt-tokens", type=int, default=plan.PROMPT_TOKENS, help="prompt length (default: %(default)s)")
    add(
        "--compute", choices=plan.COMPUTE, help="number format of activations and 16-bit weights (default: bf16; fp32 on a CPU)"
    )
    add("--clock", choices=plan.CLOCKS, help="which latency counts (default: launched; served for whole models)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: GPUs, or a CPU for a small shape")
    add("--warmups", type=int, default=2, help="untimed requests per point (default: %(default)s)")
    add("--repeats", type=int, default=20, help="timed requests per point, of which the median counts (default: %(default)s)")
    add("--budget-s", type=float, default=float("inf"), help="begin nothing after so many seconds")
    add("--job-s", type=float, default=JOB_S, help="limit of one engine's measurements (default: %(default)s)")
    add("--commit", default="", help="of this code, where there is no git to ask")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    try:
        options = parser().parse_args(arguments)
        shape = model(options.model, "--model")
        device, gpus = _device(options.device, shape)
        asked = _jobs(options, device)
        wanted = [job for job in asked if job.table != "fingerprints" or job.layers <= shape.layers]
        if not wanted:
            raise InputError("profile", "jobs", "none", "give at least one layout, precision, batch and output length")
        for job in wanted:
            job.check()
        if not (options.budget_s > 0 and options.job_s > 0 and options.warmups >= 0):
            raise InputError("profile", "limits", [options.budget_s, options.job_s], "give seconds above 0")
        fitting = [job for job in wanted if device == "cpu" or job.gpus <= gpus]
        if not fitting:
            raise InputError("profile", "--layouts", options.layouts, f"all need more than the {gpus} GPUs here")
        return _run(options, fitting, {_FEW: len(wanted) - len(fitting), _DEEP: len(asked) - len(wanted)})
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, fitting: Sequence[Job], left_out: Mapping[str, int]) -> int:
    files = dict.fromkeys(plan.TABLES, options.out)
    beside = options.out.with_suffix(".provenance.json")
    if not options.out.parent.is_dir():
        raise InputError(options.out, "--out", str(options.out.parent), "no such folder: make it, or choose another")
    done = profile(fitting, files, beside, budget_s=options.budget_s, job_s=options.job_s, commit=options.commit, say=_say)
    rows = [row for one in done for row in tables.rows_of(one)]
    counts = {**left_out, _LATE: len(fitting) - len(done), "failed": sum(bool(one.error) for one in done)}
    for what, count in counts.items():
        if count:
            _say(f"{count} of {len(fitting) + sum(left_out.values())} engines {what}")
    if bound := tables.host_bound(rows):
        _say(f"{bound} of {len(rows)} points were bound by the host, not by the GPU: their depth says little")
    if not rows:
        raise InputError(options.out, "rows", "none", f"nothing could be measured: {done[0].error or 'see above'}")
    print(options.out)
    return int(any(one.error for one in done) or len(done) < len(fitting))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _jobs(options: argparse.Namespace, device: str) -> list[Job]:
    base = Job(
        options.model, 1, (1,), output_lengths=_numbers("--output-lengths", options.output_lengths),
        prompt_tokens=options.prompt_tokens, compute=options.compute or ("fp32" if device == "cpu" else "bf16"), device=device,
        warmups=options.warmups, repeats=options.repeats,
    )  # fmt: skip
    batches = _numbers("--batches", options.batches)
    dtypes = [part.strip() for part in options.dtypes.split(",") if part.strip()]
    layouts = [_layout(part) for part in options.layouts.split(",") if part.strip()]
    if options.maps:
        maps = [_numbers("--maps", part, " ") for part in options.maps.split(",")]
        found = [job for dtype in dtypes for job in plan.map_jobs(replace(base, dtype=dtype), maps, batches)]
    elif options.whole:
        found = plan.whole_jobs(base, layouts, dtypes, batches)
    else:
        found = plan.fingerprint_jobs(base, layouts, dtypes, batches, _numbers("--extra-layers", options.extra_layers, least=0))
    return [Job.from_json({**job.to_json(), "clock": options.clock}) for job in found] if options.clock else found


def _numbers(option: str, text: str, by: str = ",", least: int = 1) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(by) if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) >= least for part in parts):
        raise InputError("profile", option, text, f"write whole numbers of at least {least}")
    return tuple(dict.fromkeys(map(int, parts))) if by == "," else tuple(map(int, parts))


def _layout(text: str) -> Layout:
    tp, _, pp = text.strip().lower().partition("x")
    if not (tp.isdecimal() and pp.isdecimal() and int(tp) and int(pp)):
        raise InputError("profile", "--layouts", text, "write TPxPP, such as 2x1")
    return int(tp), int(pp)


def _device(asked: str, shape: ModelShape) -> tuple[str, int]:
    """Where to measure, and the GPUs there. Raises InputError where there is none and the model is no small one."""
    gpus = 0 if asked == "cpu" else _gpus()
    if gpus:
        return "cuda", gpus
    if asked == "cuda" or (asked == "auto" and shape.parameters > SMALL):
        raise InputError("profile", "--device", asked, "PyTorch sees no GPU here: use one, or --device cpu with a small shape")
    return "cpu", 0


def _gpus() -> int:
    """How many GPUs torch sees, asked in another process: this one must hold no GPU memory."""
    code = "import torch; print(torch.cuda.device_count())"
    try:
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
        return int(told.split()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
