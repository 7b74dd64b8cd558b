"""The configuration search on made-up estimates: SLO, accuracy, best effort, refusals, and models added by a file."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.maveriq.configuration import Configuration, Estimates, ModelFacts, known_models
from systems.maveriq.intents import INTENTS
from systems.maveriq.models import Support, load_support
from systems.maveriq.placement import GpuState
from systems.maveriq.search import Decision, Refusal, Search, Wish, degrees

NODE = [GpuState(place, 48.0, 0.5) for place in range(8)]
PRECISIONS = (("float16", False), ("int8", False), ("int4", False))


class Made:
    """An estimator of simple laws: TP makes faster and costs memory, low precision is small and fast."""

    models = ("m",)

    def __init__(self, gib=30.0, latency=2.0):
        self.gib, self.latency, self.asked = gib, latency, 0

    def precisions(self, model):
        if model != "m":
            raise InputError("fingerprints", "Model", model, "fingerprinted are m")
        return PRECISIONS

    def one(self, c):
        share = {"float16": 1.0, "int8": 0.5, "int4": 0.25}[c.dtype]
        return self.latency * share / c.tp**0.5, self.gib * share * (1 + 0.1 * (c.tp - 1))

    def estimate_many(self, questions):
        self.asked += 1
        latency, memory = np.array([self.one(question.configuration) for question in questions]).T
        nan = np.full(len(questions), math.nan)
        return Estimates(latency, nan, nan, memory, nan, nan)


FACTS = {"m": ModelFacts("m", 32, 4096)}
TABLE = Support((), {"m": {("float16", False): 100.0, ("int8", False): 99.0, ("int4", False): 90.0}})


def search(support=TABLE, **laws):
    return Search(Made(**laws), FACTS, support)


def decided(wish, node=NODE, **laws):
    found = search(**laws).decide(wish, node)
    assert isinstance(found, Decision), found
    return found


def test_the_number_of_configurations_is_the_authors():
    facts, support = known_models(), load_support()
    llama = (*((dtype, kv) for dtype in ("float16", "int8", "int4") for kv in (False, True)), ("int4_gptq", False))

    class All(Made):
        def precisions(self, model):
            return llama if model.startswith("llama") else PRECISIONS

    found = Search(All(), facts, support)
    theirs = {"falcon-7b": 24, "falcon-40b": 44, "gptj-6b": 45, "llama-2-7b": 98, "llama-2-13b": 104, "llama-2-70b": 97}
    assert {model: len(found.configurations(model, 8)) for model in theirs} == theirs


def test_degrees_divide_the_hidden_size():
    assert degrees(ModelFacts("a", 1, 5120), 8) == (1, 2, 4, 5, 8)
    assert degrees(ModelFacts("a", 1, 4544, tensor_parallel=False), 8) == (1,)


def test_each_intent_minimises_its_own_cost():
    assert decided(Wish("m", "min_lat")).configuration == Configuration(8, 1, "int4")
    assert decided(Wish("m", "min_mem")).configuration == Configuration(1, 1, "int4")
    assert decided(Wish("m", "min_gpu_cost")).configuration == Configuration(1, 1, "int4")
    cheapest = decided(Wish("m", "min_cost"))
    every = [Made().one(c) for c in search().configurations("m", 8)]
    assert cheapest.cost == pytest.approx(min(latency * memory for latency, memory in every))


@settings(deadline=None)
@given(st.sampled_from(sorted(INTENTS)), st.floats(0.05, 3), st.floats(0, 100), st.booleans())
def test_a_decision_keeps_what_was_asked_or_says_that_it_does_not(intent, slo, accuracy, fp16):
    found = search().decide(Wish("m", intent, slo, accuracy, fp16), NODE)
    assert isinstance(found, Decision)
    assert TABLE.accuracy["m"][found.configuration.precision] >= accuracy
    assert not fp16 or found.configuration.dtype == "float16"
    assert (found.estimate.latency_s < slo) == (not found.best_effort)
    if found.best_effort:  # the fastest there is
        free = search().decide(Wish("m", "min_lat", 0.0, accuracy, fp16), NODE)
        assert found.estimate.latency_s == free.estimate.latency_s


def test_the_slo_is_strict():
    fastest = decided(Wish("m", "min_lat")).estimate.latency_s
    assert decided(Wish("m", "min_cost", slo_s=fastest)).best_effort
    assert not decided(Wish("m", "min_cost", slo_s=fastest * 1.001)).best_effort


def test_what_fits_nowhere_is_refused_with_the_reason():
    found = search(gib=4000.0).decide(Wish("m"), NODE)
    assert isinstance(found, Refusal)
    assert found.reason.startswith("out of memory: the smallest of ") and "GPUs have room for" in found.reason


def test_a_full_node_refuses_and_a_fragmented_one_bends_the_map():
    full = [GpuState(place, 48.0, 48.0) for place in range(8)]
    assert isinstance(search().decide(Wish("m"), full), Refusal)
    bits = [GpuState(0, 48.0, 48.0 - 6.0), GpuState(1, 48.0, 48.0 - 3.0)]
    found = decided(Wish("m", "min_mem"), bits)
    assert found.configuration == Configuration(1, 2, "int4")
    assert found.placement.pp_map == (20, 12) and found.placement.gpus == (0, 1)


def test_an_accuracy_that_nothing_keeps_is_refused_and_a_missing_table_is_an_error():
    found = search().decide(Wish("m", accuracy=101), NODE)
    assert isinstance(found, Refusal) and "accuracy of at least 101 %" in found.reason
    with pytest.raises(InputError, match="accuracy table: model: 'm': add it under `accuracy`"):
        search(Support()).decide(Wish("m", accuracy=90), NODE)


def test_estimates_that_mean_nothing_are_dropped():
    class Half(Made):
        def one(self, c):
            latency, memory = super().one(c)
            return (-1.0 if c.dtype == "int4" else latency), (math.nan if c.dtype == "int8" else memory)

    found = Search(Half(), FACTS, TABLE).decide(Wish("m", "min_mem"), NODE)
    assert isinstance(found, Decision) and found.configuration.dtype == "float16"


@pytest.mark.parametrize(
    ("wish", "key"),
    [
        (Wish("m", "cheap"), "intent"),
        (Wish("m", strategy="best"), "strategy"),
        (Wish("m", batch=0), "batch"),
        (Wish("m", output_length=0), "output_length"),
        (Wish("m", slo_s=math.nan), "slo"),
        (Wish("m", accuracy=-1), "accuracy"),
        (Wish("n"), "Model"),
    ],
)
def test_a_wish_that_means_nothing_is_one_line(wish, key):
    with pytest.raises(InputError, match=f": {key}: ") as error:
        search().decide(wish, NODE)
    assert "\n" not in str(error.value)


def test_estimates_are_asked_for_once():
    found = search()
    for used in range(20):
        found.deploy(Wish("m", "min_lat"), [GpuState(place, 48.0, float(used)) for place in range(8)])
    assert found.estimator.asked == 1


def test_gpt_j_has_an_accuracy():  # misspelled in the artifact's table
    assert load_support().accuracy_of("gptj-6b")["int4", False] == 96.4
    assert load_support().accuracy_of("llama-2-70b")["int8", True] == 98.8


def test_a_model_is_added_by_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "models: {m: {layers: 24, hidden: 2048}}\n"
        "unsupported: [{model: m, dtype: int4, reason: no kernel}]\n"
        "accuracy: {m: {int8: 99.5, int8_kv: {int8: 99.0}}}\n"
    )
    facts, support = known_models(file), load_support(file)
    found = Search(Made(), facts, support)
    assert {c.dtype for c in found.configurations("m", 8)} == {"float16", "int8"}
    assert support.accuracy_of("m")["int8", True] == 99.0
    assert support.accuracy_of("gptj-6b")  # the built-in ones stay


@pytest.mark.parametrize(
    "text",
    [
        "unsupported: [{modle: m, reason: x}]",
        "accuracy: {m: {int3: 99}}",
        "accuracy: {m: {int8: 300}}",
        "accuracy: {m: {int8: high}}",
        "- a list",
        "a: [",
        "typo: 1",
    ],
)
def test_a_bad_models_file_is_one_line(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load_support(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
