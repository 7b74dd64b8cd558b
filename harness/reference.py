"""Recorded measurements: `reference/<gpu>/<system>/<figure>/`, kept from a measured run and shown by `backend=recorded`.

    table.csv              the rows of all series, as the measured run wrote them
    provenance.json        what stands behind each series' rows (harness.rows.About); where and when its trials ran; GPU seconds
    rescale.json           how the figure was moved to that hardware, where it was
    NAME.history.jsonl     every probe of a series

`python -m harness.record` writes such a folder; nobody does by hand.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.atomic import write_atomically
from harness.figure_file import FigureFile
from harness.rows import About, Row
from harness.table import as_csv, columns
from systems.registry import InputError, Scalar

REFERENCE = Path("reference")
TEXTS = frozenset({"series", "outcome", "trial"})
_WHOLE = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True, slots=True)
class Reference:
    """The folder of one figure on one GPU model."""

    folder: Path

    @classmethod
    def of(cls, system: str, figure: str, testbed: str, root: Path = REFERENCE) -> Reference:
        """Where the measurements of `figure` on `testbed` are, or would be."""
        return cls(root / testbed.rpartition("x")[0] / system / figure)

    @property
    def exists(self) -> bool:
        """Whether anything is recorded."""
        return (self.folder / "table.csv").is_file() and (self.folder / "provenance.json").is_file()

    @property
    def rescale(self) -> Path:
        """The factors by which the figure was moved; the file may not exist."""
        return self.folder / "rescale.json"

    def history(self, series: str) -> Path:
        """The probes of a series; the file may not exist."""
        return self.folder / f"{series}.history.jsonl"

    def write(self, figure: FigureFile, rows: Sequence[Row], about: Mapping[str, About], command: str) -> None:
        """Keep rows that a benchmark's file gave, not trials of ours; `command` made them of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        told = {name: asdict(known) for name, known in about.items()}
        origin = {"testbed": figure.testbed, "about": told, "trials": {}, "command": command}
        write_atomically(self.folder / "table.csv", as_csv(list(rows), columns(figure)))
        write_atomically(self.folder / "provenance.json", json.dumps(origin, indent=1, sort_keys=True) + "\n")

    def version(self) -> str:
        """A hash of all of it: what is drawn depends on nothing else."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def rows(self, series: str, testbed: str) -> tuple[list[Row], About]:
        """The rows of a series and what stands behind them.

        Raises:
            InputError: nothing is recorded, or of another testbed, or not of this series.
        """
        origin = self.provenance()
        if (recorded := origin["testbed"]) != testbed:
            raise InputError(self.folder, "testbed", testbed, f"recorded on {recorded}: use hardware={recorded}")
        if series not in origin["about"]:
            raise InputError(self.folder, "series", series, "was not recorded: measure it and record again")
        try:
            with (self.folder / "table.csv").open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["series"] == series]
            return [{name: _cell(name, text) for name, text in row.items()} for row in rows], About(**origin["about"][series])
        except (OSError, KeyError, TypeError) as error:
            raise InputError(self.folder, "table.csv", str(error), "measure the figure and record it again") from error

    def provenance(self) -> dict[str, Any]:
        """What `provenance.json` says. Raises InputError when there is none."""
        try:
            found = json.loads((self.folder / "provenance.json").read_bytes())
        except (OSError, ValueError) as error:
            mend = "nothing is recorded here: measure the figure, then python -m harness.record"
            raise InputError(self.folder, "provenance.json", type(error).__name__, mend) from error
        assert isinstance(found, dict), self.folder
        return found


def _cell(name: str, text: str) -> Scalar:
    """A cell of table.csv as the value that was written."""
    if text == "":
        return None
    if name in TEXTS:
        return text
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text) if _WHOLE.fullmatch(text) else float(text)
    except ValueError:
        return text
