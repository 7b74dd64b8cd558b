"""What can go wrong with a role: each is one line that names it, what happened, and its last words."""

from __future__ import annotations

from collections.abc import Sequence

from systems.registry import InputError

LAST_LINES = 5
_LONGEST = 300


class LaunchError(InputError):
    """Something about a role; entry points print it as any InputError."""

    def __init__(self, role: str, what: str, mend: str, said: Sequence[str] = ()) -> None:
        """`role` and its place, `what` happened, the `mend`, and the last lines that it `said`."""
        self.role, self.what = role, what
        words = " | ".join(line.strip()[:_LONGEST] for line in said if line.strip())
        super().__init__(role, what, words or "it said nothing", mend)

    def _line(self) -> str:
        said = "" if self.value == "it said nothing" else f": it said: {self.value}"
        return f"{self.role}: {self.what}{said}: {self.mend}"


class RoleDiedError(LaunchError):
    """A role ended that others still needed, or ended with another status than 0."""


class RoleLateError(LaunchError):
    """A role was not ready in time."""


class RoleLostError(LaunchError):
    """The host of a role, or the connection to it, is gone; whatever ran there ends by itself."""
