"""Builds an image from its recipe. An image gets its name only when it is whole; until then nothing is called so."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from harness.atomic import make_folder, writing
from harness.containers import owner
from harness.containers.context import write_tar
from harness.containers.engine import Engine, talking
from harness.containers.models import LABEL
from harness.containers.recipe import Recipe
from harness.containers.runner import inspect
from systems.registry import InputError


class Outcome(StrEnum):
    """What became of an image."""

    BUILT = "built"
    UP_TO_DATE = "up to date"
    NOT_BUILDABLE = "not buildable here"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Built:
    """What became of the image `name`: its reference where it is there, else why not."""

    name: str
    outcome: Outcome
    reference: str
    duration_s: float = 0.0
    why: str = ""


class NotBuildable(Exception):  # noqa: N818
    """This machine lacks what the image needs; the text says what and how to get it, in one line."""


def build(engine: Engine, recipe: Recipe, logs: Path, *, anew: bool = False) -> Built:
    """Make the image of `recipe` be there; `anew`: even if it is.

    What the engine says goes into `logs`/<name>.log.

    Raises:
        InputError: the engine stopped, or the recipe cannot be followed.
    """
    start = time.perf_counter()
    with talking(engine.url, "left-over containers"):
        owner.reap(engine)
    try:
        base_id = _base(engine, recipe)
        if not anew and _up_to_date(engine, recipe, base_id):
            return Built(recipe.name, Outcome.UP_TO_DATE, recipe.reference)
        log = logs / f"{recipe.name}.log"
        image, why = _build(engine, recipe, base_id, log)
    except NotBuildable as reason:
        return Built(recipe.name, Outcome.NOT_BUILDABLE, "", 0.0, str(reason))
    duration_s = time.perf_counter() - start
    if image is None:
        return Built(recipe.name, Outcome.FAILED, "", duration_s, f"{why} (see {log})")
    _name(engine, recipe, image)
    return Built(recipe.name, Outcome.BUILT, recipe.reference, duration_s)


def _up_to_date(engine: Engine, recipe: Recipe, base_id: str) -> bool:
    found = inspect(engine, recipe.reference)
    labels = (found or {}).get("Config", {}).get("Labels") or {}
    return labels.get(f"{LABEL}.recipe") == recipe.key and labels.get(f"{LABEL}.base-id") == base_id


def _base(engine: Engine, recipe: Recipe) -> str:
    """The identity of the base, which is pulled if the engine has none."""
    reference = recipe.base_reference
    found = inspect(engine, reference) or _pulled(engine, reference)
    return str(found["Id"])


def _pulled(engine: Engine, reference: str) -> Mapping[str, Any]:
    said = ""
    for event in _events(engine, "pull", engine.api.pull, reference, stream=True, decode=True):
        said = event.get("error", said)
    found = inspect(engine, reference)
    if found is None:
        mend = "name one of this site under `bases` in containers/site.yaml"
        raise NotBuildable(f"its base {reference} is not there and cannot be pulled ({' '.join(said.split())}): {mend}")
    return found


def _events(engine: Engine, doing: str, ask: Any, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401
    """What the engine says while it works. A refusal is an event too: `{"error": ...}`."""
    try:
        with talking(engine.url, doing):
            yield from ask(*args, **options)
    except InputError as error:
        if not engine.alive:
            raise
        yield {"error": str(error.value)}


def _build(engine: Engine, recipe: Recipe, base_id: str, log: Path) -> tuple[str | None, str]:
    """The new image's identity, still without a name; or None and why there is none."""
    make_folder(log.parent)
    with tempfile.TemporaryFile() as tar, writing(log), log.open("w", encoding="utf-8", errors="replace") as out:
        write_tar(recipe.context(base_id), tar)
        tar.seek(0)
        image, why = _followed(_building(engine, recipe, tar), out)
    if image is None and not engine.alive:
        mend = "start it, then run the same command again: nothing half-made is left"
        raise InputError(engine.url, "build", recipe.name, f"the engine stopped during the build: {mend}")
    return image, why


def _building(engine: Engine, recipe: Recipe, tar: IO[bytes]) -> Iterator[dict[str, Any]]:
    network = None if recipe.site.network == "default" else recipe.site.network
    options = {"custom_context": True, "decode": True, "rm": True, "forcerm": True, "network_mode": network}
    return _events(engine, "build", engine.api.build, fileobj=tar, **options)


def _followed(events: Iterator[dict[str, Any]], out: IO[str]) -> tuple[str | None, str]:
    image, why, line = None, "", ""
    for event in events:
        text = str(event.get("stream") or event.get("status") or event.get("error") or "")
        line = next((line for line in reversed(text.splitlines()) if line.strip()), line)
        out.write(text if text.endswith("\n") or not text else f"{text}\n")
        out.flush()
        image = (event.get("aux") or {}).get("ID", image)
        why = event.get("error", why)
    if why or image is None:
        return None, " ".join((why or line or "the engine said nothing").split())
    return image, ""


def _name(engine: Engine, recipe: Recipe, image: str) -> None:
    repository, _, tag = recipe.reference.partition(":")
    with talking(engine.url, "tag"):
        engine.api.tag(image, repository, tag)
