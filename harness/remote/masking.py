"""Keeps the values of secrets out of what is shown and kept."""

from __future__ import annotations

from collections.abc import Iterable

from harness.references import HIDDEN

SHORTEST = 4
"""Shorter values are not masked: half of every log would be."""


class Mask:
    """Replaces every one of `secrets`, and every line of one that has several, by `(hidden)`."""

    def __init__(self, secrets: Iterable[str]) -> None:
        pieces = {piece for secret in secrets for piece in (secret, *secret.splitlines()) if len(piece) >= SHORTEST}
        self._pieces = sorted(pieces, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """`text` without any secret."""
        for piece in self._pieces:
            text = text.replace(piece, HIDDEN)
        return text

    def __bool__(self) -> bool:
        """Whether there is anything to hide."""
        return bool(self._pieces)
