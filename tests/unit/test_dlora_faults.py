"""Deaths in dLoRA's simulated cluster: they come while requests move, and first come stays first served."""

from __future__ import annotations

import pytest

from systems.dlora.cluster.simulated import ClusterRules
from tests.unit.test_dlora_cluster import assert_served_once, cluster, crowd


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("after_s", "phase"), [(0.505, "solving"), (0.512, "leaving"), (0.52, "on their way")])
def test_the_deaths_that_are_tried_come_while_requests_move(monkeypatch, victim, after_s, phase):
    """The times of `test_source_or_destination_dies_in_a_migration` are such: without this it could miss the migration."""
    asked, found = crowd(), set()
    made = cluster([{0}, {1}, {2}], slots=2, copy_kv=True)
    made.rules = ClusterRules("dlora", made.rules.rules, transfer_bytes_per_s=5e8, solve_s=lambda *_: 0.01)
    kill = made.kill

    def killing(engine, now_s):
        found.update({"solving"} if now_s < made._locked_until_s else ())
        found.update({"leaving"} if any(made._outbox) else ())
        found.update({"on their way"} if made._moving else ())
        kill(engine, now_s)

    monkeypatch.setattr(made, "kill", killing)
    made.serve(asked, [(after_s, victim)])
    assert_served_once(asked)
    assert found == {phase}


def test_what_is_copied_from_a_source_that_dies_is_computed_again(monkeypatch):
    asked = crowd()
    made = cluster([{0}, {1}, {2}], slots=2, copy_kv=True)
    made.rules = ClusterRules("dlora", made.rules.rules, transfer_bytes_per_s=5e8, solve_s=lambda *_: 0.01)
    kill, moving = made.kill, {}

    def killing(engine, now_s):
        moving.update({index: asked[index].generated for index in made._moving})
        kill(engine, now_s)

    monkeypatch.setattr(made, "kill", killing)
    made.serve(asked, [(0.52, 0)])
    begun = {index: done for index, done in moving.items() if done}
    assert begun
    assert all(asked[index].prompt_tokens == asked[index].request.input_tokens + done for index, done in begun.items())


def test_requests_go_on_moving_after_a_death():
    """Whatever was about to leave the dead one is forgotten, else nobody looks again."""
    asked = crowd(150)
    made = cluster([{0}, {1}, {2}], slots=2)
    made.serve(asked, [(0.512, 0)])
    assert_served_once(asked)
    assert made.totals.solves > 1 and made.totals.moved > 0


@pytest.mark.parametrize("migration", ["none", "dlora", "round_robin", "proactive"])
def test_first_come_stays_first_served_when_a_replica_dies(migration):
    asked = crowd(80)
    made = cluster([{0}, {1}, {2}], migration, slots=2)
    died_s = 0.3
    made.serve(asked, [(died_s, 0)])
    assert_served_once(asked)
    late = [one for one in asked if one.scheduled_s > died_s]
    assert len(late) > 40
    for replica in (1, 2):
        starts = [one.scheduled_s for one in late if one.replica == replica and not one.migrations]
        assert starts == sorted(starts)
    if migration == "none":  # all in one place and of one length: they end as they came
        ends = [one.finish_s for one in asked]
        assert ends == sorted(ends)
