"""A base image with Python 3.11 and pip, made of Debian's packages, since no public registry may be in reach.

Packages are unpacked, not configured (a fifth of the time): Python, pip, wheels, useradd and a shell work in it, apt does
not. It holds the CA certificates of the machine that made it, so it stays in that machine's cache and is never published.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from tests.labs import processes
from tests.labs.errors import LabError, LabUnavailableError

NAME = "fivefold-lab/python:3.11"
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin", "LANG": "C.UTF-8"}
_SUITE, _ARCHIVE = "bookworm", "http://deb.debian.org/debian"
_PACKAGES = (
    "base-files", "base-passwd", "bash", "coreutils", "dash", "findutils", "grep", "gzip", "libc-bin", "libstdc++6", "mawk",
    "passwd", "procps", "python3", "python3-pip", "sed", "tar", "util-linux",
)  # fmt: skip
_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
# $1 is the image's root. The users are what base-passwd's own configuration would write; pip may install into the image.
_FINISH = """set -e
cd "$1"
rm -rf usr/share/doc usr/share/man usr/share/info usr/share/locale usr/share/perl* usr/lib/*/perl usr/lib/*/libperl.so* \
  var/cache/apt var/lib/apt/lists usr/lib/python3*/EXTERNALLY-MANAGED
for file in passwd group; do cp "usr/share/base-passwd/$file.master" "etc/$file"; done
mkdir -p etc/ssl/certs
cp {bundle} etc/ssl/certs/ca-certificates.crt
ln -s python3 usr/bin/python
chroot . /sbin/ldconfig
"""
_MAKE_S = 300


def cached(cache: Path | None = None) -> Path:
    """The base image as a tar file for `docker import`, made on first use (5 to 40 seconds) and kept in `cache`.

    Raises:
        LabUnavailableError: Debian's archive is out of reach.
    """
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fivefold" / "labs"
    folder.mkdir(parents=True, exist_ok=True)
    hook = _FINISH.format(bundle=_bundle())
    recipe = hashlib.sha256("\n".join([_SUITE, *_PACKAGES, hook]).encode() + Path(_bundle()).read_bytes()).hexdigest()[:12]
    final = folder / f"python311-{recipe}.tar"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two labs starting at once make it once
        if not final.exists():
            _make(final, folder / f"finish-{recipe}.sh", hook)
    return final


def _make(final: Path, script: Path, hook: str) -> None:
    temporary = final.with_suffix(".new.tar")
    script.write_text(hook)
    try:
        processes.run(
            ["mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(_PACKAGES)}",
             f"--extract-hook=sh {script} \"$1\"", _SUITE, temporary, _ARCHIVE], timeout_s=_MAKE_S,
        )  # fmt: skip
        temporary.replace(final)
    except LabError as error:
        raise LabUnavailableError(f"no base image: {error}") from error
    finally:
        script.unlink()
        temporary.unlink(missing_ok=True)


def _bundle() -> str:
    for path in _BUNDLES:
        if Path(path).is_file():
            return path
    raise LabUnavailableError(f"no CA certificates at {' or '.join(_BUNDLES)}: install ca-certificates")
