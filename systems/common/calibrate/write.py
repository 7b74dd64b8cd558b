"""A calibration's folder, written whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from systems.common.errors import InputError

OURS = ("meta.yaml", "engine.yaml", "layer.csv")
"""A folder with one of these is a calibration's: a workflow takes the first away before it measures again."""


@dataclass(slots=True)
class Folder:
    """Files to be: text by name."""

    files: dict[str, str] = field(default_factory=dict)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows)
        self.files[name] = text.getvalue()

    def mapping(self, name: str, content: Mapping[str, Any]) -> None:
        """Add a YAML file."""
        self.files[name] = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120)

    def write(self, out: Path) -> None:
        """Put all files into `out`, replacing the folder that is there.

        Raises InputError when it cannot be written, or when something else than a calibration is there.
        """
        if out.exists() and not any((out / name).is_file() for name in OURS) and any(out.iterdir()):
            raise InputError(out, "--out", out.name, "holds other files: name a new folder, or one with a calibration")
        made, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("new", "old"))
        try:
            made.mkdir(parents=True)
            for name, text in self.files.items():
                with (made / name).open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            if out.exists():
                out.rename(old)
            made.rename(out)
        except OSError as error:
            mend = f"cannot be written ({error.strerror}): free space or choose another folder"
            raise InputError(out, "--out", out.name, mend) from error
        finally:
            shutil.rmtree(made, ignore_errors=True)
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
