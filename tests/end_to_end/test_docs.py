"""The pages that teach how to add a figure and a system do what they say: their code blocks are carried out, word for word.

A block whose fence names a file (```` ```yaml figures/x/y.yaml ````) is that file, or is added to the end of it where it
exists; a `diff` block puts its `+` lines behind its context line.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.copies import copy_project

BLOCK = re.compile(r"^```(\w+) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def carry_out(page: str, root: Path) -> None:
    blocks = BLOCK.findall((root / "docs" / page).read_text())
    assert len(blocks) >= 3, page
    for language, name, text in blocks:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if language == "diff":
            context = next(line[1:] for line in text.splitlines() if line.startswith(" "))
            added = "".join(line[1:] + "\n" for line in text.splitlines() if line.startswith("+"))
            before = path.read_text()
            assert before.count(context) == 1, (page, name, context)
            path.write_text(before.replace(context, f"{context}\n{added}"))
        elif path.exists():
            before, mark, after = path.read_text().partition("EXPERIMENTS:")  # a function goes above the table of names
            path.write_text(f"{before}{text}\n\n{mark}{after}")
        else:
            path.write_text(text)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return copy_project(root, tmp_path)


def run(root: Path, *command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "system", "figure", "claims"),
    [
        ("adding-a-figure.md", "llmstation", "decode_step", {"D1"}),
        ("adding-a-system.md", "oneserver", "sojourn", {"Q1", "Q2"}),
    ],
)
def test_a_stranger_adds_what_a_page_describes(copy: Path, page: str, system: str, figure: str, claims: set[str]) -> None:
    carry_out(page, copy)
    assert "run_series" in run(copy, "snakemake", "-n", f"{system}_{figure}")
    run(copy, "snakemake", f"{system}_{figure}")
    results = copy / "results" / "paper-simulated" / system / figure
    assert (results / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
    verdicts = {claim["id"]: claim["status"] for claim in json.loads((results / "claims.json").read_text())["claims"]}
    assert verdicts == dict.fromkeys(claims, "reproduced")


@pytest.mark.slow
def test_the_code_on_the_pages_keeps_our_own_rules(copy: Path) -> None:
    for page in ("adding-a-figure.md", "adding-a-system.md"):
        carry_out(page, copy)
    run(copy, "ruff", "check", "--no-cache", "systems/oneserver", "systems/llmstation/experiments.py")
    run(copy, "ruff", "format", "--no-cache", "--check", "systems/oneserver")
