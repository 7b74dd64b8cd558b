"""What a trial of each SpotServe figure means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from systems.common.core import Outcome, Scalar, Trial
from systems.common.errors import InputError
from systems.common.hardware import parse_testbed
from systems.spotserve.cost_model import Layout, request_latency_s, throughput_rps
from systems.spotserve.models import MODELS, Model
from systems.spotserve.profiles import Profile, read_profile

DATASET = "spotserve_profiles"


def request_latency(trial: Trial) -> Outcome:
    """One batch on idle GPUs, by the cost model (Table 1).

    Parameters of the trial: `model`, `pipeline` (P), `tensor` (M), `output_tokens` (S_out), and optionally `batch`
    (B), `prefill_micro_batches` (m1), `decode_micro_batches` (m2), 1 each where absent. It draws no random number, so
    the seed does not matter.

    Raises:
        InputError: there is no profile for the model on that GPU, or the layout was not profiled or does not fit.
    """
    model = _model(trial)
    testbed = parse_testbed(trial.hardware)
    gpu = testbed.gpu.name.partition("-")[0]  # the profiles do not say which size of V100 they are of
    if gpu not in model.profiles:
        raise _bad("hardware", trial.hardware, f"SpotServe published profiles of this model for {_names(model.profiles)}")
    profile = _profile(trial, model.profiles[gpu])
    layout = _layout(trial, profile, testbed.count)
    output_tokens = _whole(trial, "output_tokens")
    metrics: dict[str, Scalar] = {
        "request_latency_s": request_latency_s(profile, layout, output_tokens),
        "throughput_rps": throughput_rps(profile, layout, output_tokens),
        "gpus": layout.gpus,
        "layout": f"({layout.pipeline}, {layout.tensor})",
        "weights_gib": model.weights_gib,
    }
    note = f"published per-layer times ({model.profiles[gpu].split('/')[0]} profiles of SpotServe's artifact)"
    return Outcome(metrics=metrics, notes=(note,))


EXPERIMENTS: Mapping[str, Callable[[Trial], Outcome]] = {"request_latency": request_latency}


def _model(trial: Trial) -> Model:
    name = trial.parameters.get("model")
    if not isinstance(name, str) or name not in MODELS:
        raise _bad("model", name, f"use one of {_names(MODELS)}")
    return MODELS[name]


def _profile(trial: Trial, path: str) -> Profile:
    folder = trial.datasets.get(DATASET)
    if folder is None:
        # measured times of real GPUs: there is nothing that could honestly stand in for them
        raise _bad("datasets", DATASET, "it has no stand-in: set dataset_mirror to a folder that holds it, or go online")
    return read_profile(folder / path)


def _layout(trial: Trial, profile: Profile, gpus: int) -> Layout:
    tensor = _whole(trial, "tensor")
    if tensor not in profile.tensor_degrees:
        raise _bad("tensor", tensor, f"profiled are {_names(profile.tensor_degrees)}")
    batch = _whole(trial, "batch", 1)
    if batch not in profile.batches:
        raise _bad("batch", batch, f"profiled are {_names(profile.batches)}")
    pipeline = _whole(trial, "pipeline")
    if pipeline * tensor > gpus:
        raise _bad("hardware", trial.hardware, f"{pipeline} x {tensor} needs {pipeline * tensor} GPUs")
    if pipeline > profile.layers:
        raise _bad("pipeline", pipeline, f"the model has only {profile.layers} layers")
    return Layout(pipeline, tensor, batch, _parts(trial, "prefill", batch), _parts(trial, "decode", batch))


def _parts(trial: Trial, phase: str, batch: int) -> int:
    """The number of micro-batches: a power of two up to the batch."""
    key = f"{phase}_micro_batches"
    parts = _whole(trial, key, 1)
    if batch % parts:
        raise _bad(key, parts, f"use a divisor of the batch, {batch}")
    return parts


def _whole(trial: Trial, key: str, otherwise: int | None = None) -> int:
    value = trial.parameters.get(key, otherwise)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _bad(key, value, "write a whole number above 0")
    return value


def _bad(key: str, value: object, mend: str) -> InputError:
    return InputError("experiment request_latency of spotserve", key, value, mend)


def _names(values: Mapping[str, object] | Sequence[int]) -> str:
    return ", ".join(str(value) for value in values)
