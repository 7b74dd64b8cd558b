"""Images and containers from the command line.

python -m harness.containers build [NAME...]            what `snakemake containers` does; all images without a name
python -m harness.containers run IMAGE [...] -- argv... a command in a container, with the checkout mounted read-only
python -m harness.containers show NAME                  its Dockerfile
python -m harness.containers push NAME | pull REFERENCE | digest IMAGE
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from harness import cli, provenance
from harness.code_version import ROOT
from harness.config import CONFIG_FILE, load_config
from harness.containers import registry
from harness.containers.build import Built, Outcome, build
from harness.containers.engine import connect
from harness.containers.models import FOLDER, SITE, ImageFile, Site, load_images, load_site
from harness.containers.recipe import Recipe, recipe
from harness.containers.render import render
from harness.containers.runner import digest, run
from harness.containers.specification import Limits, Mount, memory
from harness.datasets import default_cache
from harness.orphans import end_with_parent
from systems.registry import InputError


def recipe_of(root: Path, images: ImageFile, site: Site, name: str) -> Recipe:
    """The recipe of the image called `name`. Raises InputError when there is none, or it cannot be followed."""
    image = images.image(name)
    return recipe(root, name, image, images.bases[image.base], site)


def build_all(args: argparse.Namespace, site: Site) -> int:
    """Build what was named, else everything; a line for each. 1 where one failed, or one that was named is not there."""
    images = load_images(args.root)
    recipes = [recipe_of(args.root, images, site, name) for name in args.names or images.images]
    bad = {Outcome.FAILED, *([Outcome.NOT_BUILDABLE] if args.names else [])}
    outcomes = set()
    with connect(args.engine or site.engine) as engine:
        for wanted in recipes:
            built = build(engine, wanted, args.logs, anew=args.anew)
            cli.say(line(built))
            outcomes.add(built.outcome)
    return 1 if outcomes & bad or outcomes == {Outcome.NOT_BUILDABLE} else 0


def line(built: Built) -> str:
    """What became of an image, for people."""
    took = f"  {built.duration_s:.1f} s" if built.duration_s else ""
    return f"{built.name:<12}  {built.outcome:<18}  {built.why or built.reference}{took}"


def run_one(args: argparse.Namespace, site: Site) -> int:
    """Run a command in a container with the checkout read-only, the results to write to and the datasets to read."""
    image = _reference(args, site)
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    limits = Limits(
        memory_bytes=memory(args.memory) if args.memory else None,
        cpus=args.cpus,
        gpus=_gpus(args.gpus),
        wall_s=args.wall_s,
    )
    where = str(args.root.resolve())
    engine = args.engine or site.engine
    variables = _commit(args.root) | _variables(args)
    return run(image, argv, _mounts(args), variables, limits, engine=engine, folder=where, network=args.network)


def _reference(args: argparse.Namespace, site: Site) -> str:
    """What the engine knows an image as: one of ours goes by its short name."""
    images = load_images(args.root)
    return recipe_of(args.root, images, site, args.image).reference if args.image in images.images else str(args.image)


def _mounts(args: argparse.Namespace) -> list[Mount]:
    root, results = args.root.resolve(), args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    config = load_config(root / CONFIG_FILE) if (root / CONFIG_FILE).exists() else None
    mirror = [root / config.dataset_mirror] if config and config.dataset_mirror else []
    datasets = [folder for folder in (*args.datasets, *mirror, default_cache()) if folder.is_dir()]
    missing = [folder for folder in args.datasets if not folder.exists()]
    if missing:
        raise InputError("--datasets", "folder", str(missing[0]), "no such folder")
    seen = {mount.inside: mount for folder in datasets for mount in _under_every_name(folder)}
    return [Mount(root), *seen.values(), Mount(results, writable=True)]


def _under_every_name(folder: Path) -> list[Mount]:
    """A folder where it really is and, when it was named through a link, under that name too: manifests may say either."""
    real, named = folder.resolve(), os.path.abspath(folder)  # noqa: PTH100 (`absolute()` keeps `..`)
    return [Mount(real), *([Mount(real, target=named)] if named != str(real) else [])]


def _variables(args: argparse.Namespace) -> dict[str, str]:
    """Variables by name, with this process's values, and from files: none in a command line, where everyone may read it."""
    found: dict[str, str] = {}
    for path in args.env_file:
        found |= _env_file(path)
    for name in args.env:
        if "=" in name:
            mend = "give only the name: values in a command line can be read by everyone on the machine"
            raise InputError("--env", "variable", name.partition("=")[0], mend)
        if name not in os.environ:
            raise InputError("--env", "variable", name, "set it in the environment first")
        found[name] = os.environ[name]
    return found


def _commit(root: Path) -> dict[str, str]:
    """The commit of the checkout, for provenance: a container has no git to ask."""
    told = provenance.commit(root)
    return {"FIVEFOLD_COMMIT": f"{told['commit']}{'+' if told['dirty'] is True else ''}"}


def _env_file(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, "file", str(error), "name a text file with lines NAME=value") from error
    pairs: dict[str, str] = {}
    for number, text in enumerate(lines, 1):
        name, equals, value = text.strip().partition("=")
        if not name or name.startswith("#"):
            continue
        if not equals:
            raise InputError(path, f"line {number}", "(no `=`)", "write NAME=value")
        pairs[name] = value
    return pairs


def _gpus(text: str) -> tuple[int, ...] | Literal["all"]:
    if text == "all":
        return "all"
    try:
        return tuple(int(word) for word in text.split(",") if word)
    except ValueError as error:
        raise InputError("--gpus", "gpus", text, "write all, or indexes such as 0,1") from error


def show(args: argparse.Namespace, site: Site) -> int:
    """Print a Dockerfile."""
    images = load_images(args.root)
    image = images.image(args.name)
    sys.stdout.write(render(args.root / FOLDER, args.name, image, images.bases[image.base], site))
    return 0


def move(args: argparse.Namespace, site: Site) -> int:
    """Push, pull or name an image; prints what it is called, with its digest."""
    with connect(args.engine or site.engine) as engine:
        if args.command == "push":
            where = args.registry or site.registry
            if not where:
                raise InputError(SITE, "registry", "(absent)", "name one there, or with --registry")
            print(registry.push(engine, _reference(args, site), where))
        elif args.command == "pull":
            print(digest(engine, registry.pull(engine, args.image)))
        else:
            print(digest(engine, _reference(args, site)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.containers", description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    parser.add_argument("--site", type=Path, help=f"what this site has; by default {SITE} of the checkout, where there is one")
    parser.add_argument("--engine", help="unix:///path, ssh://user@host; by default DOCKER_HOST, else this machine's")
    commands = parser.add_subparsers(dest="command", required=True)
    _build_options(commands.add_parser("build", help="build images"))
    _run_options(commands.add_parser("run", help="run a command in a container"))
    commands.add_parser("show", help="print a Dockerfile").add_argument("name")
    for name in ("push", "pull", "digest"):
        command = commands.add_parser(name)
        command.add_argument("image", help="one of ours by its name, or any reference")
        if name == "push":
            command.add_argument("--registry", help="such as registry.example.org:5000/fivefold")
    return parser


def _build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", help="which; all of containers/images.yaml without a name")
    parser.add_argument("--logs", type=Path, default=Path("results", "containers"), help="a log for each goes there")
    parser.add_argument("--anew", action="store_true", help="even if it is up to date")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="one of ours by its name, or any reference")
    parser.add_argument("--results", type=Path, default=Path("results"), help="the one folder that it may write to")
    parser.add_argument("--datasets", type=Path, action="append", default=[], help="a folder that it may read")
    parser.add_argument("--memory", help="such as 8g")
    parser.add_argument("--cpus", type=float)
    parser.add_argument("--gpus", default="", help="all, or indexes such as 0,1")
    parser.add_argument("--network", choices=("none", "host", "bridge"), default="none")
    parser.add_argument("--wall-s", type=float, help="end it after that time, in seconds")
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help="a variable of this environment")
    parser.add_argument("--env-file", type=Path, action="append", default=[], help="a file with lines NAME=value")
    parser.add_argument("argv", nargs=argparse.REMAINDER, help="-- and the command")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _parser().parse_args(argv)
    end_with_parent()
    site = load_site(args.site or args.root / SITE)
    if args.command == "build":
        return build_all(args, site)
    if args.command == "run":
        return run_one(args, site)
    return show(args, site) if args.command == "show" else move(args, site)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
