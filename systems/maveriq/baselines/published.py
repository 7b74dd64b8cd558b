"""The placements that the authors' runs of AlpaServe and AlpaServe* used (`published.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from systems.common.errors import InputError
from systems.maveriq.baselines.alpaserve import Groups


@cache
def _all() -> Mapping[str, Any]:
    found: Mapping[str, Any] = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text(encoding="utf-8"))
    return found


def published_placement(baseline: str, model_list: str, rate_scale: float, gpus: int = 8) -> Groups | None:
    """The placement of `baseline` for a model list at a rate scale; None where the authors found none.

    Raises InputError for a baseline or a list that was never run.
    """
    lists = _all().get(baseline)
    if lists is None or model_list not in lists:
        raise InputError("maveriq", "placement", f"{baseline}, {model_list}", "no published placement: use placement: search")
    for line in lists[model_list]:
        if rate_scale <= line["up_to_rs"]:
            hosts = tuple(tuple(groups) for groups in line["hosts"])
            return Groups(line["tp"], line["pp"], gpus // (line["tp"] * line["pp"]), hosts)
    return None
