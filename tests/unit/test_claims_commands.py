"""`python -m harness.claims.judge` and `python -m harness.claims`: files in, verdicts and exit status out."""

import json
from pathlib import Path

import pytest

from harness.claims import __main__ as show
from harness.claims import judge
from harness.claims.table import explanations
from harness.cli import run
from harness.config import Config
from harness.figure_file import load_figure
from harness.targets import Figure, Project
from systems.registry import InputError

FIGURE = """
title: A figure
paper: {figure: "8a"}
experiment: colocation
testbed: rtx3090x2
factors: {rate_rps: {levels: [0.5, 1]}}
series:
  - {name: ours, label: Ours}
  - {name: theirs, label: Theirs}
plot: {kind: grouped_bars, y: peft}
claims:
  - {id: C1, kind: ratio_between, series: ours, over: theirs, low: 1, high: 2, text: up to twice, source: Section 6}
  - {id: C2, kind: zero_at, series: theirs, at: {rate_rps: 5}, text: theirs stops, source: Section 6}
"""
TABLE = "series,rate_rps,peft\nours,0.5,3.0\nours,1,2.0\ntheirs,0.5,1.0\ntheirs,1,0.0\n"


@pytest.fixture
def files(tmp_path):
    """A figure of llmstation, its table, and where its verdicts go."""
    figure = tmp_path / "figures" / "llmstation" / "fig8a.yaml"
    figure.parent.mkdir(parents=True)
    figure.write_text(FIGURE)
    (tmp_path / "table.csv").write_text(TABLE)
    (tmp_path / "docs").mkdir()
    return figure, tmp_path / "table.csv", tmp_path / "claims.json"


def run_judge(files, *more):
    assert judge.main([*map(str, files), *more]) == 0
    return json.loads(files[2].read_text())


def run_show(files, tmp_path):
    return show.main([str(files[2]), "--docs", str(tmp_path / "docs")])


def test_the_verdicts_of_a_figure(files):
    found = run_judge(files, "--note", "sharegpt_lengths is a stand-in")
    assert (found["system"], found["figure"], found["notes"]) == ("llmstation", "fig8a", ["sharegpt_lengths is a stand-in"])
    first, second = found["claims"]
    assert (first["status"], first["numbers"]["max"], first["expected"]) == ("differs", 3.0, "1 to 2")
    assert second["status"] == "not testable here"


def test_judging_can_be_refused(files):
    found = run_judge(files, "--not-testable", "smoke scale")
    assert {(claim["status"], claim["reason"]) for claim in found["claims"]} == {("not testable here", "smoke scale")}


def test_judging_twice_gives_the_same_bytes_and_leaves_nothing_else(files, tmp_path):
    run_judge(files)
    first = files[2].read_bytes()
    run_judge(files)
    assert files[2].read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claims.json", "docs", "figures", "table.csv"]


def test_an_unexplained_difference_fails_and_an_explained_one_does_not(files, tmp_path, capsys):
    run_judge(files)
    assert run_show(files, tmp_path) == 1
    out = capsys.readouterr().out
    assert "differs (explained)" not in out
    assert "docs/llmstation.md: ### fig8a C1" in out
    (tmp_path / "docs" / "llmstation.md").write_text("# LLMStation\n\n### fig8a C1\n\nBecause of this.\n")
    assert run_show(files, tmp_path) == 0
    out = capsys.readouterr().out
    assert "differs (explained)" in out
    for shown in (
        "llmstation fig8a",
        "up to twice",
        "1 to 2",
        "Section 6",
        "why: 1 of 1 outside",
        "1 differs",
        "1 not testable",
    ):
        assert shown in out


@pytest.mark.parametrize(
    ("text", "explained"),
    [
        ("### fig8a C1\n\nwhy\n", True),
        ("### Claims C1, C2 of fig8a: too fast\nwhy\n", True),
        ("### fig8a C1.\nwhy\n", True),
        ("### fig8a C1\n", False),  # no text under it
        ("### fig8a C1\n### fig8a C2\nwhy\n", False),
        ("### fig8a C11\nwhy\n", False),
        ("### fig8b C1\nwhy\n", False),
        ("fig8a C1\nwhy\n", False),
        ("```\n# fig8a C1\n```\nwhy\n", False),
    ],
)
def test_what_explains(tmp_path, text, explained):
    (tmp_path / "llmstation.md").write_text(text)
    assert any({"fig8a", "C1"} <= words for words in explanations(tmp_path / "llmstation.md")) is explained


def test_no_documentation_explains_nothing(tmp_path):
    assert explanations(tmp_path / "none.md") == []


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"system": "a", "figure": "b", "title": "", "notes": [], "claims": [{}]}']
)
def test_a_damaged_file_is_named(files, tmp_path, content):
    files[2].write_text(content)
    with pytest.raises(InputError, match=r"claims\.json"):
        run_show(files, tmp_path)


def test_nothing_to_judge_is_one_line(capsys):
    assert run(show.main, []) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nothing to judge" in err


def test_no_figure_with_claims_is_one_line(capsys):
    """`snakemake claims` where only figures without claims can be made: its input function ends it with one line."""
    bare = load_figure(Path(__file__).parents[2] / "figures" / "maveriq" / "h200_queues.yaml")
    assert not bare.claims
    project = Project(Config(backend="recorded"), [Figure(Path("figures/maveriq/h200_queues.yaml"), bare)])
    ask = project.claims()
    assert callable(ask)
    with pytest.raises(SystemExit) as ended:
        ask(None)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "recorded, paper" in err and "has a claim" in err


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.json"):
        show.main([str(tmp_path / "none.json")])


def test_a_table_without_the_objective_is_named(files):
    files[1].write_text("series,rate_rps\nours,1\n")
    with pytest.raises(InputError, match=r"table\.csv.*column peft is missing"):
        judge.main([*map(str, files)])
    assert not files[2].exists()
