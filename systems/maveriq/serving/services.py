"""How long one request occupies the GPUs of a configuration, and how much memory the configuration holds.

Three sources, in this order:

1. the mean service times that the authors' own end-to-end runs show (`services.yaml`);
2. the full-model table: output tokens x decode time per token (the slope of latency between 10 and 50 tokens). Prompts of the
   end-to-end runs are short (at most 512 characters), so their prefill takes about as long as one decode step; the table's
   own prefill, of 923 tokens, would be far too long. Against the 12 configurations for which source 1 has a number this is
   within 18 % for 11 and twice too long for Llama-2-70B at TP 8, int4;
3. the estimator.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

from systems.common.errors import InputError
from systems.maveriq.configuration import Configuration, Estimator

Key = tuple[str, Configuration]
SHORT, LONG, PUBLISHED_TOKENS = 10, 50, 20


@dataclass(frozen=True, slots=True)
class FullModel:
    """What the full-model table says of one configuration.

    Decode seconds per token, a whole request of 923 + 20 tokens, GiB of all GPUs once it is loaded and after a run.
    """

    tpot_s: float
    whole_s: float
    loaded_gib: float
    memory_gib: float


@lru_cache(maxsize=4)
def read_full_models(path: Path) -> Mapping[Key, FullModel]:
    """The authors' full-model table. Raises InputError when it lacks a column or a row that the slope needs."""
    latency: dict[tuple[Key, int], float] = {}
    memory: dict[Key, tuple[float, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                one = Configuration(int(row["TP"]), int(row["PP"]), row["DTYPE"], row["INT8_KV_Cache"] == "True")
                key, tokens = (row["Model"], one), int(row["Output_Lenght"])
                latency[key, tokens] = float(row["Latency"])
                if tokens == PUBLISHED_TOKENS:
                    memory[key] = float(row["Memory-Pre-Run"]), float(row["Memory-After-Run"])
        return {
            key: FullModel((latency[key, LONG] - latency[key, SHORT]) / (LONG - SHORT), latency[key, PUBLISHED_TOKENS], *gib)
            for key, gib in memory.items()
        }
    except (OSError, KeyError, ValueError) as error:
        raise InputError(path, "full models", str(error), "give the artifact's full_model_data_collection.csv") from error


@cache
def _published() -> Mapping[str, Any]:
    found: Mapping[str, Any] = yaml.safe_load((Path(__file__).parent / "services.yaml").read_text(encoding="utf-8"))
    return found


@cache
def published_means() -> Mapping[Key, float]:
    """The authors' mean service times at 20 tokens, seconds."""
    return {
        (line["model"], Configuration(line["tp"], line["pp"], line["dtype"], line["int8_kv"])): float(line["seconds"])
        for line in _published()["mean_s"]
    }


@cache
def published_memory() -> Mapping[Key, float]:
    """What loading added in the authors' end-to-end runs, GiB."""
    return {
        (line["model"], Configuration(line["tp"], line["pp"], line["dtype"], line["int8_kv"])): float(line["gib"])
        for line in _published()["loaded_gib"]
    }


@cache
def accelerate_known() -> Mapping[str, float]:
    """Accelerate's seconds per request, by model."""
    return {model: float(seconds) for model, seconds in _published()["accelerate"]["request_s"].items()}


@dataclass(frozen=True)
class Services:
    """Service times and memory. `full_models` may be empty: then only published means and the estimator answer."""

    estimator: Estimator
    full_models: Mapping[Key, FullModel] = field(default_factory=dict)
    means: Mapping[Key, float] = field(default_factory=published_means)
    memory: Mapping[Key, float] = field(default_factory=published_memory)

    def service_s(self, model: str, configuration: Configuration, output_length: int = PUBLISHED_TOKENS) -> float:
        """Seconds that one request of `output_length` tokens holds the GPUs."""
        key = (model, configuration)
        if output_length == PUBLISHED_TOKENS and key in self.means:
            return self.means[key]
        if key in self.full_models:
            return output_length * self.full_models[key].tpot_s
        return self.estimator.estimate(model, configuration, output_length=output_length).latency_s

    def memory_gib(self, model: str, configuration: Configuration) -> float:
        """GiB that loading adds, all GPUs together: published, else the table's after loading, else the estimate."""
        key = (model, configuration)
        if key in self.memory:
            return self.memory[key]
        if key in self.full_models:
            return self.full_models[key].loaded_gib
        return self.estimator.estimate(model, configuration, output_length=PUBLISHED_TOKENS).memory_gib
