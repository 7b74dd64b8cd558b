"""Secrets stay out of files: a file names one (`env:NAME`, `file:PATH`), and a value that looks like one is refused.

A value in a configuration file ends up in logs, in provenance and in commits; a reference may. No message of this
module ever shows what it refused.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from systems.registry import InputError

HIDDEN = "(hidden)"
REFERENCE = re.compile(r"(?:env:[A-Za-z_][A-Za-z0-9_]*|file:[^\x00-\x1f]+)\Z")
_MEND = "looks like a secret: put it in an environment variable or a file and write env:NAME or file:PATH"
# at the end of a name: TOKENIZERS_PARALLELISM and max_tokens are no secrets
_NAMES = re.compile(r"(?:^|[_.-])(?:pass(?:word|wd|phrase)|secret|token|(?:api|access|private)_?key|credentials?)$", re.I)
# how the tokens of services that people use here begin, keys in PEM, and passwords inside addresses
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}|pypi-[\w-]{16,}|nvapi-[\w-]{16,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s@]+@"
)
_PUBLIC = re.compile(r"sha256:[0-9a-f]{64}|^ssh-\S+ \S+|^(?:ecdsa|sk)-\S+ \S+")  # image digests, public keys
_WORD = re.compile(r"[A-Za-z0-9+=]{20,}")
_RANDOM_BITS = 3.6  # entropy per character: 20 random letters and digits have about 4.1, a counter or a repeated word less


def looks_like_secret(text: str) -> bool:
    """Whether `text` holds a token, a private key, an address with a password in it, or a long random word."""
    if _SHAPES.search(text):
        return True
    return any(_is_random(word) for word in _WORD.findall(_PUBLIC.sub("", text)))


def _is_random(word: str) -> bool:
    kinds = sum(bool(re.search(kind, word)) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    counts = Counter(word).values()
    bits = -sum(n / len(word) * math.log2(n / len(word)) for n in counts)
    return bits > _RANDOM_BITS and (kinds == 3 or bool(re.fullmatch(r"[0-9a-f]{32,}", word)))


def refuse_secrets(data: object, where: str | Path) -> None:
    """Go through everything in `data`, as YAML gave it.

    Raises:
        InputError: some value looks like a secret, or has a name such as `password` and is no reference.
    """
    for keys, value in _leaves(data):
        named = bool(_NAMES.search(keys.rpartition(".")[2])) and not isinstance(value, bool | None)
        if named and not REFERENCE.match(str(value)):
            raise InputError(where, keys, HIDDEN, "is a secret by its name: write env:NAME or file:PATH")
        if isinstance(value, str) and looks_like_secret(value):
            raise InputError(where, keys, HIDDEN, _MEND)


def _leaves(data: object, keys: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _leaves(value, f"{keys}.{key}" if keys else str(key))
    elif isinstance(data, list):
        for place, value in enumerate(data):
            yield from _leaves(value, f"{keys}.{place}" if keys else str(place))
    else:
        yield keys, data


def resolve(text: str, where: str | Path, key: str, environ: Mapping[str, str] | None = None) -> str:
    """What `text` stands for: the variable of `env:NAME`, the content of `file:PATH` less its last newline, else itself.

    Raises:
        InputError: there is no such variable, or no such file that can be read.
    """
    kind, _, name = text.partition(":")
    if not REFERENCE.match(text):
        return text
    if kind == "env":
        found = (os.environ if environ is None else environ).get(name)
        if found is None:
            raise InputError(where, key, text, f"set the environment variable {name}")
        return found
    try:
        return Path(name).expanduser().read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(where, key, text, "name a text file that can be read") from error
