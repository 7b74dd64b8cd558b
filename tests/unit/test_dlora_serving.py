"""dLoRA's servers without a model: who decides what (control), and that no token is lost or told twice (manager)."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.common.serve.messages import (
    Abort,
    Done,
    Ended,
    Job,
    Load,
    LoadAdapter,
    Progress,
    UnloadAdapter,
)
from systems.dlora.cluster import ilp
from systems.dlora.cluster.migration import MigrationRules
from systems.dlora.serving.control import BASE, EXECUTION_S, Control
from systems.dlora.serving.file import read
from systems.dlora.serving.manager import HTTP, SOLVER, Manager, NobodyLeftError
from systems.dlora.serving.messages import Host, Spent, Withdraw, Withdrawn
from systems.dlora.serving.solver import Answer, Ask

NAMES = ("a", "b", "c", "d")
RULES = MigrationRules(interval_s=1.0, load_excess=2.0, limit_s=1.0)


def job(index: int, adapter: str | None = "a", tokens: int = 4, prompt: int = 3) -> Job:
    return Job(index, np.arange(1, prompt + 1) + index, tokens, 0.0, 1.0, 0, adapter=adapter)


def control(kind: str = "dlora", hosts=({0, 1}, {2, 3}), **options) -> Control:
    return Control(NAMES, [set(h) for h in hosts], options.pop("slots", 2), options.pop("batch", 2), kind, RULES, **options)


# ---- decisions


def test_requests_go_to_the_cheapest_host_and_the_base_model_s_to_any() -> None:
    made = control(hosts=({0, 1}, {0, 2, 3}))
    assert [made.take(job(i, "a")).replica for i in range(4)] == [0, 0, 1, 1]
    assert made.take(job(4, "d")).replica == 1
    assert made.take(job(5, None)).replica == 0
    assert [made.outstanding(0), made.outstanding(1)] == [3, 3]
    assert made.drop(4) is not None and made.drop(4) is None
    assert made.outstanding(1) == 2


def test_round_robin_knows_what_was_told_last() -> None:
    made = control("round_robin", hosts=({0}, {0}))
    assert [made.take(job(i)).replica for i in range(6)] == [0] * 6  # nobody has told anything
    made.reported(0)
    assert made.take(job(6)).replica == 1


def test_proactive_gives_a_loaded_adapter_the_place_of_an_idle_copy() -> None:
    made = control("proactive", hosts=({0, 1}, {1, 2}), batch=1)
    assert [made.take(job(i)).replica for i in range(2)] == [0, 1]
    assert made.hosts == [{0, 1}, {0, 2}]  # b has another copy
    assert made.take(job(2, "c")).replica == 1 and made.take(job(3, None)).replica in (0, 1)


def test_the_rest_of_a_request() -> None:
    order = control().take(Job(7, np.array([5, 6]), 9, 0.5, 0.9, 3, frozenset({1}), 4, "a"))
    assert order.rest() is order.job
    order.tokens += [8, 9, 1, 4, 2]
    rest = order.rest()
    assert rest.prompt.tolist() == [5, 6, 8, 9, 1, 4, 2]
    assert (rest.index, rest.max_tokens, rest.min_tokens, rest.seed, rest.temperature) == (7, 4, 0, 3, 0.5)


def test_a_question_is_about_the_most_and_the_least_loaded() -> None:
    made = control(hosts=({0, 1}, {2}, {3}))
    for i in range(8):
        made.take(job(i, "a" if i < 7 else "d"))
    assert made.question([0, 0, 0], [100] * 3) is not None
    question = made.question([0, 0, 0], [100] * 3)
    assert question is not None and list(question.engines) == [0, 1] and list(question.indices) == list(range(7))
    assert question.program.must_stay == {0, 1, 2}
    assert question.program.execution_s == {0: EXECUTION_S}
    assert question.program.slots == [2, 2] and list(question.program.hosted) == [{0, 1}, {2}]
    found = ilp.Assignment([0, 0, 0, 0, 1, 1, 1], [frozenset({0, 1, BASE}), frozenset({0, 2})], 1.0)
    made.drop(6)  # it has ended meanwhile
    assert made.answer(question, found) == {0: [4, 5]}
    assert made.hosts == [{0, 1}, {0, 2}, {3}] and made.moving == 2
    assert made.question([0, 0, 0], [100] * 3) is None  # they still move
    assert made.destination(made.orders[4]) == 1
    assert made.died(1) == [] and made.destination(made.orders[4]) == 0
    assert set().union(*made.hosts) == {0, 1, 2, 3}  # c, which lived there alone, has another home
    assert made.answer(question, found) == {}  # too late


def test_the_base_model_s_requests_move_and_take_no_slot() -> None:
    made = control(hosts=({0, 1}, {2, 3}))
    for i in range(6):
        made.take(job(i, "a"))
    made.take(job(6, None))
    question = made.question([0, 0], [100] * 2)
    assert question is not None and question.program.slots == [3, 3]
    assert all(BASE in hosted for hosted in question.program.hosted)
    found = ilp.solve(question.program)
    assert found is not None and all(len(hosted - {BASE}) <= 3 for hosted in found.hosted)


def test_memory_comes_before_load() -> None:
    made = control()
    for i in range(6):
        made.take(job(i, "a"))
    question = made.question([10, 95], [100, 100])
    assert question is not None and list(question.engines) == [0, 1]
    assert control().question([10, 80], [100, 100]) is None


def test_execution_times_are_learnt() -> None:
    made = control()
    for seconds in (1.0, 3.0):
        order = made.take(job(int(seconds)))
        order.executed_s = seconds
        made.finished(order)
    assert made.execution_s(0) == 2.0 and made.execution_s(1) == EXECUTION_S


# ---- the manager, with pretended replicas


def token(sequence: list[int]) -> int:
    return (sum(sequence) * 31 + len(sequence)) % 97


def answer_of(asked: Job) -> list[int]:
    sequence = asked.prompt.tolist()
    for _ in range(asked.max_tokens):
        sequence.append(token(sequence))
    return sequence[len(asked.prompt) :]


class Pretended:
    """A replica that does what it is told when it is let, and whose reports wait until somebody hears them."""

    def __init__(self) -> None:
        self.told: deque = deque()
        self.reports: deque = deque()
        self.jobs: dict[int, tuple[Job, list[int]]] = {}
        self.hosts: list[str] = []
        self.fault: InputError | None = None

    def send(self, command: object) -> None:
        self.told.append(command)

    def work(self) -> None:
        """Take in everything, then one token each."""
        while self.told:
            match command := self.told.popleft():
                case Job():
                    assert command.index not in self.jobs
                    self.jobs[command.index] = command, command.prompt.tolist()
                case Abort(index):
                    self.jobs.pop(index, None)
                case Withdraw(indices):
                    self.reports.append(Withdrawn(tuple((i, 0.5) for i in indices if self.jobs.pop(i, None))))
                case Host(adapters):
                    self.hosts += adapters
                case LoadAdapter() | UnloadAdapter():
                    self.reports.append(Done(command.ticket, self.fault))
        tokens = []
        for index, (asked, sequence) in list(self.jobs.items()):
            sequence.append(token(sequence))
            end = "length" if len(sequence) - len(asked.prompt) == asked.max_tokens else None
            tokens.append((index, sequence[-1], end))
            if end:
                self.reports.append(Spent(((index, 1.0),)))
                del self.jobs[index]
        if tokens:
            self.reports.append(Progress(Load(running=len(self.jobs)), tokens))


class Solving:
    ready = True

    def __init__(self) -> None:
        self.ended: str | None = None
        self.asked: list[Ask] = []
        self.restarts = 0

    def ask(self, question: Ask) -> None:
        self.asked.append(question)

    def restart(self) -> None:
        self.restarts += 1


class World:
    """A manager, its replicas, and the client's view: tokens and ends as they were told."""

    def __init__(self, hosts=({0, 1}, {2, 3}, {0, 3}), kind: str = "dlora") -> None:
        self.now_s = 0.0
        self.replicas = [Pretended() for _ in hosts]
        self.solver = Solving()
        self.told: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.done: list[Done] = []
        self.load = Load()
        self.manager = Manager(
            control(kind, hosts), self.replicas, [100] * len(hosts), self._hear, self.solver, lambda: self.now_s
        )

    def _hear(self, report: object) -> None:
        if isinstance(report, Done):
            self.done.append(report)
            return
        assert isinstance(report, Progress)
        self.load = report.load
        for index, one, end in report.tokens:
            assert index not in self.ends, "a token after the end"
            self.told.setdefault(index, []).append(one)
            if end:
                self.ends[index] = end

    def deliver(self, replica: int, most: int = 1000) -> None:
        reports = self.replicas[replica].reports
        while reports and most:
            self.manager.handle(replica, reports.popleft())
            most -= 1

    def kill(self, replica: int) -> None:
        self.replicas[replica].reports.clear()
        self.replicas[replica].told.clear()
        self.replicas[replica].jobs.clear()
        self.manager.handle(replica, Ended("killed"))

    def look(self) -> Ask | None:
        self.now_s += 1.0
        before = len(self.solver.asked)
        self.manager.look()
        return self.solver.asked[-1] if len(self.solver.asked) > before else None

    def number(self, name: str, label: str = "") -> float:
        return next(family.samples[label] for family in self.load.more if family.name == f"dlora_{name}")

    def finish(self) -> None:
        for _ in range(200):
            if not self.manager.control.orders:
                return
            for replica, alive in enumerate(self.manager.control.alive):
                if alive:
                    self.replicas[replica].work()
                    self.deliver(replica)
        raise AssertionError("somebody never ends")


def answered(ask: Ask, draw) -> Answer:
    """Anything that the solver could say."""
    count = len(ask.program.slots)
    engines = [draw(item, count) for item in ask.program.items]
    hosted = [set(have) for have in ask.program.hosted]
    for item, engine in zip(ask.program.items, engines, strict=True):
        hosted[engine].add(item.adapter)
    return Answer(ask.ticket, ilp.Assignment(engines, [frozenset(h) for h in hosted], 1.0))


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "work", "work", "deliver", "deliver", "look", "answer", "abort", "kill"]),
        st.integers(0, 1 << 20),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.sampled_from(["dlora", "dlora", "proactive", "round_robin", "none"]))
def test_whatever_happens_each_token_is_told_once_and_in_order(actions, kind: str) -> None:
    world, jobs, gone, asked = World(kind=kind), {}, set(), None
    for what, number in actions:
        alive = [r for r, lives in enumerate(world.manager.control.alive) if lives]
        replica = alive[number % len(alive)]
        if what == "submit":
            for _ in range(1 + number % 5):
                mine = jobs[len(jobs)] = job(len(jobs), [*NAMES, None][number % 5], 1 + number % 7, 1 + number % 4)
                world.manager.handle(HTTP, mine)
        elif what == "work":
            world.replicas[replica].work()
        elif what == "deliver":
            world.deliver(replica, 1 + number % 3)
        elif what == "look":
            asked = world.look() or asked
        elif what == "answer" and asked is not None:
            world.manager.handle(
                SOLVER, answered(asked, lambda item, count, n=number: (item.adapter * 7 + item.engine + n) % count)
            )
            asked = None
        elif what == "abort" and jobs and (index := number % len(jobs)) not in world.ends:
            world.manager.handle(HTTP, Abort(index))
            gone.add(index)
        elif what == "kill" and len(alive) > 1:
            world.kill(replica)
    world.finish()
    for index, mine in jobs.items():
        told, whole = world.told.get(index, []), answer_of(mine)
        assert told == (whole[: len(told)] if index in gone else whole)
        assert (index in world.ends) == (index not in gone)
    for replica in world.replicas:
        replica.work()
        assert not replica.jobs  # nobody works for a client who has gone
    assert all(world.manager.control.outstanding(r) == 0 for r in range(3)) and world.manager.control.moving == 0


def overloaded() -> tuple[World, Ask]:
    """Two replicas, six requests of one adapter at the first, which have a token each; the question that follows."""
    world = World(hosts=({0, 1}, {2, 3}))
    for i in range(6):
        world.manager.handle(HTTP, job(i, "a"))
    world.replicas[0].work()
    world.deliver(0)
    ask = world.look()
    assert ask is not None
    return world, ask


def test_requests_move_with_what_they_have() -> None:
    world, ask = overloaded()
    world.manager.handle(SOLVER, answered(ask, lambda item, count: 1))
    assert list(world.replicas[1].told) == [Host(("a",))]
    world.replicas[1].told.clear()
    world.replicas[0].work()
    assert not world.replicas[0].jobs and not world.replicas[1].told
    world.deliver(0)
    moved = [command for command in world.replicas[1].told if isinstance(command, Job)]
    assert [len(command.prompt) for command in moved] == [4] * 6 and {command.max_tokens for command in moved} == {3}
    world.finish()
    assert world.told == {i: answer_of(job(i)) for i in range(6)}
    assert (world.number("requests_moved_total"), world.number("solves_total")) == (6, 1)
    assert world.manager.control.execution_s(0) == 1.5  # both parts of it


@pytest.mark.parametrize("dies", [0, 1])
def test_a_replica_dies_while_requests_move(dies: int, capsys) -> None:
    """The source: they never answer, and go on elsewhere. The destination: they go on where they are."""
    world, ask = overloaded()
    world.manager.handle(SOLVER, answered(ask, lambda item, count: 1))
    assert world.manager.control.moving == 6
    world.kill(dies)
    assert world.number("replicas_alive") == 1 and world.number("replica_deaths_total") == 1
    world.finish()
    assert world.told == {i: answer_of(job(i)) for i in range(6)} and len(world.ends) == 6
    assert "replica" in capsys.readouterr().err
    order = [command.index for command in world.replicas[1 - dies].told if isinstance(command, Job)]
    assert order == sorted(order)
    with pytest.raises(NobodyLeftError):
        world.kill(1 - dies)


def test_a_solver_that_takes_too_long_is_replaced_and_serving_goes_on() -> None:
    world, ask = overloaded()
    assert world.look() is None and not world.solver.restarts  # it has half a second more than the limit
    assert world.manager.until_look_s() == 0.5
    world.now_s += 0.5
    world.manager.look()
    assert world.solver.restarts == 1 and world.manager.totals.timeouts == 1
    world.manager.handle(SOLVER, answered(ask, lambda item, count: 1))  # too late: nobody asks any more
    assert world.manager.control.moving == 0
    ask = world.look()
    assert ask is not None
    world.manager.handle(SOLVER, Answer(ask.ticket, None))  # nothing found within the limit
    assert world.manager.totals.timeouts == 2
    world.finish()
    assert world.told == {i: answer_of(job(i)) for i in range(6)}


def test_a_solver_that_died_is_replaced() -> None:
    world, _ = overloaded()
    world.now_s += 2.0
    world.manager.look()
    world.solver.ended = "killed"
    world.look()
    assert world.solver.restarts >= 2


def test_nothing_is_asked_where_nobody_is_overloaded() -> None:
    world = World()
    assert world.manager.until_look_s() is None  # and nobody waits for nothing
    world.manager.handle(HTTP, job(0))
    assert world.look() is None and world.manager.until_look_s() == 1.0


def test_adapters_come_and_go_everywhere(tmp_path) -> None:
    world = World(hosts=({0, 1}, {2}, {3}))
    world.manager.handle(HTTP, LoadAdapter(5, "e", tmp_path))
    for replica in range(2):
        world.replicas[replica].work()
        world.deliver(replica)
    assert not world.done
    world.kill(2)  # who has not answered cannot hold it up
    assert world.done == [Done(5)]
    assert [4 in hosted for hosted in world.manager.control.hosts] == [True, False, False]
    world.manager.handle(HTTP, job(0, "e"))
    assert world.replicas[0].told[-1].adapter == "e"
    world.finish()
    world.manager.handle(HTTP, UnloadAdapter(6, "e"))
    for replica in range(2):
        world.replicas[replica].work()
        world.deliver(replica)
    assert world.done[-1] == Done(6) and not any(4 in hosted for hosted in world.manager.control.hosts)


def test_an_adapter_that_one_replica_refuses_is_nowhere(tmp_path) -> None:
    world = World()
    world.replicas[1].fault = InputError("adapter e", "rank", 99, "too high")
    world.manager.handle(HTTP, LoadAdapter(5, "e", tmp_path))
    for replica in range(3):
        world.replicas[replica].work()
        world.deliver(replica)
    assert world.done == [Done(5, world.replicas[1].fault)]
    assert [[type(c) for c in replica.told] for replica in world.replicas] == [[UnloadAdapter], [], [UnloadAdapter]]
    assert all(4 not in hosted for hosted in world.manager.control.hosts)
    for replica in range(3):  # and what they say to that nobody hears
        world.replicas[replica].work()
        world.deliver(replica)
    assert len(world.done) == 1


# ---- the file


def write(root, **changes):
    for name in ("billing", "legal"):
        (root / name).mkdir(exist_ok=True)
        (root / name / "adapter_config.json").write_text("{}")
    values = {"model": "tiny", "random_weights": True, "adapters": {"billing": "billing", "legal": "legal"}, **changes}
    made = root / "servers.yaml"
    made.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return made


def test_a_file_s_defaults_are_dlora_s(tmp_path) -> None:
    made = read(write(tmp_path, replicas=2))
    assert (made.migration_kind, made.policy, made.migrates) == ("dlora", None, True)
    assert made.adapters["legal"] == tmp_path / "legal" and made.hosts() == [{0, 1}, {0, 1}]
    assert not read(write(tmp_path)).migrates
    assert read(write(tmp_path, exec_type="peft", replicas=2)).migration_kind == "none"
    both = read(write(tmp_path, tensor_parallel_size=2, replicas=2, policy="fcfs"))
    assert both.migration_kind == "none" and both.for_common_engine().max_adapters == 8
    assert [both.devices(i, None) for i in (0, 1)] == [["0", "1"], ["2", "3"]]
    assert both.devices(1, "7,5,3,1") == ["3", "1"]
    with pytest.raises(InputError, match="show more GPUs"):
        both.devices(1, "0")
    assert read(write(tmp_path, device="cpu")).devices(0, None) == []
    assert read(write(tmp_path, random_adapters=2)).names == ["billing", "legal", "adapter-0", "adapter-1"]


@pytest.mark.parametrize(("changes", "told"), [
    ({"policy": "fair"}, "credit"),
    ({"exec_type": "vllm"}, "baseline of the simulator"),
    ({"exec_type": "peft", "policy": "credit"}, "is of exec_type lora"),
    ({"exec_type": "peft", "migration_type": "dlora"}, "is of exec_type lora"),
    ({"exec_type": "peft", "tensor_parallel_size": 2}, "write 1"),
    ({"migration_type": "dispatch"}, "round_robin"),
    ({"migration": {"copy_kv": True}}, "Extra inputs"),
    ({"migration": {"interval_s": 0}}, "greater than 0"),
    ({"tensor_parallel_size": 2}, "one GPU"),
    ({"tensor_parallel_size": 2, "policy": "fcfs", "migration_type": "dlora"}, "one GPU"),
    ({"machines": ["node1"]}, "write localhost"),
    ({"adapters": {"lost": "nowhere"}}, "name a PEFT adapter's folder"),
    ({"adapters": {}}, "give at least one"),
    ({"adapters": {"tiny": "legal"}}, "choose another name"),
    ({"adapters": {"adapter-0": "legal"}, "random_adapters": 2}, "choose another name"),
    ({"random_adapters": 2, "tensor_parallel_size": 2, "policy": "fcfs"}, "name folders"),
    ({"slots": 1}, "raise slots or replicas"),
    ({"max_model_len": 8192}, "prompts run whole"),
    ({"max_num_seqs": 8192}, "every request of a batch"),
    ({"random_weights": None}, "give either weights"),
    ({"weights": "nowhere", "random_weights": None}, "no such folder"),
    ({"tokenizer": "nowhere"}, "no such folder"),
    ({"model": "tinny"}, "tiny"),
    ({"groups": 3}, "Extra inputs"),
])  # fmt: skip
def test_files_that_cannot_be_served(tmp_path, capsys, changes, told: str) -> None:
    from systems.dlora.server import main

    made = write(tmp_path, **changes)
    with pytest.raises(InputError, match=told):
        read(made)
    assert main([str(made)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_no_file_at_all(tmp_path, capsys) -> None:
    from systems.dlora.server import main

    assert main([str(tmp_path / "none.yaml")]) == 2
    for text in ("- a list", "{unclosed", "\x00"):
        (tmp_path / "bad.yaml").write_text(text)
        assert main([str(tmp_path / "bad.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 4
    assert main(["--help"]) == 0 and main([]) == 2
    assert "start_server.sh" in capsys.readouterr().out
