"""What the controller knows of models: fingerprints, facts, what can't run. `register` adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from systems.common.errors import InputError
from systems.maveriq.configuration import ModelFacts, facts_of, known_models
from systems.maveriq.estimator import make_estimator
from systems.maveriq.fingerprint import Fingerprints, read_fingerprints
from systems.maveriq.models import Support, load_support
from systems.maveriq.search import Search


@dataclass(frozen=True, slots=True)
class Library:
    """Everything that a search is made of."""

    fingerprints: Fingerprints
    mode: str
    facts: Mapping[str, ModelFacts]
    support: Support

    @classmethod
    def read(cls, fingerprints: Path, mode: str = "paper", models: Path | None = None) -> Library:
        """From a CSV file of fingerprints and, beside the built-in ones, a YAML file of models. Raises InputError."""
        facts = {**known_models(), **(known_models(models) if models else {})}
        return cls(read_fingerprints(fingerprints), mode, facts, load_support(models))

    def search(self) -> Search:
        """A search over all of it."""
        return Search(make_estimator(self.fingerprints, self.mode, self.facts), self.facts, self.support)

    def having(self, model: str, file: Path) -> tuple[Library, int]:
        """With the fingerprints of `model` in `file` in place of those there were, and how many they are.

        Raises InputError for an unusable file, one without `model`, or a model whose depth is not known.
        """
        facts_of(model, self.facts)
        new = read_fingerprints(file)
        added = {setting: point for setting, point in new.points.items() if setting.model == model}
        if not added:
            raise InputError(file, "Model", model, f"the file has no fingerprint of it: it has {', '.join(new.models)}")
        kept = {setting: point for setting, point in self.fingerprints.points.items() if setting.model != model}
        merged = Fingerprints(f"{self.fingerprints.source} and {file}", {**kept, **added})
        return replace(self, fingerprints=merged), len(added)
