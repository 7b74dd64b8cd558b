"""Mode `paper`: the published method number for number, with its quirks (sheet 2.4 to 2.6).

* The (1,2) fingerprint is not used for latency: the authors' lookup of L(1,2) forces PP = 1, so L(1,2) = L(1,1).
* A model that can't be split (Falcon-7B) has no TP overhead.
* Estimates may be 0 or negative where fingerprints are noisy: the search drops those (2.7).
* There is no uncertainty: bounds are NaN.

Beyond the paper, output lengths and depths are the two smallest that the file holds, so other grids work too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from systems.common.errors import InputError
from systems.maveriq.configuration import (
    Configuration,
    Estimate,
    Estimates,
    ModelFacts,
    Precision,
    Question,
    facts_of,
)
from systems.maveriq.exponents import published_exponents
from systems.maveriq.fingerprint import Fingerprints, Layout, Point, Setting
from systems.maveriq.law import Exponents, Line, batched, extend_line, full_depth, parallel_latency_s, parallel_memory_gib


class Extrapolated(NamedTuple):
    """One model, precision and batch at full depth: what the parallelism laws start from. Memory in GiB."""

    single: Line
    split: Line
    memory: tuple[float, float, float]
    """(1,1), (1,2), (2,1)."""


class PaperEstimator:
    """The paper's estimator over one file of fingerprints."""

    def __init__(
        self,
        fingerprints: Fingerprints,
        models: Mapping[str, ModelFacts],
        exponents: Mapping[Precision, Exponents] | None = None,
    ) -> None:
        """Use `fingerprints`; `exponents` default to the authors' (`data/exponents.yaml`)."""
        self._fingerprints = fingerprints
        self._models = models
        self._exponents = published_exponents() if exponents is None else exponents
        self._index: dict[tuple[str, Precision, int, Layout], dict[tuple[int, int], Setting]] = {}
        for setting in fingerprints.points:
            key = (setting.model, setting.precision, setting.batch, setting.layout)
            self._index.setdefault(key, {})[setting.layers, setting.output_length] = setting
        self._extrapolated: dict[tuple[str, Precision, int], Extrapolated] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """The models that were fingerprinted."""
        return self._fingerprints.models

    def precisions(self, model: str) -> tuple[Precision, ...]:
        """The precisions of `model` that were fingerprinted."""
        return self._fingerprints.precisions(model)

    def estimate(self, model: str, configuration: Configuration, *, batch: int = 1, output_length: int = 100) -> Estimate:
        """One answer. Raises InputError where the fingerprints don't reach."""
        return self.estimate_many([Question(model, configuration, batch, output_length)])[0]

    def estimate_many(self, questions: Sequence[Question]) -> Estimates:
        """Answers in the order of the questions."""
        constants = np.array([self._constants(question) for question in questions], dtype=float).reshape(-1, 2, 5)
        shape = [(q.configuration.tp, q.configuration.pp, q.batch) for q in questions]
        tp, pp, batch = np.array(shape, dtype=float).reshape(-1, 3).T
        exponents = Exponents(*np.array([self._exponent(q.configuration.precision) for q in questions]).reshape(-1, 4).T)
        latency, memory = [], []
        for one in (0, 1):  # batch 1, batch 2
            single, split, m11, m12, m21 = constants[:, one].T
            latency.append(parallel_latency_s(single, split, single, tp, pp, exponents))
            memory.append(parallel_memory_gib(m11, m12, m21, tp, pp))
        nan = np.full(len(questions), np.nan)
        return Estimates(
            batched(latency[0], latency[1], batch), nan, nan, batched(memory[0], memory[1], batch), nan, nan,
            notes=((),) * len(questions),
        )  # fmt: skip

    def extrapolated(self, model: str, precision: Precision, batch: int) -> Extrapolated:
        """The whole model on (1,1) and (2,1), and its memory on all three layouts.

        Raises InputError when the model is unknown or a fingerprint is missing.
        """
        key = (model, precision, batch)
        if key not in self._extrapolated:
            self._extrapolated[key] = self._extrapolate(*key)
        return self._extrapolated[key]

    def _extrapolate(self, model: str, precision: Precision, batch: int) -> Extrapolated:
        facts = facts_of(model, self._models)
        single = self._line(facts, precision, batch, (1, 1))
        m11, m12 = (self._memory(facts, precision, batch, layout) for layout in ((1, 1), (1, 2)))
        if not facts.tensor_parallel:
            return Extrapolated(single, Line(single.ttft_s / 2, single.tpot_s / 2), (m11, m12, m11))
        split = self._line(facts, precision, batch, (2, 1))
        return Extrapolated(single, split, (m11, m12, self._memory(facts, precision, batch, (2, 1))))

    def _constants(self, question: Question) -> list[list[float]]:
        """[batch 1, batch 2] x [L(1,1), L(2,1), M(1,1), M(1,2), M(2,1)]; batch 2 is only asked for where it matters."""
        configuration = question.configuration
        self._fingerprints.precisions(question.model)
        facts = facts_of(question.model, self._models)
        if configuration.tp > 1 and not facts.tensor_parallel:
            raise InputError(question.model, "tp", configuration.tp, "this model can't be split: use tp 1")
        if configuration.pp > facts.layers:
            raise InputError(
                question.model, "pp", configuration.pp, f"the model has {facts.layers} layers: every stage needs one"
            )
        rows = []
        for batch in (1, 2) if question.batch > 1 else (1, 1):
            found = self.extrapolated(question.model, configuration.precision, batch)
            lines = (line.ttft_s + question.output_length * line.tpot_s for line in (found.single, found.split))
            rows.append([*lines, *found.memory])
        return rows

    def _exponent(self, precision: Precision) -> Exponents:
        if precision not in self._exponents:
            shown = ", ".join(f"{dtype}{' + int8 KV' if kv else ''}" for dtype, kv in self._exponents)
            raise InputError("exponents", "dtype", precision, f"there are exponents for {shown}: refit, or use --mode improved")
        return self._exponents[precision]

    def _measured(self, facts: ModelFacts, precision: Precision, batch: int, layout: Layout) -> dict[tuple[int, int], Setting]:
        found = self._index.get((facts.name, precision, batch, layout))
        if found is None:
            self._explain(facts.name, precision, batch, layout)
        assert found is not None
        return found

    def _explain(self, model: str, precision: Precision, batch: int, layout: Layout) -> None:
        """Raise an InputError that says which of model, precision, batch and layout is missing."""
        source = self._fingerprints.source
        has = self._fingerprints.precisions(model)
        if precision not in has:
            shown = ", ".join(f"{dtype}{' + int8 KV' if kv else ''}" for dtype, kv in has)
            raise InputError(source, f"{model} dtype, int8_kv", precision, f"fingerprinted at {shown}")
        layouts = self._fingerprints.layouts(model, precision, batch)
        if not layouts:
            raise InputError(
                source, f"{model} Batch_Size", batch, "paper mode needs fingerprints of this batch size: measure it"
            )
        mend = "paper mode needs fingerprints of (1,1), (1,2) and (2,1): measure this layout, or use --mode improved"
        raise InputError(source, f"{model} {precision[0]} layout", layout, mend)

    def _two(self, facts: ModelFacts, found: Mapping[tuple[int, int], Setting], column: int, layout: Layout) -> tuple[int, int]:
        """The two smallest depths (column 0) or output lengths (column 1) measured."""
        values = sorted({key[column] for key in found})
        if len(values) < 2:
            name = ("PP_Map", "Output_Lenght")[column]
            what = ("depths", "output lengths")[column]
            raise InputError(
                self._fingerprints.source,
                f"{facts.name} {layout} {name}",
                values[0],
                f"two {what} are needed: measure another one",
            )
        return values[0], values[1]

    def _line(self, facts: ModelFacts, precision: Precision, batch: int, layout: Layout) -> Line:
        found = self._measured(facts, precision, batch, layout)
        layers, lengths = self._two(facts, found, 0, layout), self._two(facts, found, 1, layout)
        (a, b), (c, d) = [[self._point(facts, found, (n, o), layout).latency_s for o in lengths] for n in layers]
        return full_depth(((a, b), (c, d)), layers, lengths, facts.layers)

    def _point(
        self, facts: ModelFacts, found: Mapping[tuple[int, int], Setting], key: tuple[int, int], layout: Layout
    ) -> Point:
        if key not in found:
            raise InputError(
                self._fingerprints.source, f"{facts.name} {layout}", key, "this (layers, output length) is missing: measure it"
            )
        return self._fingerprints.points[found[key]]

    def _memory(self, facts: ModelFacts, precision: Precision, batch: int, layout: Layout) -> float:
        found = self._measured(facts, precision, batch, layout)
        first, second = self._two(facts, found, 0, layout)
        length = min(o for _, o in found)
        low, high = (self._point(facts, found, (n, length), layout).memory_gib for n in (first, second))
        return extend_line(low, high, first, second, facts.layers)
