"""The one error that a user sees: bad input, said in one line with the way to mend it."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """A user gave something unusable.

    Its text is one line, `where: key: value: mend`, so that a program's entry point can print it as it is and
    exit non-zero. Programmer errors are assertions instead.
    """

    def __init__(self, where: str | Path, key: str, value: object, mend: str) -> None:
        """Say which `key` of which file (`where`) holds which `value`, and how to `mend` it."""
        self.where, self.key, self.value, self.mend = str(where), key, value, mend
        super().__init__(self._line())

    def _line(self) -> str:
        shown = repr(self.value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return f"{self.where}: {self.key}: {shown}: {self.mend}".replace("\n", " ")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, object, str]]:
        return type(self), (self.where, self.key, self.value, self.mend)
