"""Images to and from a registry, by digest: for hosts that shall run exactly what was built here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.containers.engine import Engine, talking
from harness.containers.runner import inspect
from systems.registry import InputError


def push(engine: Engine, image: str, registry: str) -> str:
    """Push `image` to `registry` (`host:port/folder`); its name there, with its digest.

    Raises:
        InputError: there is no such image, or the registry refuses it.
    """
    if inspect(engine, image) is None:
        raise InputError(engine.url, "image", image, "not there: build it first (`snakemake containers`)")
    path, tag = _split(image)
    repository = f"{registry}/{path}"
    with talking(engine.url, "push"):
        engine.api.tag(image, repository, tag)
        for event in _checked(engine.api.push(repository, tag, stream=True, decode=True), registry, "push", image):
            digest = event.get("aux", {}).get("Digest")
            if digest:
                return f"{repository}@{digest}"
    raise InputError(registry, "push", image, "the registry gave no digest: look at its log")


def pull(engine: Engine, reference: str) -> str:
    """Pull `reference`; what the engine knows it as.

    Raises:
        InputError: the registry has no such image, or can't be reached.
    """
    with talking(engine.url, "pull"):
        for _ in _checked(engine.api.pull(reference, stream=True, decode=True), engine.url, "pull", reference):
            pass
    return reference


def _split(image: str) -> tuple[str, str]:
    name, _, tag = image.partition("@")[0].rpartition("/")[2].partition(":")
    folder = image.partition("@")[0].rpartition("/")[0]
    return f"{folder}/{name}" if folder else name, tag or "latest"


def _checked(events: Iterator[dict[str, Any]], where: str, doing: str, image: str) -> Iterator[dict[str, Any]]:
    for event in events:
        if "error" in event:
            raise InputError(where, doing, image, " ".join(str(event["error"]).split()))
        yield event
