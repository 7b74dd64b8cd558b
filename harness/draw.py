"""Draws a figure from its table, and its search from the histories; the footer says what the numbers are made of.

python -m harness.draw figure --figure figures/<system>/<figure>.yaml --table table.csv --series NAME.parquet... --out X.pdf
python -m harness.draw search --figure ... --table ... --series ... --out search.pdf
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import cli
from harness.figure_file import FigureFile, load_figure
from harness.leftovers import sweep
from harness.rescale import rescaled
from harness.rows import About, merged, read_rows
from harness.search import History

if TYPE_CHECKING:
    from pandas import DataFrame


def footer(about: About) -> str:
    """What stands under a figure: backend and testbed, hardware model, data, seed, commit."""
    data = [*about.datasets, *(f"synthetic stand-in for {name}" for name in about.stand_ins)]
    smoke = ["smoke scale: not the paper's experiment"] if "smoke" in about.scales else []
    notes = dict.fromkeys(part for note in about.notes for part in note.split("; "))  # series share most of what they say
    for name in about.stand_ins:
        notes.pop(f"{name}: synthetic stand-in", None)  # said with the data
    parts = [
        f"{', '.join(about.backends)} on {', '.join(about.hardware)}",
        *smoke,
        *notes,
        f"data: {', '.join(data)}" if data else "",
        f"seed {', '.join(map(str, about.seeds))}",
        f"commit {', '.join(about.commits)}",
    ]
    return "; ".join(part for part in parts if part)


def plot_of(figure: FigureFile, about: About) -> dict[str, Any]:
    """What `figures.draw` is told besides the table: the figure file's `plot`, and what else the file says."""
    told: dict[str, Any] = figure.plot.model_dump(mode="json", exclude_unset=True)
    told["series"] = [{"name": series.name, "label": series.label} for series in figure.series]
    told["published"] = [value.model_dump(mode="json") for value in figure.published]
    return told | _x_axis(figure) | {"footer": footer(about)}


def _x_axis(figure: FigureFile) -> dict[str, Any]:
    if not figure.factors:
        return {}
    name, factor = next(iter(figure.factors.items()))
    labels = {str(level.value): level.label for level in factor.levels if level.label is not None}
    return {"x": name, "x_label": factor.label or name, **({"x_labels": labels} if labels else {})}


def search_plot_of(figure: FigureFile, about: About) -> dict[str, Any]:
    """As `plot_of`, for the plot of the search itself."""
    assert figure.search
    scales = {name: knob.scale for series in figure.series for name, knob in series.knobs.items()}
    whole = plot_of(figure, about)
    shared = ("series", "footer", "x", "x_label", "x_labels", "y_label", "limit_labels", "knob_labels")
    kept = {key: whole[key] for key in shared if key in whole}
    told = {"kind": "search_trace", "y": figure.objective, "title": f"Search behind {figure.title}"}
    return kept | told | {"knobs": figure.knobs, "limits": dict(figure.search.bounds), "knob_scales": scales}


def read_table(path: Path) -> DataFrame:
    """A table.csv as it was written: empty cells are NaN, texts stay texts."""
    import pandas

    return pandas.read_csv(path, keep_default_na=False, na_values=["", "nan"], dtype={"series": str, "trial": str})


def search_table(figure: FigureFile, table: DataFrame, series: Sequence[Path]) -> DataFrame:
    """A row per probe of every history; `chosen` are those whose trial is in the table."""
    import pandas

    assert figure.search
    chosen = set(table["trial"].dropna())
    rows: list[Mapping[str, Any]] = []
    for path in series:
        for entry in History(path.with_suffix(".history.jsonl")).entries():
            row: dict[str, Any] = {"series": path.stem, **entry.point, figure.objective: entry.answer.objective}
            row |= {f"knob_{name}": entry.answer.probe.knobs.get(name) for name in figure.knobs}
            row |= {
                f"{name}_over_limit": entry.answer.metrics[name] / limit
                for name, limit in figure.rules_at(entry.point).bounds.items()
            }
            rows.append(row | {"chosen": entry.trial in chosen})
    return pandas.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one PDF."""
    parser = argparse.ArgumentParser(prog="python -m harness.draw")
    parser.add_argument("what", choices=["figure", "search"])
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--series", type=Path, nargs="+", required=True, help="parquet files of harness.series")
    parser.add_argument("--rescale", type=Path, nargs="?", help="rescale.json, on other hardware than the paper's")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    from figures import PlotError, draw

    figure, table = rescaled(load_figure(args.figure), args.rescale), read_table(args.table)
    about = merged(read_rows(path)[1] for path in args.series)
    sweep(args.out.parent)
    try:
        if args.what == "search":
            draw("search_trace", search_table(figure, table, args.series), search_plot_of(figure, about), args.out)
        else:
            draw(figure.plot.kind, table, plot_of(figure, about), args.out)
    except PlotError as error:
        cli.say(f"{args.figure}: {error}")
        return cli.UNUSABLE
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
