"""Dockerfiles from templates: a pure function of the template, the image's entry and the facts of this build.

Templates are run in a sandbox, an undefined name is an error, and every value goes through a filter that makes it safe where
it stands (a test holds templates to that): nothing that a file says can add an instruction or a command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, TemplateNotFound
from jinja2.sandbox import ImmutableSandboxedEnvironment

from harness.containers.models import LABEL, REFERENCE, Base, Image, Site
from systems.registry import InputError

#: Which recipe, which commit and whether files differed from it, which lock files, which base.
LABELS = ("recipe", "commit", "dirty", "lock", "base", "base-id")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a build adds to its image as labels (keys of LABELS); none of it changes what the image does."""

    labels: Mapping[str, str]


NO_FACTS = Facts(dict.fromkeys(LABELS, ""))


def render(folder: Path, name: str, image: Image, base: Base, site: Site, facts: Facts = NO_FACTS) -> str:
    """The Dockerfile of `image`.

    Args:
        folder: where the templates are.
        name: what the image is called.
        image: its entry in images.yaml.
        base: the entry of its base there.
        site: what this site has instead.
        facts: labels.

    Raises:
        InputError: the template is missing or wrong, or uses a name that is not defined.
    """
    values = {
        "name": name,
        "title": image.title,
        "template": image.template,
        "base": site.bases.get(image.base, base.image),
        "system_packages": image.system_packages if site.system_packages else (),
        "locks": [Path(lock).name for lock in image.locks],
        "options": {Path(lock).name: options(image, site, lock) for lock in image.locks},
        "variables": dict(sorted(image.variables.items())),
        "code": bool(image.code),
        "labels": {f"{LABEL}.{label}": value for label, value in facts.labels.items()},
        "label_stage": f"{LABEL}.stage",
    }
    try:
        text = _environment(folder).get_template(image.template).render(values)
    except TemplateNotFound as error:
        raise InputError(folder / image.template, "template", str(error), "no such template") from error
    except TemplateError as error:
        raise InputError(folder / image.template, _line(error, folder), str(error), "mend the template") from error
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def options(image: Image, site: Site, lock: str) -> list[str]:
    """What pip is told when it installs what `lock`, one of the image's, pins."""
    if site.packages == "wheelhouse":
        return ["--no-index", "--find-links", "wheels"]  # made, with hashes checked, on this machine
    index = ["--index-url", site.index_url] if site.index_url else []
    more = ["--extra-index-url", image.index_url] if image.index_url and lock == image.locks[-1] and not site.index_url else []
    return ["--require-hashes", *index, *more]


def _environment(folder: Path) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters.update(FILTERS)
    return environment


def _line(error: TemplateError, folder: Path) -> str:
    """Where in the template it went wrong: Jinja rewrites the traceback to template lines."""
    number = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace and number is None:
        if Path(trace.tb_frame.f_code.co_filename).parent == folder:
            number = trace.tb_lineno
        trace = trace.tb_next
    return f"line {number}" if number else "template"


def _words(text: str) -> str:
    """For a comment."""
    return _CONTROL.sub(" ", str(text))


def _word(text: str) -> str:
    """For a name that stands bare."""
    return _checked(text, r"[A-Za-z0-9_.-]+")


def _reference(text: str) -> str:
    """For an image in FROM."""
    return _checked(text, REFERENCE)


def _shell(value: str | Sequence[str]) -> str:
    """For words of a shell command, of which a backslash at the end of a line would be taken by Docker first."""
    text = (
        shlex.join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else shlex.quote(str(value))
    )
    return _checked(text, r"[^\x00-\x1f\x7f\\]*")


def _quoted(text: str) -> str:
    """For the inside of a double-quoted value of ENV or LABEL, where Docker replaces $NAME."""
    return re.sub(r'(["\\$])', r"\\\1", _checked(text, r"[^\x00-\x1f\x7f]*"))


def _checked(text: str, pattern: str) -> str:
    text = str(text)  # what is not defined says so here
    if not re.fullmatch(pattern, text):
        raise TemplateError(f"{text!r} cannot stand here")
    return text


FILTERS: Mapping[str, Callable[..., str]] = {
    "words": _words,
    "word": _word,
    "reference": _reference,
    "shell": _shell,
    "quoted": _quoted,
}
"""What a template may put a value through; there is nothing else that lets one out."""
