"""All parts from start to end, each written when it is done."""

from __future__ import annotations

import datetime
import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from systems.common.calibrate.budget import Budget
from systems.common.errors import InputError
from systems.common.hardware.datasheet import Gpu
from systems.common.models import ModelShape
from systems.common.serving_files import write
from systems.llmstation.calibrate import mps
from systems.llmstation.calibrate.beside import TINY, Effort, Sharing, slowdowns
from systems.llmstation.calibrate.rows import Row, text
from systems.llmstation.calibrate.tasklets import TuningRow, tasklet_rows
from systems.llmstation.corun.session import Session, Wanted
from systems.llmstation.tuning_table import table_of

Serving = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Points:
    """What is measured.

    Attributes:
        effort: per point.
        tokens: of a tuning sample, everywhere but in the other lengths.
        streams: serving phases and sizes beside it.
        tasklets: lengths of samples alone; the first one also with recomputation.
        sms: limits of green contexts, `limited` what is served beside them.
        lengths: of samples, beside `others`.
        percentages, packed, paired: MPS thread percentages, lengths of sample under MPS, what is served beside.
        blocks: of the KV cache.
        pair_s: seconds per measurement under MPS.
    """

    effort: Effort
    tokens: int
    streams: tuple[Serving, ...]
    tasklets: tuple[int, ...]
    sms: tuple[int, ...]
    limited: tuple[Serving, ...]
    lengths: tuple[int, ...]
    others: tuple[Serving, ...]
    percentages: tuple[int, ...]
    packed: tuple[int, ...]
    paired: tuple[Serving, ...]
    blocks: int
    pair_s: float


DECODES: tuple[Serving, ...] = (("decode", 32), ("decode", 128), ("decode", 1))
FULL = Points(
    effort=Effort(),
    tokens=500,
    streams=(*DECODES, ("prefill", 512), ("prefill", 128), ("decode", 64), ("decode", 8), ("prefill", 2000)),
    tasklets=(512, 128, 256, 1024, 2048),
    sms=(64, 32, 96),  # of 132: multiples of 8, which the driver splits by
    limited=(*DECODES, ("prefill", 512)),
    lengths=(128, 1024),
    others=(*DECODES, ("prefill", 512)),
    percentages=(30, 10, 50),
    packed=(512, 128),
    paired=(*DECODES, ("prefill", 512)),
    blocks=3500,
    pair_s=0.8,
)
QUICK = replace(
    FULL, streams=(*DECODES, ("prefill", 512)), tasklets=(512,), sms=(64,), limited=(("decode", 32),), lengths=(),
    percentages=(30,), packed=(512,), paired=(("decode", 32), ("prefill", 512)),
)  # fmt: skip
SMALL = Points(
    TINY, 16, (("decode", 2), ("prefill", 8)), (16, 8), (64,), (("decode", 2),), (8,), (("decode", 2),), (50,), (16,),
    (("decode", 2),), 64, 0.05,
)  # fmt: skip


def points(device: str, quick: bool) -> Points:
    """What to measure on a device."""
    return SMALL if device == "cpu" else QUICK if quick else FULL


class Run:
    """A calibration under way.

    Attributes:
        corun, tuning: rows found so far.
        failed: what went wrong, by part.
        notes: what a reader of the tables should know.
    """

    def __init__(
        self, shape: ModelShape, card: Gpu, device: str, out: Path, budget: Budget, points: Points, commit: str
    ) -> None:
        """Raises InputError where there is no such device."""
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("calibrate", "--device", device, "PyTorch sees no GPU here: run it on the machine that has one")
        self.shape, self.card, self.device, self.out, self.budget, self.points = shape, card, device, out, budget, points
        self.commit = commit
        self.corun: list[Row] = []
        self.tuning: list[TuningRow] = []
        self.failed: dict[str, str] = {}
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self._sharing: Sharing | None = None

    def all(self, parts: Sequence[str]) -> bool:
        """Measure `parts`; whether there is anything to show for it."""
        work: dict[str, Callable[[], None]] = {
            "mps": self._mps, "streams": self._streams, "tasklets": self._tasklets, "green": self._green,
            "lengths": self._lengths,
        }  # fmt: skip
        for name in (name for name in work if name in parts):
            began_s = self.budget.spent_s
            if self.budget.left_s <= 0:
                self.budget.left_out[name] = "all"
                continue
            print(f"{name}: {self.budget.left_s:.0f} s left", file=sys.stderr, flush=True)
            try:
                work[name]()
            except Exception as error:  # the other parts are measured all the same
                traceback.print_exc()
                self.failed[name] = f"{type(error).__name__}: {error}"[:500]
            self.seconds[name] = round(self.budget.spent_s - began_s, 1)
            self._save()
        self._save()
        for name, why in self.failed.items():
            print(f"{name} was not measured: {why}", file=sys.stderr)
        return bool(self.corun or self.tuning)

    def _save(self) -> None:
        if self.corun:
            write(self.out / "corun.csv", text(self.corun))
        if self.tuning:
            write(self.out / "tuning.csv", table_of(self.tuning))
        write(self.out / "corun.yaml", yaml.safe_dump(self._told(), sort_keys=False, allow_unicode=True, width=120))

    def _told(self) -> dict[str, Any]:
        return {
            "gpu": self.card.name if self.device == "cuda" else "cpu",
            "model": self.shape.name,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": self.commit,
            "command": ["python", "-m", "systems.llmstation.calibrate", *sys.argv[1:]],
            "gpu_seconds": round(self.budget.spent_s, 1),
            "seconds": self.seconds,
            "left_out": dict(self.budget.left_out),
            "failed": self.failed,
            "notes": self.notes,
        }

    # ---- two processes

    def _mps(self) -> None:
        told = self.points
        plan = mps.Plan(
            self.shape.name, self.device, told.percentages, told.packed, told.paired, told.effort.context, told.pair_s,
            told.blocks, 8 if self.device == "cpu" else 128,
        )  # fmt: skip
        self.notes += mps.measure(plan, self.budget, self._keep)

    def _keep(self, rows: list[Row]) -> None:
        self.corun += rows
        self._save()

    # ---- one process

    def _held(self) -> Sharing:
        """The session that all other parts use."""
        if self._sharing is None:
            told = self.points
            small = self.device == "cpu"
            wanted = Wanted(
                self.shape, self.device, blocks=told.blocks, max_num_seqs=8 if small else 128, tuning_tokens=told.tokens,
                max_tokens=64 if small else 2048,
            )  # fmt: skip
            held = Session.start(wanted)
            self.notes += held.notes
            self._sharing = Sharing(held, told.effort)
        return self._sharing

    def _streams(self) -> None:
        within = self.budget.within("streams", self.points.streams)
        for rows in slowdowns(self._held(), self.points.tokens, within):
            self._keep(rows)

    def _tasklets(self) -> None:
        held = self._held().held
        for tokens in self.budget.within("tasklets", self.points.tasklets):
            first = tokens == self.points.tasklets[0]
            self.tuning += tasklet_rows(self.shape, held.weights, replace(held.wanted, sms=None), tokens, first)
            self._save()
            gc.collect()

    def _green(self) -> None:
        sharing = self._held()
        sharing.tune(self.points.tokens)
        for sms in self.budget.within("green contexts", self.points.sms):
            self._keep(sharing.limit(sms, self.card.sms))
            for point in self.budget.within(f"green contexts, {sms} SMs", self.points.limited):
                self._keep(sharing.rows(point))

    def _lengths(self) -> None:
        sharing = self._held()
        for tokens in self.budget.within("other lengths", self.points.lengths):
            for rows in slowdowns(sharing, tokens, self.budget.within(f"samples of {tokens} tokens", self.points.others)):
                self._keep(rows)
