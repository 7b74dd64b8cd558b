"""What an image is made of, and the name that says so: the same recipe, the same name, so nothing is built twice."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness import provenance
from harness.containers import wheelhouse
from harness.containers.context import Content, checksum, tracked
from harness.containers.models import FOLDER, Base, Image, Site
from harness.containers.render import Facts, render
from systems.registry import InputError

NAME = "fivefold"


@dataclass(frozen=True, slots=True)
class Recipe:
    """One image of ours, ready to be built: everything but the wheels, which its lock files determine."""

    root: Path
    name: str
    image: Image
    base: Base
    site: Site
    files: Mapping[str, Content]
    key: str

    @property
    def reference(self) -> str:
        """What the image is called: its tag is the recipe's."""
        return f"{NAME}/{self.name}:{self.key[:12]}"

    @property
    def base_reference(self) -> str:
        """The image that it is made on at this site."""
        return self.site.bases.get(self.image.base, self.base.image)

    def facts(self, base_id: str) -> Facts:
        """The labels of a build on the base with this identity."""
        commit = provenance.commit(self.root)
        locks = b"\0".join((self.root / lock).read_bytes() for lock in self.image.locks)
        labels = {
            "recipe": self.key,
            "commit": str(commit["commit"]),
            "dirty": str(commit["dirty"]).lower(),
            "lock": hashlib.sha256(locks).hexdigest(),
            "base": self.base_reference,
            "base-id": base_id,
        }
        return Facts(labels)

    def context(self, base_id: str) -> dict[str, Content]:
        """All files that the engine is sent, wheels too if the site wants them.

        Raises:
            InputError: the wheels cannot be made here.
        """
        dockerfile = render(self.root / FOLDER, self.name, self.image, self.base, self.site, self.facts(base_id))
        files = {**self.files, "Dockerfile": dockerfile.encode()}
        if self.site.packages == "wheelhouse":
            locks = [self.root / lock for lock in self.image.locks]
            folder = wheelhouse.wheels(locks, self.base.python, self.image.index_url)
            files |= {f"packages/wheels/{wheel.name}": wheel for wheel in folder.glob("*.whl")}
        return files


def recipe(root: Path, name: str, image: Image, base: Base, site: Site) -> Recipe:
    """The recipe of the image `name`, from the files below `root` as they are now.

    Raises:
        InputError: the template is wrong, a lock file is missing, or git does not know the code that goes in.
    """
    dockerfile = render(root / FOLDER, name, image, base, site)
    files: dict[str, Content] = {f"packages/{Path(lock).name}": _lock(root, lock, site) for lock in image.locks}
    files |= {f"code/{path.as_posix()}": root / path for path in tracked(root, image.code)}
    key = checksum({**files, "Dockerfile": dockerfile.encode()})
    return Recipe(root, name, image, base, site, files, key)


def _lock(root: Path, lock: str, site: Site) -> bytes:
    try:
        text = (root / lock).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(root / lock, "lock", error.strerror, "write it with `make lock`, or name another one") from error
    return (wheelhouse.pins(text) if site.packages == "wheelhouse" else text).encode()
