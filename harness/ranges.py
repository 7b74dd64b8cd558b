"""Many names in one: `node[01-12]` is node01 to node12, `rack[a,b]` is not (numbers only), `r[1-2]n[1-4]` is eight names."""

from __future__ import annotations

import itertools
import re

LARGEST = 4096
_PART = re.compile(r"\[([^\[\]]*)\]")
_ITEM = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


class RangeError(ValueError):
    """A range that cannot be; its text says how to mend it."""


def expand(text: str) -> list[str]:
    """All names that `text` stands for, in order; itself alone when there is no range in it.

    Raises:
        RangeError: brackets without a partner, something else than numbers in them, or too many names.
    """
    pieces = _PART.split(text)
    if any("[" in piece or "]" in piece for piece in pieces):
        raise RangeError("a bracket has no partner: write a range as node[01-12]")
    choices = [[piece] if place % 2 == 0 else _numbers(piece) for place, piece in enumerate(pieces)]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > LARGEST:
        raise RangeError(f"stands for {total} names: {LARGEST} at most")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _numbers(text: str) -> list[str]:
    """What stands in brackets: `01-03,7` is 01, 02, 03, 7; a leading zero keeps the width."""
    found: list[str] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise RangeError(f"[{text}] is no range: use numbers, as node[01-12] or node[1,3,5-8]")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first) or int(last) - int(first) >= LARGEST:
            raise RangeError(f"[{text}] runs from {first} to {last}: give the smaller number first, {LARGEST} at most")
        width = len(first) if first.startswith("0") else 0
        found += [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    return found
