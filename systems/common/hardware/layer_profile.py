"""Reader of SpotServe's per-layer profiles: whole layers of FasterTransformer in fp32, by tensor-parallel degree and batch."""

from __future__ import annotations

import json
from pathlib import Path

from systems.common.errors import InputError

LayerTimes = dict[tuple[int, int], tuple[float, float]]


def read_layer_profile(path: Path) -> LayerTimes:
    """Seconds of one layer's (prefill of 512 tokens, decode step) by (tensor-parallel degree, batch).

    Raises InputError for an unreadable file, a profile without times, or a time that is no number above 0.
    """
    mend = "give one of SpotServe's profile JSON files, with tp-<degree>.bsz-<batch>.{init,incr} in ms"
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
        found = {
            (int(degree.removeprefix("tp-")), int(batch.removeprefix("bsz-"))): (times["init"], times["incr"])
            for degree, batches in profile.items()
            if degree.startswith("tp-")
            for batch, times in batches.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(path, "file", str(error), mend) from None
    if not found:
        raise InputError(path, "tp-1", None, mend)
    return {key: (_seconds(path, key, init), _seconds(path, key, incr)) for key, (init, incr) in found.items()}


def _seconds(path: Path, key: tuple[int, int], ms: object) -> float:
    if isinstance(ms, bool) or not isinstance(ms, int | float) or not 0 < ms < float("inf"):
        raise InputError(path, f"tp-{key[0]}.bsz-{key[1]}", ms, "give milliseconds above 0")
    return float(ms) * 1e-3
