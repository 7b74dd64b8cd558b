"""Decode steps fused with forward phases in the measured driver, on a CPU with a tiny model."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from systems.common.core import Request, Trial  # noqa: E402
from systems.common.torch_engine import graphs  # noqa: E402
from systems.llmstation.corun import session as sessions  # noqa: E402
from systems.llmstation.corun.beside import Beside  # noqa: E402
from systems.llmstation.corun.executor import Awaited  # noqa: E402
from systems.llmstation.corun.fusing import Fuser  # noqa: E402
from systems.llmstation.corun.measure import serve, wanted_of  # noqa: E402
from systems.llmstation.corun.observed import Observed, Place, Step  # noqa: E402
from systems.llmstation.corun.pace import Planned, Quiet  # noqa: E402
from systems.llmstation.corun.session import Session, make_trainer, samples  # noqa: E402
from systems.llmstation.experiments import colocation  # noqa: E402
from systems.llmstation.measured import _known  # noqa: E402
from systems.llmstation.modes import PlannerMode  # noqa: E402
from systems.llmstation.training.trainer import Trainer  # noqa: E402
from tests.integration.test_llmstation_training import Masked  # noqa: E402
from tests.unit.llmstation_training_recorder import Recorder  # noqa: E402

torch.set_num_threads(1)
WORKLOAD = {"arrivals": "poisson", "lengths": "fixed", "input_tokens": 160, "output_tokens": 160}
TOLD = {"model": "llama-3.1-8b", "seconds": 0.4, "rate_rps": 10, "workload": WORKLOAD, "kv_blocks": 64}


def trial(**parameters: object) -> Trial:
    return Trial("llmstation", "colocation", {**TOLD, **parameters}, "cpux1", "measured", 0, {})


@pytest.fixture
def held() -> Session:
    return Session.start(wanted_of(trial()))


def asked() -> list[Request]:
    return [Request(i, 0.01 * i, 3 + 5 * i % 17, 20 + 7 * i % 23) for i in range(10)]


def tokens(held: Session, beside: Beside) -> list[list[int]]:
    serve(held, beside, asked())
    return [list(held.executor.outputs[request.index]) for request in asked()]


def use_graphs(held: Session) -> None:
    """The stand-in for CUDA graphs, and decode attention that can be recorded."""
    model = held.executor.model
    model.attention = Masked(held.wanted.shape, held.executor.cache, model.attention.rope)
    trainer = make_trainer(held.wanted.shape, held.weights, held.wanted)
    assert isinstance(trainer, Trainer)
    fuser = Fuser(trainer, held.executor.steps, held.wanted.tuning_tokens, Recorder())
    fuser.warm()
    held.trainer, held.fusing = trainer, fuser
    held.executor.may_fuse()


@pytest.mark.parametrize("graphed", [False, True])
def test_fused_steps_serve_and_tune_as_if_alone(held: Session, graphed: bool) -> None:
    if graphed:
        use_graphs(held)
    alone = tokens(held, Beside(held.lanes))
    pace = Planned(PlannerMode(1.0), _known(held))
    fuser = held.fuser()
    assert isinstance(fuser, Fuser), fuser
    assert set(fuser.seconds) == set(fuser.sizes)
    tuner = held.tuner(seed=3)
    beside = Beside(held.lanes, tuner, pace, pace.observed)
    beside.fuser, pace.observed.fused_profile = fuser, fuser.seconds
    state, known = held.trainer.adapters.state(), len(held.trainer.losses)
    held_losses = held.trainer.losses
    assert tokens(held, beside) == alone
    assert beside.tasklets["fused"] > 0
    assert beside.tasklets["fused"] % held.wanted.shape.layers == 0
    assert tuner.launched == sum(beside.tasklets.values())
    assert pace.observed.fused_s
    while tuner.done_in_sample:
        tuner.launch()
    losses = [float(loss) for loss in held_losses[known:]]
    assert tuner.samples == pytest.approx(len(losses))
    held.trainer.adapters.restore(state)
    del held_losses[known:]
    for _, batch in zip(losses, samples(held.wanted.shape, held.wanted.tuning_tokens, 3, "cpu"), strict=False):
        for _ in held.trainer.steps(batch):
            pass
    assert losses == pytest.approx([float(loss) for loss in held_losses[known:]], rel=1e-4)
    assert held.executor.tables.free_blocks == held.config.num_gpu_blocks


def test_what_cannot_be_fused_is_said_and_tuning_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Fuser) -> None:
        raise RuntimeError("CUDA error: out of memory\nand more")

    monkeypatch.setattr(sessions, "_KEPT", {})
    monkeypatch.setattr(Fuser, "warm", fails)
    outcome = colocation(trial(policy="llmstation", decode_target_s=1.0))
    assert "not fused: RuntimeError: CUDA error: out of memory" in outcome.notes
    assert outcome.metrics["tasklets_fused"] == 0
    assert outcome.metrics["peft_samples_per_s"] > 0


@pytest.mark.parametrize(("fused", "some"), [("auto", True), ("off", False)])
def test_fusing_is_a_switch(monkeypatch: pytest.MonkeyPatch, fused: str, some: bool) -> None:
    monkeypatch.setattr(sessions, "_KEPT", {})
    outcome = colocation(trial(policy="llmstation", decode_target_s=1.0, fused=fused))
    assert (outcome.metrics["tasklets_fused"] > 0) == some
    assert any("fused with decode steps" in note for note in outcome.notes) == some


def test_all_layers_are_fused_or_none() -> None:
    """k = (0.020 - 0.005) / (l_x - l_d0) of four layers: all fit while the fused step ends by the target."""
    place = Place(8, 512)

    def fuses(fused_s: float | None, target_s: float = 0.02, fused: bool = True) -> bool:
        observed = Observed(4, 500)
        observed.saw(Step(place, 0.005))
        if fused_s is not None:
            observed.saw(Step(place, fused_s, fused=True))
        pace = Planned(PlannerMode(target_s, fused), observed)
        pace.step(place, "forward", 4)
        answer = pace.fuses(place)
        assert not (answer and pace.may(0.0, 0, True, 0)), "nothing else runs beside a fused step"
        return answer

    assert fuses(0.0199)
    assert not fuses(0.0201)
    assert not fuses(0.01, target_s=0.004)
    assert not fuses(0.01, fused=False)
    assert not fuses(None)


def test_a_fused_step_is_not_taken_for_one_alone() -> None:
    observed, place = Observed(4, 500), Place(8, 512)
    observed.saw(Step(place, 0.005))
    observed.saw(Step(place, 0.015, fused=True))
    assert observed.alone_s == {place: 0.005}
    observed.fused_profile = {16: 0.012, 64: 0.02}
    assert observed.fused(place) == 0.015
    assert observed.fused(Place(4, 512)) == 0.012
    assert observed.fused(Place(65, 512)) is None


def test_waiting_while_tuning_counts_as_waiting() -> None:
    """Else launches would not be put off beside tuning: a step's period is learnt only where the host waited for its end."""
    now_s = 0.0
    flights = Awaited(lambda: now_s)
    flying = type("Event", (), {"synchronize": lambda self: None})()
    for _ in range(3):
        flights._flying.append(graphs_flight(flying))
        now_s += 0.006
        flights.awaited_s = 0.005
        list(flights.settle(0))
    flights._flying.append(graphs_flight(flying))
    assert flights.spare_s() == pytest.approx(0.004)
    assert flights.waited_s == pytest.approx([0.005] * 3)


def graphs_flight(event: object):
    from systems.common.torch_engine.flights import Flight

    return Flight([], torch.zeros(0, dtype=torch.int64), event, None, 8)  # type: ignore[arg-type]


def test_graphs_are_captured_at_the_priority_of_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, priority: int = 0) -> None:
            self.priority = priority

    current = Stream(-1)
    monkeypatch.setattr(graphs, "_STREAMS", {})
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    high = graphs.capture_stream()
    assert high.priority == -1
    assert high is not current
    assert graphs.capture_stream() is high
    current = Stream(0)
    assert graphs.capture_stream().priority == 0
    assert graphs.captured_on(high)
    assert not graphs.captured_on(current)


def test_nobody_else_fuses() -> None:
    assert not Quiet().fuses(Place(1, 128))
