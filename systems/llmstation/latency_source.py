"""Where the planner's latencies come from: the record of past iterations, then a profile, then a regression (sheet 2.7).

The paper's order is kept: what was measured in this very run wins; else an offline profile of (batch size, tuning
length, phase); else linear regression over all profiles, which only has to be good enough for the first iterations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from systems.llmstation.planner import CoRunLatencies


@dataclass(frozen=True, slots=True)
class Situation:
    """What an iteration's latency depends on: sequences, their context rounded up to a bucket, tuning tokens and phase."""

    decodes: int
    context: int
    tuning_tokens: int
    phase: str


class LinearRegression:
    """Least squares from (decodes, context, tuning tokens, 1) to each latency, per phase; never predicts below 0."""

    def __init__(self, profile: Mapping[Situation, CoRunLatencies]) -> None:
        """Fit `profile`; a phase needs at least one entry to be predictable."""
        self._weights: dict[str, np.ndarray] = {}
        for phase in {situation.phase for situation in profile}:
            rows = [(s, v) for s, v in profile.items() if s.phase == phase]
            features = np.array([self._features(s) for s, _ in rows])
            targets = np.array([(v.decode_alone_s, v.decode_s, v.tuning_s) for _, v in rows])
            self._weights[phase] = np.linalg.lstsq(features, targets, rcond=None)[0]

    @staticmethod
    def _features(situation: Situation) -> tuple[float, float, float, float]:
        return (situation.decodes, situation.context, situation.tuning_tokens, 1.0)

    def predict(self, situation: Situation) -> CoRunLatencies:
        """Latencies for a situation that was never seen. Raises KeyError for a phase that was never profiled."""
        alone, shared, tuning = np.array(self._features(situation)) @ self._weights[situation.phase]
        floor = 1e-6
        return CoRunLatencies(max(floor, alone), max(floor, shared), max(floor, tuning))

    def r_squared(self, truth: Mapping[Situation, CoRunLatencies]) -> float:
        """R² of the co-run decode latency over `truth` (the paper reports 0.73 and 0.69 on an unseen GPU)."""
        actual = np.array([value.decode_s for value in truth.values()])
        predicted = np.array([self.predict(situation).decode_s for situation in truth])
        return float(1 - ((actual - predicted) ** 2).sum() / ((actual - actual.mean()) ** 2).sum())


class LatencySource:
    """Answers from the record, the profile or the regression, in that order, and counts which it was."""

    def __init__(self, profile: Mapping[Situation, CoRunLatencies], fit_on: Iterable[Situation] | None = None) -> None:
        """`profile` is the offline table; the regression is fitted on it, or on the part `fit_on`."""
        self._profile = profile
        self._record: dict[Situation, CoRunLatencies] = {}
        self._regression = LinearRegression({s: profile[s] for s in fit_on} if fit_on is not None else profile)
        self.answers = {"record": 0, "profile": 0, "regression": 0}

    def lookup(self, situation: Situation) -> CoRunLatencies:
        """The best known latencies for `situation`."""
        for name, table in (("record", self._record), ("profile", self._profile)):
            if (known := table.get(situation)) is not None:
                self.answers[name] += 1
                return known
        self.answers["regression"] += 1
        return self._regression.predict(situation)

    def record(self, situation: Situation, measured: CoRunLatencies, weight: float = 1.0) -> None:
        """Remember what an iteration really took; with a `weight` below 1 as the newest part of a running mean."""
        if weight < 1 and (before := self._record.get(situation)) is not None:
            measured = before.towards(measured, weight)
        self._record[situation] = measured

    def adopt_record(self) -> None:
        """Make what this run has measured so far the profile, with the regression fitted on it, and begin a new record."""
        self._profile = {**self._profile, **self._record}
        self._record = {}
        self._regression = LinearRegression(self._profile)

    @property
    def profile(self) -> Mapping[Situation, CoRunLatencies]:
        """The offline table."""
        return self._profile
