"""From a decision to an engine's command, and the nodes of the controller's trial."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.maveriq.configuration import Configuration, Estimate
from systems.maveriq.controller import trial_node
from systems.maveriq.controller.core import Core, Deployment
from systems.maveriq.controller.engines import session
from systems.maveriq.controller.launch import scaled, serving
from systems.maveriq.controller.library import Library
from systems.maveriq.placement import Placement
from systems.maveriq.search import Decision, Wish
from tests.unit.test_maveriq_decide import fingerprints


def deployment(tp=1, pp_map=(32,), dtype="float16", int8_kv=False, model="llama-2-7b", **wish):
    parts = tp * len(pp_map)
    placement = Placement(tuple(pp_map), tuple(range(parts)), (1.0,) * parts)
    estimate = Estimate(1.0, math.nan, math.nan, 10.0, math.nan, math.nan)
    configuration = Configuration(tp, len(pp_map), dtype, int8_kv)
    return Deployment("a", Decision(Wish(model, **wish), configuration, placement, estimate, 1.0, False, 1, 1))


def options(launch):
    """The command's options, the last of each."""
    words = launch.argv
    return {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 100))
def test_a_scaled_map_keeps_every_stage_and_every_layer(pp_map, layers):
    found = scaled(pp_map, layers)
    assert sum(found) == layers
    assert len(found) == min(len(pp_map), layers)
    assert min(found) >= 1


def test_a_scaled_map_keeps_shares():
    assert scaled((20, 12), 32) == (20, 12)
    assert scaled((20, 12), 16) == (10, 6)
    assert scaled((31, 1), 4) == (3, 1)


def test_what_was_decided_is_what_runs():
    launch = serving()(deployment(2, (20, 12), "int4"), (3, 1, 2, 0))
    told = options(launch)
    assert (told["--model"], told["--tensor-parallel-size"], told["--pipeline-layers"]) == ("llama-2-7b", "2", "20,12")
    assert told["--quantization"] == "int4"
    assert launch.devices == (3, 1, 2, 0)  # rank r on the GPU of part r
    assert launch.differs == ()
    assert not {"--quantization", "--kv-dtype"} & set(serving()(deployment(), ()).argv)
    assert options(serving()(deployment(dtype="int8", int8_kv=True), ()))["--kv-dtype"] == "int8"


def test_an_engine_has_room_for_its_requests_and_no_more():
    told = options(serving()(deployment(batch=3, output_length=100), (0,)))
    assert int(told["--max-model-len"]) >= 923 + 100
    assert int(told["--kv-blocks"]) * 16 >= 3 * int(told["--max-model-len"])
    assert told["--max-num-seqs"] == "3"
    assert options(serving(options=("--kv-blocks", "7"))(deployment(), (0,)))["--kv-blocks"] == "7"


@pytest.mark.parametrize(
    ("decided", "devices", "shape", "tp", "layers", "kept", "words"),
    [
        ({"tp": 2}, (0, 0), "model", "1", "32", (0,), "its GPUs are one device"),
        ({"pp_map": (20, 12)}, (1, 1), "model", "1", "32", (1,), "its GPUs are one device"),
        ({"pp_map": (20, 12)}, (0, 1), "tiny", "1", "1,1", (0, 1), "of another shape"),
        ({"tp": 8}, range(8), "tiny", "4", "2", (0, 1, 2, 3), "run as TP 4"),
        ({"tp": 2, "dtype": "int4"}, (0, 1), "tiny", "1", "2", (0,), "run as TP 1"),
        ({"dtype": "int4_gptq"}, (0,), "model", "1", "32", (0,), "not GPTQ"),
    ],
)
def test_what_is_not_as_decided_is_said(decided, devices, shape, tp, layers, kept, words):
    launch = serving(shape)(deployment(**decided), tuple(devices))
    told = options(launch)
    assert (told["--tensor-parallel-size"], told["--pipeline-layers"], launch.devices) == (tp, layers, kept)
    assert words in " ".join(launch.differs)


def test_one_rank_where_it_is_asked_for():
    launch = serving(one_rank=True)(deployment(2, (20, 12)), ())
    assert options(launch)["--pipeline-layers"] == "32"
    assert launch.differs == ("4 ranks run as one: engines run on one rank each",)


def test_weights_from_a_folder(tmp_path):
    (tmp_path / "llama-2-7b").mkdir()
    (tmp_path / "llama-2-7b" / "config.json").write_text(json.dumps({"num_hidden_layers": 16}))
    launch = serving(weights=tmp_path)(deployment(pp_map=(20, 12)), ())
    assert options(launch)["--weights"] == str(tmp_path / "llama-2-7b")
    assert options(launch)["--pipeline-layers"] == "10,6"
    assert "--random-weights" not in launch.argv
    absent = serving(weights=tmp_path)(deployment(pp_map=(20, 20), model="llama-2-13b"), ())
    assert options(absent)["--pipeline-layers"] == "20,20"  # the server will say what is missing


def test_a_session_is_its_processes():
    assert os.getpid() in session(os.getsid(0))
    assert session(2**22) == []


@pytest.mark.parametrize("mode", ["paper", "improved"])
def test_the_trial_decides_a_tensor_split_and_an_uneven_pipeline(mode, tmp_path):
    """By the search, on a node as other tenants leave it: no layout is given."""
    library = Library.read(fingerprints(tmp_path / "prints.csv", models=("llama-2-7b", "llama-2-13b")), mode)
    core, node = Core(library.search()), trial_node.two_gpus(("llama-2-7b", "llama-2-13b"), 20)
    found = {}
    for tenant in node.tenants:
        budgets = node.budgets()
        if tenant.room is not None:
            room = tenant.room(core.search, tenant.wish)
            budgets.idle_gib = tuple(total - free for total, free in zip(node.total_gib, room, strict=True))
        decision = core.deploy(tenant.name, tenant.wish, budgets.states(lambda _gpu: 0.0)).decision
        found[tenant.name] = (decision.configuration.tp, decision.placement.pp_map)
    assert found == {"pipeline": (1, (20, 12)), "tensor": (2, (40,)), "small": (1, (32,))}
