"""The words of the estimator and of the search: a configuration, a question, an answer, a model's facts.

Contents:

* `Configuration`: one way to deploy a model, TP x PP GPUs at one precision.
* `Question`: a model, a configuration, a batch size and an output length.
* `Estimate` and `Estimates`: what is expected, one answer or many (arrays).
* `Estimator`: what both modes, `paper` and `improved`, offer.
* `ModelFacts`, `known_models`: depth and widths of the models, from `data/models.yaml` or a file of the user's.
* `whole_number`: what counts as one in a file or an option.

Times are seconds, memory is GiB summed over all GPUs of the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from systems.common.errors import InputError
from systems.common.models import MODELS, ModelShape, close_names

Floats = NDArray[np.float64]
DTYPES = ("float16", "int8", "int4", "int4_gptq")
MOST = 10**9
"""No degree, depth, batch or number of tokens is larger: a number that is meant as one, and squares that stay finite."""
LEVEL = 0.9
"""The share of truths that an interval should hold unless another is asked for."""


@dataclass(frozen=True, slots=True, order=True)
class Configuration:
    """One way to deploy a model: tensor-parallel degree, pipeline stages, weight precision, int8 KV cache or fp16."""

    tp: int
    pp: int
    dtype: str = "float16"
    int8_kv: bool = False

    def __post_init__(self) -> None:
        assert self.tp >= 1 and self.pp >= 1, self

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.tp * self.pp

    @property
    def precision(self) -> Precision:
        """What the exponents of the paper's law depend on: (dtype, int8_kv)."""
        return self.dtype, self.int8_kv


Precision = tuple[str, bool]
"""(dtype, int8_kv)."""


@dataclass(frozen=True, slots=True)
class Question:
    """How long does `output_length` tokens take, for `batch` requests at once, and how much memory."""

    model: str
    configuration: Configuration
    batch: int = 1
    output_length: int = 100

    def __post_init__(self) -> None:
        assert self.batch >= 1 and self.output_length >= 1, self


@dataclass(frozen=True, slots=True)
class Estimate:
    """The answer to one question.

    `latency_s` is a whole request: prefill and all tokens. The truth should lie in [`latency_low_s`, `latency_high_s`]
    with probability `level`, and the same for memory. Paper mode knows no uncertainty: its bounds are NaN. `notes` say
    what was missing and what stood in for it.
    """

    latency_s: float
    latency_low_s: float
    latency_high_s: float
    memory_gib: float
    memory_low_gib: float
    memory_high_gib: float
    level: float = LEVEL
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimates:
    """Answers to many questions, in their order: one array per field of `Estimate`."""

    latency_s: Floats
    latency_low_s: Floats
    latency_high_s: Floats
    memory_gib: Floats
    memory_low_gib: Floats
    memory_high_gib: Floats
    level: float = LEVEL
    notes: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.latency_s)

    def __getitem__(self, place: int) -> Estimate:
        values = {field.name: float(getattr(self, field.name)[place]) for field in fields(self)[:6]}
        return Estimate(**values, level=self.level, notes=self.notes[place] if self.notes else ())


class Estimator(Protocol):
    """Latency and memory of any configuration of any model that was fingerprinted. Pure: the same question, the same answer."""

    @property
    def models(self) -> tuple[str, ...]:
        """The models that it can speak of, sorted."""

    def precisions(self, model: str) -> tuple[Precision, ...]:
        """The (dtype, int8_kv) pairs that `model` was fingerprinted at, in the order of `DTYPES`.

        Raises InputError for an unknown model.
        """

    def estimate(self, model: str, configuration: Configuration, *, batch: int = 1, output_length: int = 100) -> Estimate:
        """One answer.

        Raises InputError for a model that was not fingerprinted and, in paper mode, for a missing precision or layout.
        """

    def estimate_many(self, questions: Sequence[Question]) -> Estimates:
        """Answers in the order of the questions, about 1000 times faster than one by one. Raises like `estimate`."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the estimator and the search must know of a model beside its fingerprints.

    `layers` is the depth N to extrapolate to; `hidden` the width, whose divisors are the TP degrees. `tensor_parallel` is
    False where the model can't be split (Falcon-7B: 71 heads). `all_reduces` is how often a layer adds up over TP ranks: twice,
    or once where attention and MLP run side by side. The rest has the meaning of `ModelShape` and may be 0 where it is
    not known: paper mode needs none of it, improved mode puts a nominal value in its place (`filled`) and says so.
    """

    name: str
    layers: int
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    mlp: int = 0
    vocab: int = 0
    gated: bool = False
    all_reduces: int = 2
    tensor_parallel: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether all widths are known."""
        return min(self.hidden, self.heads, self.kv_heads, self.mlp, self.vocab) > 0

    @property
    def filled(self) -> ModelFacts:
        """The same with nominal widths where none is given: multi-head attention, heads of 128, an MLP of 4 times the width."""
        hidden = self.hidden or 4096
        heads = self.heads or max(1, hidden // 128)
        return replace(
            self,
            hidden=hidden,
            heads=heads,
            kv_heads=self.kv_heads or heads,
            head_dim=self.head_dim or max(1, hidden // heads),
            mlp=self.mlp or 4 * hidden,
            vocab=self.vocab or 32000,
        )

    @property
    def layer_weights(self) -> int:
        """Weights in one layer's matrices, by `filled`."""
        facts = self.filled
        attention = 2 * facts.hidden * (facts.heads + facts.kv_heads) * facts.head_dim
        return attention + facts.hidden * facts.mlp * (3 if facts.gated else 2)


def facts_from_shape(shape: ModelShape) -> ModelFacts:
    """The facts of one of the engine's shapes."""
    return ModelFacts(
        shape.name, shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.mlp, shape.vocab, shape.gated
    )


_DATA = Path(__file__).parent / "data"
_FACTS = {field.name for field in fields(ModelFacts)} - {"name"}
_MODELS: dict[Path, Mapping[str, ModelFacts]] = {}


def whole_number(text: str) -> int | None:
    """The whole number from 1 to `MOST` that `text` is, also as spreadsheets and pandas write it ("8.0"); else None."""
    plain = text.strip().removesuffix(".0")
    if not (plain.isascii() and plain.isdecimal() and len(plain) <= 20):
        return None
    return int(plain) if 1 <= int(plain) <= MOST else None


def known_models(file: Path = _DATA / "models.yaml") -> Mapping[str, ModelFacts]:
    """The models of `file` and the engine's shapes, by name. A model is added by a line in `file`, or in a file of your own.

    Raises InputError for a file that is no mapping of names to facts.
    """
    if file not in _MODELS:
        _MODELS[file] = {**{name: facts_from_shape(shape) for name, shape in MODELS.items()}, **_read_models(file)}
    return _MODELS[file]


def _read_models(file: Path) -> Mapping[str, ModelFacts]:
    mend = "write `name: {layers: N, hidden: H}`"
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(file, "models", str(error), mend) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("models"), dict):
        raise InputError(file, "models", raw, f"put a mapping under `models` and {mend}")
    return {str(name): _facts(file, str(name), entry) for name, entry in raw["models"].items()}


def _facts(file: Path, name: str, entry: object) -> ModelFacts:
    if not isinstance(entry, dict) or not set(entry) <= _FACTS:
        raise InputError(file, f"models.{name}", entry, f"use only the keys {', '.join(sorted(_FACTS))}")
    for key, value in entry.items():
        wants = bool if key in ("gated", "tensor_parallel") else int
        if type(value) is not wants or (wants is int and not (1 if key == "layers" else 0) <= value <= MOST):
            raise InputError(file, f"models.{name}.{key}", value, "write a whole number above 0, or true or false")
    if "layers" not in entry:
        raise InputError(file, f"models.{name}.layers", None, "say how many decoder layers the whole model has")
    return ModelFacts(name, **entry)


def facts_of(model: str, models: Mapping[str, ModelFacts]) -> ModelFacts:
    """The facts of `model`. Raises InputError with the closest names when there are none."""
    if model in models:
        return models[model]
    close = ", ".join(close_names(model, models))
    mend = f"its depth is not known: give it in a file for --models (an estimate also takes --layers N), or use one of {close}"
    raise InputError("models", "model", model, mend)
