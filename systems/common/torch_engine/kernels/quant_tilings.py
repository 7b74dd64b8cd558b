"""How products with quantised weights are cut, by number format and rows: `quant_tilings.json`, which a sweep on a GPU writes.

Entries are in order of `rows`; a product takes the first that has as many rows as it, and is padded to them. With more rows
than the last entry the matrix is made dense first. `benchmarks/tilings.py` writes a file of the same form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
MOST_SPLITS, LEAST_INPUTS = 8, 1024
"""Shares of the inputs: at most so many, none with fewer inputs."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is cut.

    Attributes:
        bn, bk: outputs and inputs per step (int4 takes one group per step where there are several rows).
        warps, stages: as Triton has them.
        splits: shares of the inputs; 0: as many as make `programs` programs.
        rows: rows to pad to; 0: the next power of two.
        left: the weights are the left operand: unpacked in registers, from where Hopper's matrix units take it. Else they are
            the right one, which goes through shared memory once more.
        programs: programs wanted, for `splits` 0.
    """

    bn: int
    bk: int
    warps: int = 4
    stages: int = 2
    splits: int = 1
    rows: int = 0
    left: bool = False
    programs: int = 256

    def shares(self, outer: int, inner: int) -> int:
        """Into how many shares the `inner` inputs of `outer` outputs are cut."""
        if self.splits:
            return self.splits
        shares = 1
        while shares < MOST_SPLITS and -(-outer // self.bn) * shares < self.programs and inner // (2 * shares) >= LEAST_INPUTS:
            shares *= 2
        return shares


Tilings = Mapping[str, tuple[Tiling, ...]]


def parse(entries: Mapping[str, Iterable[Mapping[str, int]]]) -> Tilings:
    """The tilings of a file, by number format. Raises KeyError or TypeError for one of another form."""
    return {name: tuple(Tiling(splits=0, **one) for one in entries[name]) for name in ("int8", "int4")}  # type: ignore[arg-type]


TILINGS = parse(json.loads(FILE.read_text()))


def chosen(rows: int, group: int) -> Tiling | None:
    """The tiling for a product of `rows` rows with int8 (`group` 0) or int4; None: make the matrix dense first."""
    return next((one for one in TILINGS["int4" if group else "int8"] if one.rows >= rows), None)
