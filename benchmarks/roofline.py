"""How far the roofline is from every published table, per operator.

    python benchmarks/roofline.py [--mirror DIR] [--out FILE]

Tables in Markdown, then one JSON object on the last line. `datasheet` is the plain roofline at the datasheet's peaks.
`fitted` has efficiencies of that GPU; each point is predicted by a fit that has not seen it (five folds). The second table
holds what no fit ever sees: mixed batches and the sampler. The third sums the token-wise operators of a layer. The last
predicts one GPU's table with another GPU's efficiencies. Errors are predicted / measured - 1; percentiles weigh every octave
of sizes the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from math import inf
from pathlib import Path

from harness.atomic import write_atomically
from harness.provenance import environment
from systems.common.errors import InputError
from systems.common.hardware import Chunk, RooflineCosts, costs, gpu
from systems.common.hardware.efficiencies import default_efficiencies
from systems.common.hardware.fit import (
    KNEE,
    Summary,
    fit,
    held_out_errors,
    relative_errors,
    start_of,
    summary,
)
from systems.common.hardware.measured_sets import MeasuredSet, measured_sets
from systems.common.hardware.observations import VIDUR_GEMMS, Observation
from systems.common.hardware.tables import read_kernel_tables
from systems.common.models import model

GEMMS = (*VIDUR_GEMMS.values(), "lm_head")
LAYERS = (
    ("rtx4090", "llama-3.1-8b", "rtx4090_llama31_8b", (1,), 2048),
    ("a100-80", "llama-3.1-8b", "vidur_profiles/a100_Meta-Llama-3-8B_mlp.csv", (1, 2, 4, 8), 8192),
    ("h100", "llama-2-7b", "vidur_profiles/h100_Llama-2-7b_mlp.csv", (1, 2, 4, 8), 4096),
)
CROSS = ("rtx4090", "a100-80", "h100")  # GPUs with a table of single operators


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and write if asked."""
    parser = argparse.ArgumentParser(description="How far the roofline is from every published table.")
    parser.add_argument("--mirror", type=Path, default=Path("../shared/data"), help="folder of the data files")
    parser.add_argument("--out", type=Path, help="also write the JSON object, with provenance, to this file")
    options = parser.parse_args(arguments)
    try:
        sets = {measured.gpu: measured for measured in measured_sets(options.mirror)}
        result = {
            "fitted": {name: per_operator(measured) for name, measured in sets.items()},
            "never_fitted": never_fitted(options.mirror),
            "layers": layers(options.mirror),
            "cross": cross([sets[name] for name in CROSS]),
        }
        if options.out:
            write_atomically(
                options.out, json.dumps({"result": result, "provenance": environment()}, indent=1, default=str) + "\n"
            )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    show(result)
    print(json.dumps(result))
    return 0


def per_operator(measured: MeasuredSet) -> dict[str, dict]:
    """By operator: errors of the bare datasheet, and of fits that have not seen the point."""
    bare = relative_errors(measured.observations, start_of(measured.gpu), inf)
    fitted = held_out_errors(measured, start_of(measured.gpu))
    names = dict.fromkeys(o.operator for o in measured.observations)
    return {
        name: {
            "datasheet": of_operators(measured.observations, bare, (name,)),
            "fitted": of_operators(measured.observations, fitted, (name,)),
        }
        for name in names
    }


def of_operators(observations: Sequence[Observation], errors: Sequence[float], operators: Collection[str]) -> dict:
    """The errors of some operators, in brief."""
    chosen = [(o, e) for o, e in zip(observations, errors, strict=True) if o.operator in operators]
    return asdict(summary([o for o, _ in chosen], [e for _, e in chosen]))


def never_fitted(mirror: Path) -> dict[str, dict]:
    """Errors of the default efficiencies on what the RTX 4090's folder holds and no fit uses."""
    tables = read_kernel_tables(mirror / "rtx4090_llama31_8b")
    roofline = RooflineCosts(model("llama-3.1-8b"), gpu("rtx4090"), 1, default_efficiencies(gpu("rtx4090")))
    mixed: dict[str, list[float]] = {}
    for (tokens, past, decodes, context), seconds in sorted(tables.attention.items()):
        if tokens and decodes:
            kind = f"mixed attention, {'up to 64' if decodes <= 64 else 'over 64'} decodes"
            mixed.setdefault(kind, []).append(
                roofline.attention_s([Chunk(tokens, past)], decodes, decodes * context) / seconds - 1
            )
    sampler = tables.per_sequence["sampler"]
    mixed["sampler"] = [roofline.sampler_s(int(x)) / y - 1 for x, y in zip(sampler.xs, sampler.ys, strict=True)]
    return {kind: asdict(brief(errors)) for kind, errors in mixed.items()}


def brief(errors: Sequence[float]) -> Summary:
    """Errors in brief, each point weighing the same."""
    return summary([Observation("", 1, 1, (), {}) for _ in errors], errors)


def cross(sets: Sequence[MeasuredSet]) -> dict[str, dict]:
    """By `A -> B`: errors on B's matrix products and other kernels with A's efficiencies."""
    found = {}
    for source in sets:
        unknowns = fit(source.observations, source.unknowns, start_of(source.gpu))
        for target in sets:
            errors = relative_errors(target.observations, unknowns, KNEE)
            kernels = {o.operator for o in target.observations if "elementwise" in o.bounds[0]}
            found[f"{source.gpu} -> {target.gpu}"] = {
                "matrix products": of_operators(target.observations, errors, GEMMS),
                "other kernels": of_operators(target.observations, errors, kernels),
            }
    return found


def layers(mirror: Path) -> dict[str, dict]:
    """Errors of the default efficiencies on all token-wise operators of a layer together, at powers of two of tokens.

    Not held out: the efficiencies come from the same table, but from single operators.
    """
    found = {}
    for name, shape, file, degrees, most in LAYERS:
        for tp in degrees:
            testbed = f"{name}x{tp}"
            table, roofline = costs(shape, testbed, tp, operators=mirror / file), costs(shape, testbed, tp)
            tokens = [2**i for i in range(most.bit_length())]
            errors = [roofline.layer_linear_s(n) / table.layer_linear_s(n) - 1 for n in tokens]
            found[f"{name} {shape} tp{tp}"] = asdict(brief(errors)) | {"by_tokens": dict(zip(tokens, errors, strict=True))}
    return found


def show(result: Mapping[str, Mapping]) -> None:
    """The tables."""
    header("table", "operator", "points", "datasheet: median, p90, signed", "fitted, held out: median, p90, signed")
    for name, operators in result["fitted"].items():
        for operator, errors in operators.items():
            row(name, operator, errors["fitted"]["points"], cells(errors["datasheet"]), cells(errors["fitted"]))
    header("rtx4090, never fitted", "points", "median, p90, signed")
    for kind, errors in result["never_fitted"].items():
        row(kind, errors["points"], cells(errors))
    header("whole layer, token-wise", "median, p90, signed", "1 token", "64", "512", "2048")
    for kind, errors in result["layers"].items():
        row(kind, cells(errors), *(f"{errors['by_tokens'][n]:+.1%}" for n in (1, 64, 512, 2048)))
    header("fitted on -> predicted", "matrix products", "other kernels")
    for pair, errors in result["cross"].items():
        row(pair, cells(errors["matrix products"]), cells(errors["other kernels"]))
    print()


def header(*names: str) -> None:
    """The head of a Markdown table."""
    print()
    row(*names)
    row(*("---" for _ in names))


def row(*values: object) -> None:
    """One row of a Markdown table."""
    print("| " + " | ".join(map(str, values)) + " |")


def cells(errors: Mapping[str, float]) -> str:
    """Median, p90 and signed median in percent."""
    return f"{errors['median']:.1%}, {errors['p90']:.1%}, {errors['signed']:+.1%}"


if __name__ == "__main__":
    sys.exit(main())
