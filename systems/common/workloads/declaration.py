"""A workload's declaration: flat data from a figure file, read key by key with every slip named.

Whoever reads a key takes it. What nobody took at the end is a mistyped key, or one that the chosen process does not use;
both are refused, because a key without effect is a figure that is not what its file says.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

from systems.common.errors import InputError


class Declaration:
    """The keys of one declaration; each may be taken once."""

    def __init__(self, content: Mapping[str, object], where: str) -> None:
        """`where` is what error messages call this declaration: a file name, or `workload`."""
        self._left = dict(content)
        self._known: set[str] = set()
        self._where = where

    def error(self, key: str, value: object, mend: str) -> InputError:
        """An InputError about `key` of this declaration."""
        return InputError(self._where, key, value, mend)

    def has(self, key: str) -> bool:
        """Whether `key` is given and not null."""
        return self._take(key, peek=True) is not None

    def choice(self, key: str, options: Iterable[str], default: str | None = None) -> str:
        """One of `options`."""
        options = list(options)
        value = self._take(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, None, f"missing: give one of {', '.join(options)}")
        if value not in options:
            raise self.error(key, value, f"use one of {', '.join(options)}{_meant(str(value), options)}")
        return str(value)

    def text(self, key: str) -> str | None:
        """A string, or None where absent."""
        value = self._take(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, value, "give a text")
        return value

    def number(self, key: str) -> float | None:
        """A finite number above 0, or None where absent."""
        value = self._take(key)
        return None if value is None else self._positive(key, value)

    def need(self, key: str, what: str = "a number above 0") -> float:
        """A finite number above 0 that must be given."""
        value = self.number(key)
        if value is None:
            raise self.error(key, None, f"missing: give {what}")
        return value

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int | None:
        """A whole number of at least `least`."""
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or not least <= value < 2**53:
            raise self.error(key, value, f"give a whole number, at least {least}")
        return int(value)

    def numbers(self, key: str) -> list[float]:
        """A list of finite numbers that are not negative."""
        value = self._take(key)
        if not isinstance(value, list | tuple) or not value:
            raise self.error(key, value, "give a list of numbers")
        return [0.0 if item == 0 and not isinstance(item, bool) else self._positive(key, item) for item in value]

    def flag(self, key: str) -> bool:
        """True or false; false where absent."""
        value = self._take(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "give true or false")
        return bool(value)

    def finish(self) -> None:
        """Raises InputError if a key was given that nobody took."""
        for key, value in self._left.items():
            if value is not None:
                mend = f"not used by this workload{_meant(key, self._known)}; it uses {', '.join(sorted(self._known))}"
                raise self.error(key, value, mend)

    def _take(self, key: str, peek: bool = False) -> object:
        self._known.add(key)
        return self._left.get(key) if peek else self._left.pop(key, None)

    def _positive(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise self.error(key, value, "give a finite number above 0")
        return float(value)


def _meant(word: str, options: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(options), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
