"""The files that say what images there are (`containers/images.yaml`) and what a site has instead (`containers/site.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from harness.references import refuse_secrets
from harness.safe_yaml import read_mapping
from harness.validation import Model, Wrong, suggest, validate
from systems.registry import InputError

FOLDER = Path("containers")
IMAGES = FOLDER / "images.yaml"
SITE = FOLDER / "site.yaml"
LABEL = "org.fivefold"
"""What all our labels begin with."""
REFERENCE = r"^[a-z0-9][A-Za-z0-9._:/@-]*$"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", max_length=63)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Value = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
Reference = Annotated[str, Field(pattern=REFERENCE, max_length=255)]
"""An image as Docker names it: `name:tag`, `host:port/name@sha256:...`."""
Inside = Annotated[str, Field(pattern=r"^(?:[A-Za-z0-9_-][A-Za-z0-9_.-]*/)*[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
"""A path below the root of the project."""
M = TypeVar("M", bound=Model)
DebianPackage = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]


class Base(Model):
    """An image that others are made on."""

    image: Reference
    """Which: by digest, or by a tag with all parts of its version."""
    python: str = Field(pattern=r"^3\.\d+$")
    """The Python in it, once the system packages are there: wheels are made for it."""

    @model_validator(mode="after")
    def _pinned(self) -> Base:
        name, _, tag = self.image.partition("@")[0].rpartition("/")[2].partition(":")
        if "@sha256:" not in self.image and (not tag or tag == "latest"):
            raise Wrong("image", self.image, f"pin it: {name}:<version>, or better {name}@sha256:<digest>")
        return self


class Image(Model):
    """One image of ours."""

    title: str = Field(pattern=r"^[^\x00-\x1f\x7f]+$")
    """What it is for, in a line."""
    template: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*\.Dockerfile\.j2$")
    """Its Dockerfile template in containers/."""
    base: Name
    """A name under `bases`."""
    system_packages: tuple[DebianPackage, ...] = ()
    """Debian packages that it needs and its base lacks."""
    locks: tuple[Inside, ...] = Field(min_length=1)
    """Files of pinned packages, installed one after the other."""
    index_url: str | None = Field(default=None, pattern=r"^https?://[^\s'\"\\$@]+$")
    """A package index to ask besides PyPI for the last of `locks`."""
    code: tuple[Inside, ...] = ()
    """Tracked files and folders that go into it; none where the checkout is mounted."""
    variables: Mapping[Variable, Value] = {}
    """Environment variables of everything that runs in it."""


class ImageFile(Model):
    """`containers/images.yaml`."""

    bases: Mapping[Name, Base]
    """What images are made on."""
    images: Mapping[Name, Image]
    """What images there are."""

    @model_validator(mode="after")
    def _bases_exist(self) -> ImageFile:
        for name, image in self.images.items():
            if image.base not in self.bases:
                raise Wrong(f"images.{name}.base", image.base, f"unknown base{suggest(image.base, sorted(self.bases))}")
        return self

    def image(self, name: str) -> Image:
        """The image called `name`. Raises InputError when there is none."""
        if name not in self.images:
            raise InputError(IMAGES, "images", name, f"no such image{suggest(name, sorted(self.images))}")
        return self.images[name]


class Site(Model):
    """`containers/site.yaml`, not in git: how images are built where the usual base images or indexes are out of reach."""

    bases: Mapping[Name, Reference] = {}
    """An image of this site (in a local registry, or imported) in place of a base; it must have the same Python."""
    packages: Literal["index", "wheelhouse"] = "index"
    """`index`: the build fetches packages itself. `wheelhouse`: this machine fetches them, the build needs no network."""
    index_url: str | None = Field(default=None, pattern=r"^https?://[^\s'\"\\$@]+$")
    """With `packages: index`: this site's mirror of the package indexes, in place of them all."""
    system_packages: bool = True
    """false: the bases of this site have the Debian packages already, and apt is not called."""
    network: Literal["default", "host", "none"] = "default"
    """The network of build steps."""
    registry: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]*(?::\d+)?(?:/[a-z0-9._-]+)*$")
    """Where `push` and `pull` go, such as `registry.example.org:5000/fivefold`."""
    engine: str | None = Field(default=None, pattern=r"^(?:unix:///|ssh://|tcp://)[^\s\x00-\x1f\x7f]+$")
    """The Docker Engine: `unix:///path`, `ssh://user@host`; without it DOCKER_HOST, then this machine's."""


def load_images(root: Path) -> ImageFile:
    """What images there are. Raises InputError for the first thing wrong with the file."""
    return _load(ImageFile, root / IMAGES)


def load_site(path: Path) -> Site:
    """What this site has; without the file nothing special. Raises InputError for the first thing wrong with it."""
    return _load(Site, path) if path.exists() else Site()


def _load(model: type[M], path: Path) -> M:
    data = read_mapping(path)
    refuse_secrets(data, path)
    return validate(model, data, path)
