"""Every figure's verdicts in one table, and whether each difference is explained.

A claim that differs is explained when `docs/<system>.md` has a heading that names the figure and the claim, such as
`### fig8a C2a` (one heading may name several claims), with text under it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.claims.judgement import Status
from systems.registry import InputError

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?<![.-])")
_WIDTHS = {"claim": 44, "verdict": 19, "paper": 24, "ours": 26, "source": 26}


class _Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    kind: str
    text: str
    source: str
    note: str
    status: Status
    measured: str
    expected: str
    reason: str
    numbers: dict[str, float]


class _Document(BaseModel):
    """A claims.json."""

    model_config = ConfigDict(extra="forbid")
    system: str
    figure: str
    title: str
    notes: list[str]
    claims: list[_Verdict]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table."""

    system: str
    figure: str
    claim: _Verdict
    explained: bool

    @property
    def verdict(self) -> str:
        """The status, with `(explained)` where the documentation explains a difference."""
        return f"{self.claim.status}{' (explained)' if self.differs and self.explained else ''}"

    @property
    def differs(self) -> bool:
        """Whether our table contradicts the claim."""
        return self.claim.status is Status.DIFFERS


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `python -m harness.claims` prints."""

    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    @property
    def unexplained(self) -> tuple[Entry, ...]:
        """Differences that the documentation does not explain."""
        return tuple(entry for entry in self.entries if entry.differs and not entry.explained)


def collect(paths: Sequence[Path], docs: Path) -> Report:
    """Read every claims.json of `paths` and look each difference up in `docs`.

    Raises:
        InputError: a file is missing or is not one that `harness.claims.judge` wrote.
    """
    documents = [_read(path) for path in paths]
    entries = [
        Entry(document.system, document.figure, verdict, _explained(docs, document, verdict))
        for document in documents
        for verdict in document.claims
    ]
    notes = [f"{document.system} {document.figure}: {note}" for document in documents for note in document.notes]
    return Report(tuple(entries), tuple(notes))


def _explained(docs: Path, document: _Document, verdict: _Verdict) -> bool:
    wanted = {document.figure, verdict.id}
    return any(wanted <= heading for heading in explanations(docs / f"{document.system}.md"))


def explanations(path: Path) -> list[frozenset[str]]:
    """The words of every heading of a Markdown file that has text under it; none where there is no such file."""
    found: list[frozenset[str]] = []
    open_headings: list[frozenset[str]] = []
    fenced = False
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif line.startswith("#") and not fenced:
            open_headings = [frozenset(_WORD.findall(line))]
        elif line.strip():
            found += open_headings
            open_headings = []
    return found


def render(report: Report) -> str:
    """The table as text, one block per figure."""
    lines: list[str] = []
    for figure in dict.fromkeys((entry.system, entry.figure) for entry in report.entries):
        entries = [entry for entry in report.entries if (entry.system, entry.figure) == figure]
        lines += [
            f"{figure[0]} {figure[1]}",
            *_row(dict(zip(_WIDTHS, _WIDTHS, strict=True))),
            "-" * (sum(_WIDTHS.values()) + 8),
        ]
        for entry in entries:
            claim = entry.claim
            said = (f"{claim.id}  {claim.text}", entry.verdict, claim.expected, claim.measured, claim.source)
            lines += _row(dict(zip(_WIDTHS, said, strict=True)))
            lines += textwrap.wrap(claim.reason, 130, initial_indent="    why: ", subsequent_indent="         ")
        lines.append("")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes), _summary(report)]) + "\n"


def _summary(report: Report) -> str:
    counts = {status: sum(entry.claim.status is status for entry in report.entries) for status in Status}
    said = " · ".join(f"{count} {status}" for status, count in counts.items())
    if not report.unexplained:
        return said
    missing = "; ".join(f"docs/{entry.system}.md: ### {entry.figure} {entry.claim.id}" for entry in report.unexplained)
    return f"{said}\nnot explained, each wants a heading with text under it: {missing}"


def _row(cells: Mapping[str, str]) -> list[str]:
    columns = [textwrap.wrap(cells[name], width) or [""] for name, width in _WIDTHS.items()]
    height = max(map(len, columns))
    padded = [column + [""] * (height - len(column)) for column in columns]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, _WIDTHS.values(), strict=True)).rstrip()
        for row in zip(*padded, strict=True)
    ]


def _read(path: Path) -> _Document:
    """One claims.json, checked: the table is only as good as the files it was given."""
    try:
        return _Document.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(path, "file", error.strerror, "draw the figure first") from error
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "file"
        raise InputError(path, key, problem["msg"], "write it anew with python -m harness.claims.judge") from error
