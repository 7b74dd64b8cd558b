"""The words of the controller's command line, parsed. `deploy a ...` is understood, and so is the artifact's `a deploy ...`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from systems.common.errors import InputError
from systems.maveriq.intents import INTENTS
from systems.maveriq.search import Wish
from systems.maveriq.strategies import STRATEGIES


@dataclass(frozen=True, slots=True)
class Register:
    """`register MODEL [FILE.csv]`; without a file the profiler measures."""

    model: str
    file: Path | None


@dataclass(frozen=True, slots=True)
class Deploy:
    """`deploy ID MODEL OUTPUT_LENGTH INTENT [SLO] [FP16ONLY] [STRATEGY] [BATCH] [ACCURACY]`."""

    name: str
    wish: Wish


@dataclass(frozen=True, slots=True)
class Inference:
    """`inference ID TEXT`; `prior_inference` goes to the front."""

    name: str
    text: str
    front: bool


@dataclass(frozen=True, slots=True)
class Remove:
    """`remove ID`."""

    name: str


Command = Register | Deploy | Inference | Remove

USAGE = {
    "register": (
        "register MODEL [FILE.csv]: take its fingerprints into the table that decisions use, from a file or measured now "
        "(minutes; nothing else should use the GPUs)"
    ),
    "deploy": (
        "deploy ID MODEL OUTPUT_LENGTH INTENT [SLO_S=0] [FP16ONLY=0] [STRATEGY=llf] [BATCH=1] [ACCURACY=0]: "
        f"choose, place and load a model; INTENT is one of {', '.join(INTENTS)}, STRATEGY one of {', '.join(STRATEGIES)}; "
        "any FP16ONLY but 0 means yes"
    ),
    "inference": "inference ID TEXT: queue a request",
    "prior_inference": "prior_inference ID TEXT: queue a request before all others",
    "remove": "remove ID: end a deployment; what waits for it fails",
}
ABOUT = {
    "status": "status: what is deployed",
    "wait": "wait: for all answers",
    "history": "history: the commands so far",
    "help": "help [COMMAND]: what there is",
    "exit": "exit: end everything",
}
"""Commands of the terminal, which ask nothing of a model."""


def parse(line: str) -> Command:
    """The command in `line`. Raises InputError that shows the right form."""
    words = line.split(maxsplit=2)
    if len(words) >= 2 and words[0] not in USAGE and words[1] in USAGE and words[1] != "register":
        words[0], words[1] = words[1], words[0]
    verb = words[0] if words else ""
    if verb not in USAGE:
        raise InputError("controller", "command", verb, f"use one of {', '.join((*USAGE, *ABOUT))}")
    rest = words[2] if len(words) > 2 else ""
    if len(words) < 2 or (verb not in ("remove", "register") and not rest.strip()):
        raise InputError("controller", verb, line, USAGE[verb])
    if verb == "register":
        return Register(words[1], Path(rest.strip()) if rest.strip() else None)
    if verb == "deploy":
        return Deploy(words[1], _wish(rest.split(), line))
    if verb == "remove":
        if rest.strip():
            raise InputError("controller", verb, line, USAGE[verb])
        return Remove(words[1])
    return Inference(words[1], rest, verb == "prior_inference")


def _wish(words: list[str], line: str) -> Wish:
    if not 3 <= len(words) <= 8:
        raise InputError("controller", "deploy", line, USAGE["deploy"])
    given = [*words, *("0", "0", "llf", "1", "0")[len(words) - 3 :]]
    model, length, intent, slo, fp16, strategy, batch, accuracy = given
    try:
        wish = Wish(model, intent, float(slo), float(accuracy), fp16 != "0", int(batch), int(length), _named(strategy))
    except ValueError as error:
        raise InputError("controller", "deploy", line, f"{error}: {USAGE['deploy']}") from error
    return wish.check()


def _named(strategy: str) -> str:
    return "none" if strategy == "None" else strategy  # as the artifact spells it
