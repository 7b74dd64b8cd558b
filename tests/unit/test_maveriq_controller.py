"""The controller's pure parts: queues, state machine, words of the command line, bookkeeping of memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.maveriq.configuration import Configuration, Estimate
from systems.maveriq.controller.commands import Deploy, Inference, Register, Remove, parse
from systems.maveriq.controller.core import READY, Core, Deployment
from systems.maveriq.controller.memory import Budgets, Nvml
from systems.maveriq.controller.queues import QUEUES, GlobalQueue, ModelQueues, Queued
from systems.maveriq.placement import GpuState, Placement
from systems.maveriq.search import Decision, Refusal, Wish

NODE = [GpuState(place, 48.0, 0.0) for place in range(4)]


class Fixed:
    """A search that places on the GPUs that the model's name lists: `m01` on GPUs 0 and 1; `big` nowhere."""

    def deploy(self, wish, _gpus):
        if wish.model == "big":
            return Refusal(wish, "out of memory")
        gpus = tuple(int(digit) for digit in wish.model[1:])
        placement = Placement((1,) * len(gpus), gpus, (10.0,) * len(gpus))
        estimate = Estimate(1.0, math.nan, math.nan, 10.0, math.nan, math.nan)
        return Decision(wish, Configuration(1, len(gpus)), placement, estimate, 1.0, False, 1, 1)


def core(queue="global", **models):
    found = Core(Fixed(), QUEUES[queue]())
    for name, model in models.items():
        assert isinstance(found.deploy(name, Wish(model), NODE), Deployment)
        found.ready(name)
    return found


def sent(found):
    """Everything that can be sent now, by deployment."""
    tickets = []
    while (ticket := found.take()) is not None:
        tickets.append(ticket)
    return tickets


def names(tickets):
    return [ticket.deployment for ticket in tickets]


class TestQueues:
    def test_one_queue_for_all_holds_up_those_behind(self):
        found = core("global", a="m0", b="m1")
        for name in "aab":
            found.submit(name, "x")
        assert names(sent(found)) == ["a"]  # the second a waits for GPU 0, and b waits for it

    def test_a_queue_per_model_lets_idle_gpus_work(self):
        found = core("per_model", a="m0", b="m1")
        for name in "aab":
            found.submit(name, "x")
        assert names(sent(found)) == ["a", "b"]

    def test_a_younger_request_never_makes_an_older_one_wait(self):
        found = core("per_model", small="m0", large="m01")
        found.submit("small", "1")
        (running,) = sent(found)
        found.submit("large", "2")
        found.submit("small", "3")
        found.answered(running.number)
        assert names(sent(found)) == ["large"]  # not small again, although it comes first by name and GPU

    @pytest.mark.parametrize("queue", list(QUEUES))
    def test_prior_requests_go_first(self, queue):
        found = core(queue, a="m0", b="m0")
        found.submit("a", "1")
        found.submit("b", "2", front=True)
        assert names(sent(found)) == ["b"]

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40), st.sampled_from(sorted(QUEUES)))
    def test_nothing_is_lost_or_doubled_and_a_gpu_runs_one_at_a_time(self, asked, queue):
        found = core(queue, a="m0", b="m01", c="m23")
        gpus = {name: set(found.deployments[name].gpus) for name in "abc"}
        numbers = [found.submit(name, "x", front).number for name, front in asked]
        done = []
        while len(found.queue) or found.running():
            running = sent(found) or []
            assert len({gpu for name in found.running() for gpu in gpus[name]}) == sum(
                len(gpus[name]) for name in found.running()
            )
            assert running or found.running()
            first = next(iter(found.running().values()))
            found.answered(first)
            done.append(first)
        assert sorted(done) == numbers

    @settings(deadline=None)
    @given(st.lists(st.sampled_from("abc"), max_size=30), st.sampled_from([GlobalQueue, ModelQueues]))
    def test_drop_takes_all_of_one_and_keeps_the_order_of_the_rest(self, asked, kind):
        queue = kind()
        for number, name in enumerate(asked):
            queue.push(Queued(number, name))
        assert [one.number for one in queue.drop("a")] == [place for place, name in enumerate(asked) if name == "a"]
        assert [one.number for one in queue] == [place for place, name in enumerate(asked) if name != "a"]
        assert len(queue) == sum(name != "a" for name in asked)


class TestCore:
    def test_a_name_is_taken_once(self):
        found = core(a="m0")
        with pytest.raises(InputError, match="controller: id: 'a': is deployed already"):
            found.deploy("a", Wish("m1"), NODE)
        with pytest.raises(InputError, match="without spaces"):
            found.deploy("a b", Wish("m1"), NODE)

    def test_a_refusal_reserves_nothing(self):
        found = core()
        assert isinstance(found.deploy("a", Wish("big"), NODE), Refusal)
        assert not found.deployments

    def test_what_is_not_deployed_can_do_nothing(self):
        found = core()
        for act in (lambda: found.submit("a", "x"), lambda: found.remove("a")):
            with pytest.raises(
                InputError, match=r"controller: id: 'a': is not deployed: deploy it first \(deployed: nothing\)"
            ):
                act()

    @pytest.mark.parametrize("queue", list(QUEUES))
    def test_a_model_that_loads_waits_and_then_serves(self, queue):
        found = core(queue)
        found.deploy("a", Wish("m0"), NODE)
        found.submit("a", "x")
        assert sent(found) == []
        found.ready("a")
        assert names(sent(found)) == ["a"]

    def test_a_death_retries_once_at_the_front_and_then_fails_that_request_alone(self):
        found = core(a="m0", b="m1")
        first, later = found.submit("a", "bad"), found.submit("a", "good")
        sent(found)
        death = found.died("a", "gone")
        assert death.restart and [one.number for one in death.retried] == [first.number] and not death.failed
        assert found.deployments["b"].state == READY
        found.ready("a")
        assert [one.number for one in sent(found)] == [first.number]
        death = found.died("a", "gone")
        assert death.restart and [one.number for one in death.failed] == [first.number] and "tried 2 times" in death.reason
        found.ready("a")
        assert [one.number for one in sent(found)] == [later.number]

    def test_an_engine_that_will_not_start_is_given_up_and_its_gpus_are_free(self):
        found = core(b="m0")
        found.deploy("a", Wish("m0"), NODE)
        waiting = found.submit("a", "x")
        assert found.died("a", "no").restart
        death = found.died("a", "no")
        assert not death.restart and death.failed == (waiting,) and "given up" in death.reason
        assert "a" not in found.deployments
        found.submit("b", "x")
        assert names(sent(found)) == ["b"]

    def test_removal_fails_what_waits_and_what_runs_and_frees_the_gpus(self):
        found = core(a="m0", b="m0")
        numbers = {found.submit("a", str(place)).number for place in range(50)}
        sent(found)
        found.submit("b", "x")
        assert {one.number for one in found.remove("a")} == numbers
        assert names(sent(found)) == ["b"]

    def test_waiting_is_counted(self):
        found = core(a="m0", b="m1")
        for name in "aaab":
            found.submit(name, "x")
        sent(found)
        assert found.waiting() == {"a": 2, "b": 1}


class TestWords:
    def test_both_orders_mean_the_same(self):
        wish = Wish("llama-2-7b", "min_lat", 2.5, 99.0, True, 4, 20, "hybrid")
        for line in (
            "deploy a llama-2-7b 20 min_lat 2.5 yes hybrid 4 99",
            "a deploy llama-2-7b 20 min_lat 2.5 yes hybrid 4 99",
        ):
            assert parse(line) == Deploy("a", wish)
        assert parse("1 inference what is it? ") == Inference("1", "what is it? ", False)
        assert parse("prior_inference 1 now") == Inference("1", "now", True)
        assert parse("1 remove") == parse("remove 1") == Remove("1")
        assert isinstance(parse("register llama-2-7b prints.csv"), Register)

    def test_what_is_left_out_has_the_artifacts_default(self):
        assert parse("a deploy m 20 min_cost") == Deploy("a", Wish("m", "min_cost", output_length=20))
        assert parse("a deploy m 20 min_cost 0 0 None") == Deploy("a", Wish("m", "min_cost", output_length=20, strategy="none"))

    @pytest.mark.parametrize(
        "line",
        [
            "", "hello", "a hello b", "deploy", "deploy a", "deploy a m", "deploy a m 20", "deploy a m x min_cost",
            "deploy a m 20 cheap", "deploy a m 20 min_cost soon", "deploy a m 0 min_cost", "deploy a m 20 min_cost 0 0 best",
            "deploy a m 20 min_cost 0 0 llf 0", "deploy a m 20 min_cost 0 0 llf 1 0 extra", "inference a",
            "remove", "remove a b", "register",
        ],
    )  # fmt: skip
    def test_a_wrong_line_is_one_line_back(self, line):
        with pytest.raises(InputError) as error:
            parse(line)
        assert "\n" not in str(error.value)


class TestMemory:
    def test_budgets_are_charged_and_released(self):
        memory = Budgets((48.0, 48.0), (0.5, 0.5), device=(0, 0))
        memory.charge("a", Placement((1, 1), (1, 0), (10.0, 4.0)))
        assert [gpu.used_gib for gpu in memory.states(lambda gpu: gpu / 10)] == [4.5, 10.5]
        assert [gpu.busy for gpu in memory.states(lambda gpu: gpu / 10)] == [0, 0.1]
        assert memory.devices((1, 0)) == (0, 0)
        memory.release("a")
        assert [gpu.used_gib for gpu in memory.states(lambda _gpu: 0.0)] == [0.5, 0.5]

    def test_a_load_in_flight_counts_until_nvml_sees_it(self, tmp_path):
        smi = tmp_path / "nvidia-smi"
        smi.write_text(
            "#!/bin/sh\n"
            'case "$1" in *gpu=*) echo "0, 49140, 1024"; echo "1, 49140, 0" ;;\n'
            '*) echo "7, 512"; echo "7, 512"; echo "8, [N/A]" ;; esac\n'
        )
        smi.chmod(0o755)
        memory = Nvml(str(smi))
        memory.charge("a", Placement((1,), (1,), (10.0,)))
        assert [gpu.used_gib for gpu in memory.states(lambda _gpu: 0.0)] == [1.0, 10.0]
        memory.settled("a")
        assert [gpu.used_gib for gpu in memory.states(lambda _gpu: 0.0)] == [1.0, 0.0]
        assert memory.processes_gib() == {7: 1.0}

    def test_no_gpus_is_one_line(self, tmp_path):
        with pytest.raises(InputError, match="use --gpu-total-gib for virtual GPUs") as error:
            Nvml(str(tmp_path / "absent")).states(lambda _gpu: 0.0)
        assert "\n" not in str(error.value)
