"""What is served, as the HTTP process sees it: the model's name, its tokenizer, its adapters and how many requests use each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from systems.common.serve.tokenizers import Tokenizer


@dataclass(slots=True)
class Adapters:
    """The adapters that requests may name."""

    names: list[str] = field(default_factory=list)
    _using: Counter[str] = field(default_factory=Counter)

    def users(self, name: str) -> int:
        """Requests that use an adapter now."""
        return self._using[name]

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """A request that uses an adapter (or none), for as long as it lasts."""
        if name is not None:
            self._using[name] += 1
        try:
            yield
        finally:
            if name is not None:
                self._using[name] -= 1


@dataclass(frozen=True, slots=True)
class Model:
    """What is served: its name in requests, its tokenizer, where its weights come from, its adapters."""

    name: str
    tokenizer: Tokenizer
    weights: str
    adapters: Adapters
