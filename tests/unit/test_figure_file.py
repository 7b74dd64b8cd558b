"""Figure files: what they expand to, and what is refused in them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness.figure_file import FigureFile, load_figure, system_of
from harness.validation import validate
from systems.registry import InputError

PLAIN: dict[str, Any] = {
    "title": "A figure",
    "paper": {"figure": "8a"},
    "experiment": "knee",
    "testbed": "rtx3090x2",
    "parameters": {"seconds": 1000, "model": "m", "workload": {"arrivals": "poisson"}},
    "smoke": {"parameters": {"seconds": 60}},
    "factors": {
        "rate_rps": {"label": "Rate", "levels": [0.5, 1, 2], "smoke": [0.5, 2]},
        "model_size": {"levels": [{"value": "8B", "label": "8 B", "set": {"model": "big"}}, "13B"]},
    },
    "search": {"maximise": "work", "limits": {"ttft_p99_s": 0.5}},
    "columns": ["ttft_p99_s"],
    "series": [
        {"name": "ours", "label": "Ours", "knobs": {"chunk": {"low": 1, "high": 512, "integer": True}}},
        {"name": "theirs", "label": "Theirs", "parameters": {"seconds": 500}},
    ],
    "plot": {"kind": "grouped_bars", "y": "work"},
    "published": [{"series": "ours", "at": {"rate_rps": 1}, "value": 2, "source": "Figure 8"}],
    "claims": [{"id": "C1", "kind": "zero_at", "text": "t", "source": "s", "series": "ours"}],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(PLAIN)
    *way, last = path.split(".")
    here: Any = data
    for key in way:
        here = here[int(key)] if isinstance(here, list) else here[key]
    here[int(last) if isinstance(here, list) else last] = value
    return data


def figure(data: dict[str, Any] = PLAIN) -> FigureFile:
    return validate(FigureFile, data, "f")


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        figure(data)
    return str(caught.value)


def test_points_are_every_combination_of_levels_the_first_factor_slowest() -> None:
    points = figure().points("ours")
    assert [tuple(point.at.values()) for point in points] == list(itertools.product([0.5, 1, 2], ["8B", "13B"]))
    assert [type(point.at["rate_rps"]) for point in points[::2]] == [float, int, int]


def test_parameters_are_laid_over_each_other_in_order() -> None:
    first, second = figure().points("ours")[:2]
    rest = {"seconds": 1000, "workload": {"arrivals": "poisson"}, "rate_rps": 0.5}
    assert first.parameters == {**rest, "model": "big", "model_size": "8B"}
    assert second.parameters == {**rest, "model": "m", "model_size": "13B"}
    assert figure().points("ours", smoke=True)[0].parameters["seconds"] == 60
    assert figure().points("theirs", smoke=True)[0].parameters["seconds"] == 500


def test_smoke_keeps_the_named_levels_else_the_ends() -> None:
    assert [point.at["rate_rps"] for point in figure().points("ours", smoke=True)] == [0.5, 0.5, 2, 2]
    data = changed("factors.rate_rps", {"levels": [1, 2, 3, 4]})
    data["published"] = []
    assert {point.at["rate_rps"] for point in figure(data).points("ours", smoke=True)} == {1, 4}


def test_without_factors_there_is_one_point_and_without_search_no_space() -> None:
    data = {key: value for key, value in PLAIN.items() if key not in ("factors", "search", "published", "claims")}
    plain = figure({**data, "series": [{"name": "one", "label": "One"}], "plot": {"kind": "table", "y": "latency_s"}})
    assert [point.at for point in plain.points("one")] == [{}]
    assert plain.space("one") is None
    assert plain.objective == "latency_s"


def test_a_space_is_the_rules_and_the_knobs_of_its_series() -> None:
    space = figure().space("ours")
    assert space is not None
    assert (space.maximise, dict(space.limits), list(space.knobs)) == ("work", {"ttft_p99_s": 0.5}, ["chunk"])
    assert figure().knobs == ["chunk"]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("titel", "x", "f: titel: 'x': unknown key, did you mean title?"),
        ("factors.rate_rps.levles", [1], "f: factors.rate_rps.levles: [1]: unknown key, did you mean levels?"),
        ("factors.rate_rps.levels", [], "f: factors.rate_rps.levels: []: "),
        ("factors.rate_rps.levels", [0.5, 2, 0.5], "f: factors.rate_rps.levels: 0.5: is there twice"),
        ("factors.rate_rps.smoke", [3], "f: factors.rate_rps.smoke: 3: use some of the levels: 0.5, 1, 2"),
        ("factors.model_size.levels.0.lable", "x", "f: factors.model_size.levels.0.lable: 'x': unknown key, did you mean"),
        ("factors.rate_rps.levels", [[1]], "f: factors.rate_rps.levels.0: [1]: "),
        ("search.limits.ttft_p99_s", 0, "f: search.limits.ttft_p99_s"),
        ("search.tolerance", 2, "f: search.tolerance: 2: use less than 1"),
        ("series.0.knobs.chunk.low", 600, "f: series.0.knobs.chunk"),
        ("series.0.knobs.chunk.hihg", 600, "f: series.0.knobs.chunk.hihg: 600: unknown key, did you mean high?"),
        ("series.1.name", "ours", "f: series: 'ours': is there twice"),
        ("series.1.name", "../x", "f: series.1.name: '../x': use text of the pattern"),
        ("series", [], "f: series: []: "),
        ("plot.kind", "pie", "f: plot.kind: 'pie': unknown kind of plot, use one of boxes, errors, grouped_bars"),
        ("plot.colour", "red", "f: plot.colour: 'red': unknown key"),
        ("testbed", "h100", "f: testbed: 'h100': write <gpu>x<how many>"),
        ("backends", ["gpu"], "f: backends.0: 'gpu': unknown value, use one of simulated"),
        ("columns", ["work"], "f: columns: 'work': is there twice"),
        ("columns", ["trial"], "f: columns: 'trial': is there twice"),
        ("published.0.at.rate_rps", 7, "f: published.0.at.rate_rps: 7: use a level"),
        ("published.0.series", "our", "f: published.0.series: 'our': no such series, did you mean ours?"),
        ("claims.0.series", "our", "f: claims: ['C1']: claim C1 names series 'our'"),
        ("claims.0.kind", "zero", "f: claims.0: "),
        ("parameters.seconds", float("nan"), "f: parameters.seconds"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(path: str, value: Any, said: str) -> None:
    assert refusal(changed(path, value)).startswith(said)


def test_knobs_without_search_and_knobs_that_are_factors_are_refused() -> None:
    assert refusal({key: value for key, value in PLAIN.items() if key != "search"}).startswith("f: search: '(absent)'")
    assert "both a factor and a knob" in refusal(changed("series.0.knobs", {"rate_rps": {"low": 1, "high": 2}}))


@given(st.data())
def test_a_key_that_nobody_knows_is_refused_wherever_it_stands(data: st.DataObject) -> None:
    broken = copy.deepcopy(PLAIN)
    places = [
        *(
            broken,
            broken["paper"],
            broken["smoke"],
            broken["factors"]["rate_rps"],
            broken["factors"]["model_size"]["levels"][0],
        ),
        *(broken["search"], broken["series"][0], broken["series"][0]["knobs"]["chunk"], broken["plot"], broken["published"][0]),
        *(broken["claims"][0],),
    ]
    data.draw(st.sampled_from(places))["zz_unknown"] = 1
    assert "zz_unknown: 1: unknown key" in refusal(broken)


def test_the_shipped_figure_files_are_good_and_belong_to_systems(root: Path) -> None:
    paths = sorted((root / "figures").glob("*/*.yaml"))
    assert paths
    for path in paths:
        assert load_figure(path).series
        assert system_of(path) == path.parent.name


def test_a_figure_of_no_system_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "llmstaton" / "fig1.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(PLAIN))
    with pytest.raises(InputError, match=r"llmstaton.*did you mean llmstation"):
        load_figure(path)
