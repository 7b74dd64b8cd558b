"""SpotServe's cost model and profile reader, away from the artifact's files."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.core import Trial
from systems.common.errors import InputError
from systems.spotserve.cost_model import (
    Layout,
    decode_step_s,
    layers_per_stage,
    prefill_s,
    request_latency_s,
    throughput_rps,
)
from systems.spotserve.experiments import EXPERIMENTS
from systems.spotserve.profiles import LayerTimes, Profile, read_profile

RAW = {
    "name": "tiny",
    "layer_num": 10,
    "padded_layer_num": 12,
    "final_fix_factor": 2.0,
    "pp_init_comm": 8.0,
    "pp_incr_comm": 0.5,
    "max_tp": 2,
    "embed": [1.0, 2.0],
    "tp-1": {"bsz-1": {"init": 40, "incr": 4}, "bsz-2": {"init": 70, "incr": 5}},
    "tp-2": {"bsz-1": {"init": 20, "incr": 2}, "bsz-2": {"init": 36, "incr": 3}},
    "tp-4": {"bsz-1": {"init": 10, "incr": 1}, "bsz-2": {"init": 18, "incr": 2}},
}


@pytest.fixture
def profile_file(tmp_path):
    """Writes RAW with changes; None drops a key."""

    def write(**changes):
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({key: value for key, value in {**RAW, **changes}.items() if value is not None}))
        return path

    return write


@pytest.fixture
def profile(profile_file):
    return read_profile(profile_file())


def test_a_profile_in_seconds(profile):
    assert (profile.layers, profile.padded_layers, profile.correction) == (10, 12, 2.0)
    assert profile.layer_times[2, 2] == LayerTimes(0.036, 0.003)
    assert profile.embedding_s == {1: 0.001, 2: 0.002}
    assert (profile.tensor_degrees, profile.batches) == ((1, 2), (1, 2))  # 4 is measured but above max_tp


def test_what_the_v100_profiles_leave_out(profile_file):
    bare = read_profile(profile_file(padded_layer_num=None, max_tp=None, name=None))
    assert (bare.padded_layers, bare.tensor_degrees, bare.name) == (10, (1, 2, 4), "profile")


def test_latency_by_hand(profile):
    """P 3, M 2, B 2, m1 2, m2 1: f 4, t1 = 20*4*4/2 + 8/2*2 = 168 ms, t2 = 3*4*3 + 0.5*2 = 37 ms."""
    layout = Layout(3, 2, batch=2, prefill_micro_batches=2)
    assert layers_per_stage(profile, layout) == 4
    assert prefill_s(profile, layout) == pytest.approx(0.168)
    assert decode_step_s(profile, layout) == pytest.approx(0.037)
    assert request_latency_s(profile, layout, 10) == pytest.approx(2 * (0.168 + 0.37 + 2 * 0.002))
    assert throughput_rps(profile, layout, 10, replicas=3) == pytest.approx(3 * 2 / 1.084)
    assert layout.gpus == 6


def test_decode_micro_batches_are_not_divided(profile):
    """m2 2 of B 2: t2 = 2*4*(3+1) + 0.5*2, although prefill would be halved."""
    assert decode_step_s(profile, Layout(3, 2, batch=2, decode_micro_batches=2)) == pytest.approx(0.033)


times = st.floats(0.001, 10)
profiles = st.builds(
    Profile,
    name=st.just("any"),
    layers=st.integers(1, 96),
    padded_layers=st.just(96),
    max_tensor=st.just(1),
    correction=st.floats(1, 1.2),
    stage_prefill_s=times,
    stage_decode_s=times,
    embedding_s=st.fixed_dictionaries({1: times, 2: times}),
    layer_times=st.fixed_dictionaries({(1, b): st.builds(LayerTimes, times, times) for b in (1, 2)}),
)


@given(profiles, st.integers(1, 8), st.sampled_from([1, 2]), st.integers(1, 256))
def test_latency_is_affine_in_the_output_tokens(profile, pipeline, batch, tokens):
    layout = Layout(pipeline, 1, batch)
    one, two, more = (request_latency_s(profile, layout, n) for n in (1, 2, 1 + tokens))
    assert more == pytest.approx(one + tokens * (two - one))
    assert 0 < one < two


@given(profiles, st.integers(1, 200))
def test_stages_only_lengthen_an_unbatched_request(profile, tokens):
    """With one micro-batch stages work in turn: P stages of ceil(L/P) layers are never less than L layers."""
    latencies = [request_latency_s(profile, Layout(p, 1), tokens) for p in (1, 2, 3, 4)]
    assert min(latencies) == latencies[0]


@pytest.mark.parametrize("layout", [(0, 1), (1, 1, 2, 3), (1, 1, 2, 1, 4)])
def test_a_layout_that_cannot_be_is_a_programmer_error(layout):
    with pytest.raises(AssertionError):
        Layout(*layout)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"layer_num": None}, "layer_num"),
        ({"layer_num": 3.5}, "layer_num"),
        ({"layer_num": True}, "layer_num"),
        ({"final_fix_factor": None}, "final_fix_factor"),
        ({"pp_init_comm": -1}, "pp_init_comm"),
        ({"pp_incr_comm": "0.1"}, "pp_incr_comm"),
        ({"embed": []}, "embed"),
        ({"embed": [0.1, float("nan")]}, r"embed\[1\]"),
        ({"tp-1": None, "tp-2": None, "tp-4": None}, "tp-N"),
        ({"tp-1": {}}, r"tp-1\.bsz-N"),
        ({"tp-1": {"bsz-one": {}}}, r"tp-1\.bsz-one"),
        ({"tp-1": {"bsz-1": 40}}, r"tp-1\.bsz-1"),
        ({"tp-1": {"bsz-1": {"init": 40}}}, r"tp-1\.bsz-1\.incr"),
        ({"tp-1": {"bsz-1": {"init": 0, "incr": 1}}}, r"tp-1\.bsz-1\.init"),
    ],
)
def test_a_bad_profile_is_one_line_with_file_and_key(profile_file, changes, key):
    with pytest.raises(InputError, match=rf"profile\.json: {key}: ") as raised:
        read_profile(profile_file(**changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_file_that_is_no_profile(tmp_path, content):
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"profile\.json: file"):
        read_profile(path)
    with pytest.raises(InputError, match=r"none\.json"):
        read_profile(tmp_path / "none.json")


@pytest.fixture
def trial(profile_file, tmp_path):
    """A trial on RAW as the T4 profile of OPT-6.7B."""
    folder = tmp_path / "profiles"
    (folder / "T4-4x").mkdir(parents=True)
    profile_file().rename(folder / "T4-4x" / "megatron_6.7B_profile.json")

    def make(hardware="t4x16", datasets=None, **parameters):
        given = {"model": "opt-6.7b", "pipeline": 3, "tensor": 2, "output_tokens": 10, **parameters}
        where = {"spotserve_profiles": folder} if datasets is None else datasets
        return Trial("spotserve", "request_latency", given, hardware, datasets=where)

    return make


def test_a_trial(trial):
    outcome = EXPERIMENTS["request_latency"](trial(batch=2, prefill_micro_batches=2))
    assert outcome.metrics["request_latency_s"] == pytest.approx(1.084)
    assert outcome.metrics["gpus"] == 6
    assert outcome.metrics["layout"] == "(3, 2)"
    assert outcome.metrics["weights_gib"] == pytest.approx(24.96, abs=0.01)
    assert "T4-4x" in outcome.notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "opt"}, "model: 'opt': use one of opt-6.7b, gpt-20b, llama-30b"),
        ({"model": None}, "model: None"),
        ({"tensor": 4}, "tensor: 4: profiled are 1, 2"),
        ({"tensor": "2"}, "tensor: '2': write a whole number"),
        ({"batch": 3}, "batch: 3: profiled are 1, 2"),
        ({"pipeline": 0}, "pipeline: 0: write a whole number"),
        ({"pipeline": 9}, "needs 18 GPUs"),
        ({"pipeline": 11, "tensor": 1}, "only 10 layers"),
        ({"output_tokens": 1.5}, "output_tokens: 1.5"),
        ({"prefill_micro_batches": 2}, "use a divisor of the batch, 1"),
        ({"hardware": "h100x16"}, "published profiles of this model for t4, v100"),
        ({"hardware": "v100x16", "model": "llama-30b"}, "of this model for t4"),
        ({"datasets": {"spotserve_profiles": None}}, "no stand-in: set dataset_mirror"),
        ({"datasets": {}}, "no stand-in"),
    ],
)
def test_a_bad_trial_is_one_line(trial, changes, message):
    with pytest.raises(InputError, match=message) as raised:
        EXPERIMENTS["request_latency"](trial(**changes))
    assert "\n" not in str(raised.value)
