"""The history on disk: what comes back, what a kill leaves, what a changed search is told."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.search import Answer, History, Knob, Probe, propose, search
from systems.registry import InputError
from tests.unit.search_systems import Ask, power, space

POINT = {"rate_rps": 0.5}


def carry_on(history: History, ask: Ask, stop_after: int | None = None, point: dict = POINT) -> list[Answer]:
    """What the runner of a series does: replay, then ask and append; maybe stop early."""
    rules = space()
    answers = history.replay(point, rules)
    while isinstance(step := propose(rules, answers), Probe) and len(answers) != stop_after:
        answers.append(ask(step))
        history.append(point, answers[-1], f"hash{len(answers)}")
    return answers


def test_an_answer_comes_back_to_the_bit(tmp_path: Path) -> None:
    history = History(tmp_path / "deep" / "s.history.jsonl")
    answer = Answer(Probe({"k": 0.1 + 0.2, "n": 8}, 3), math.nan, {"a": math.inf, "b": -math.inf, "c": 1e-300})
    history.append(POINT, answer, "abc")
    (entry,) = history.entries()
    assert (entry.point, entry.trial, entry.line) == (POINT, "abc", 1)
    assert entry.answer.probe == answer.probe and entry.answer.metrics == answer.metrics
    assert math.isnan(entry.answer.objective) and isinstance(entry.answer.probe.knobs["n"], int)
    told = json.loads(history.path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (
        told["objective"] == "nan"
        and told["metrics"]["a"] == "inf"
        and set(told)
        == {
            "point",
            "probe",
            "objective",
            "metrics",
            "trial",
        }
    )


@given(st.floats(), st.floats(), st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_survives(tmp_path_factory: pytest.TempPathFactory, objective: float, metric: float, knob: float) -> None:
    history = History(tmp_path_factory.mktemp("h") / "h.jsonl")
    history.append({}, Answer(Probe({"k": knob}), objective, {"m": metric}))
    back = history.entries()[0].answer
    assert repr((back.objective, back.metrics["m"], back.probe.knobs["k"])) == repr((objective, metric, knob))


def test_no_file_is_no_history(tmp_path: Path) -> None:
    history = History(tmp_path / "none.jsonl")
    assert history.entries() == [] and history.replay(POINT, space()) == []
    assert not history.path.exists()


def test_points_share_a_file_in_any_interleaving(tmp_path: Path) -> None:
    history, systems = History(tmp_path / "h.jsonl"), {i: power(10.0 * (i + 1), 1, 0.05, i) for i in range(3)}
    draw = random.Random(3)
    for _ in range(60):
        i = draw.randrange(3)
        carry_on(history, systems[i], len(history.entries({"i": i})) + 1, {"i": i})
    for i, system in systems.items():
        carry_on(history, system, None, {"i": i})
        assert history.replay({"i": i}, space()) == search(space(), system)[1]


def test_every_prefix_of_a_history_replays_to_the_same_next_question(tmp_path: Path) -> None:
    for seed in range(10):
        full = search(space(), power(300, 1, 0.05, seed))[1]
        for length in range(len(full)):
            history = History(tmp_path / f"{seed}-{length}.jsonl")
            for answer in full[:length]:
                history.append(POINT, answer)
            assert propose(space(), history.replay(POINT, space())) == full[length].probe


def test_a_stop_after_any_probe_ends_in_the_same_file(tmp_path: Path) -> None:
    ask, whole = power(300, 1, 0.05, 1), History(tmp_path / "whole.jsonl")
    answers = carry_on(whole, ask)
    for stop in range(len(answers)):
        parts = History(tmp_path / f"{stop}.jsonl")
        carry_on(parts, ask, stop)
        assert carry_on(History(parts.path), ask) == answers
        assert parts.path.read_bytes() == whole.path.read_bytes()


def test_a_last_line_torn_at_any_byte_is_asked_again(tmp_path: Path) -> None:
    ask, whole = power(300, 1, 0.05, 2), History(tmp_path / "whole.jsonl")
    answers = carry_on(whole, ask)
    data = whole.path.read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    for cut in range(last, len(data)):
        torn = History(tmp_path / "torn.jsonl")
        torn.path.write_bytes(data[:cut])
        assert torn.replay(POINT, space()) == answers[:-1]
        assert torn.path.read_bytes() == data[:cut]  # reading changes nothing
        carry_on(torn, ask)
        assert torn.path.read_bytes() == data


def test_a_killed_process_loses_no_answer_and_repeats_none(tmp_path: Path) -> None:
    """SIGKILL while it appends, over and over; every answer that it acknowledged is there, and the end is the same bytes."""
    script = tmp_path / "runner.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            from tests.unit.search_systems import power
            from tests.unit.test_history import carry_on
            from harness.search import History

            system = power(300, 1, 0.1, 5)
            def ask(probe):
                answer = system(probe)
                print("asked", flush=True)
                return answer

            carry_on(History(Path(sys.argv[1])), ask)
            """
        )
    )
    root = Path(__file__).parents[2]
    whole = History(tmp_path / "whole.jsonl")
    carry_on(whole, power(300, 1, 0.1, 5))
    total = len(whole.entries())
    file, draw, kills, asked = tmp_path / "killed.jsonl", random.Random(11), 0, 0
    for _ in range(200):
        before = len(History(file).entries())
        command = [sys.executable, str(script), str(file)]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}) as child:
            assert child.stdout is not None
            told = sum(1 for _ in range(draw.randrange(1, 6)) if child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            told += len(child.stdout.readlines())
        asked += told
        now = len(History(file).entries())
        assert before + told - 1 <= now <= before + told  # at most the one in flight was lost
        if child.returncode == 0:
            break
        kills += 1
    assert kills and file.read_bytes() == whole.path.read_bytes()  # how many there are is up to the scheduler
    assert asked - total <= kills


def test_a_changed_search_is_told_where_it_parts(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    history.append({"other": 1}, Answer(Probe({"k": 5.0}), 1.0, {"m": 1.0}))
    carry_on(history, power(300))
    changed = space(knobs={"k": Knob(low=1, high=300)})
    with pytest.raises(InputError) as caught:
        history.replay(POINT, changed)
    assert caught.value.where == f"{history.path}:6"  # 1, 2, 8 and 128 are still the same questions
    assert "k 1000, seed 0" in str(caught.value) and "asks k 300, seed 0" in str(caught.value)
    assert "delete this file" in caught.value.mend and "\n" not in str(caught.value)


def test_answers_after_the_end_of_the_search_are_refused(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    answers = carry_on(history, power(300))
    history.append(POINT, Answer(Probe({"k": 5.0}), 1.0, {"m": 1.0}))
    with pytest.raises(InputError, match="ends with 'precision reached'") as caught:
        history.replay(POINT, space())
    assert caught.value.where.endswith(f":{len(answers) + 1}")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b'{"point": {}}',
        b'{"point": {}, "probe": {"knobs": {"k": "1"}, "seed": 0}, "objective": 1, "metrics": {}, "trial": ""}',
        b'{"point": {}, "probe": {"knobs": {"k": 1}, "seed": 0}, "objective": null, "metrics": {}, "trial": ""}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, line: bytes) -> None:
    history = History(tmp_path / "h.jsonl")
    carry_on(history, power(300), 2)
    with history.path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError) as caught:
        history.entries()
    assert caught.value.where == f"{history.path}:3" and "\n" not in str(caught.value)


def test_a_write_that_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(tmp_path / "h.jsonl")
    answers = carry_on(history, power(300), 3)
    before, write = history.path.read_bytes(), os.write
    budget = [20]

    def full(descriptor: int, data: bytes) -> int:
        if not budget[0]:
            raise OSError(28, "No space left on device")
        written = write(descriptor, data[: budget[0]])
        budget[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InputError, match="free some space"):
        history.append(POINT, answers[0])
    assert history.path.read_bytes() == before


def test_a_torn_line_longer_than_a_block_is_cut_off(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    first = Answer(Probe({"k": 1.0}), 1.0, {"m": 1.0})
    for kept in (0, 1):
        history.path.unlink(missing_ok=True)
        for _ in range(kept):
            history.append(POINT, first)
        with history.path.open("ab") as file:
            file.write(b"x" * 10_000)
        history.append(POINT, first)
        assert len(history.entries()) == kept + 1
