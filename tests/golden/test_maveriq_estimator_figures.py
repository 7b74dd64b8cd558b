"""Every figure about MaverIQ's measurements and estimates: one trial per point, and its claims."""

import pandas as pd
import pytest

import figures
from harness.claims.data import Table
from harness.claims.evaluate import Status, evaluate
from harness.figure_file import load_figure
from systems.common.core import Trial
from systems.maveriq.experiments import EXPERIMENTS

NAMES = [
    "parallelism_13b", "parallelism_40b", "uneven_7b", "uneven_13b", "uneven_70b", "quantisation", "fingerprint_scaling",
    "profiling_latency_error", "profiling_memory_error", "profiling_peak_memory", "profiling_time", "profiling_gpu_hours",
    "batch_size", "batch_error", "profiling_cost", "estimator_error", "decision_regret", "interval_coverage",
    "configuration_spread", "fingerprint_size",
]  # fmt: skip
DIFFERS: dict[str, set[str]] = {}
"""Claims that differ, and docs/maveriq.md says why."""


def rows_of(figure, mirror, scale="paper"):
    run = EXPERIMENTS[figure.experiment]
    rows = []
    for series in figure.series:
        for point in figure.points(series.name):
            trial = Trial(
                "maveriq",
                figure.experiment,
                point.parameters,
                figure.testbed,
                datasets={"maveriq_a6000": mirror / "maveriq_a6000"},
            )
            rows.append({"series": series.name, **point.at, **run(trial).metrics})
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_claims_and_drawing(root, mirror, tmp_path, name):
    figure = load_figure(root / "figures" / "maveriq" / f"{name}.yaml")
    rows = rows_of(figure, mirror)
    table = Table(tuple(figure.factors), figure.objective, tuple(rows))
    found = {claim.id: evaluate(claim, table) for claim in figure.claims}
    off = {claim for claim, verdict in found.items() if verdict.status is not Status.REPRODUCED}
    assert off == DIFFERS.get(name, set()), [found[claim] for claim in off]
    plot = {
        **figure.plot.model_dump(),
        "series": [{"name": one.name, "label": one.label} for one in figure.series],
        "published": [value.model_dump() for value in figure.published],
        "footer": "published",
    }
    if figure.factors:
        first = next(iter(figure.factors))
        plot |= {"x": first, "x_labels": {level.value: level.label for level in figure.factors[first].levels}}
    figures.draw(figure.plot.kind, pd.DataFrame(rows), plot, tmp_path / "f.pdf")
    assert (tmp_path / "f.pdf").stat().st_size > 1000
