"""What is sent to a host so that it runs a command: pure text, nothing here connects.

A host is always asked for the same fixed command, which reads one line from its standard input and evaluates it. The
line sets the environment, changes the folder and becomes the command. So neither the user's login shell nor the process
list ever sees more than the fixed text and, in the end, the argv itself: a secret in the environment is in neither.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

# `read` takes no byte beyond the newline, so what follows is the command's own standard input. Single quotes with nothing
# special in them mean the same to every login shell.
BOOTSTRAP = """exec /bin/sh -c '_n=$(printf "\\n_"); _n=${_n%_}; IFS= read -r _s && eval "$_s"'"""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
CANNOT_ENTER = 126


def quote(text: str) -> str:
    """`text` as one word of a shell line, without a newline in it (the variable `_n` stands for one)."""
    if "\0" in text:
        raise ValueError("a command cannot hold a zero byte")
    return shlex.quote(text).replace("\n", "'\"$_n\"'")


def folder(path: str) -> str:
    """The folder `path`, which may begin with `~/`, as one word of a shell line."""
    if path == "~":
        return '"$HOME"'
    return f'"$HOME"/{quote(path[2:])}' if path.startswith("~/") else quote(path)


def line(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: str | None = None,
    greeting: str = "",
    stdin: bool = False,
) -> str:
    """The line that becomes `argv`.

    Args:
        argv: the command, one word each; nothing in it is interpreted by a shell.
        environment: variables on top of the host's own.
        cwd: the folder to run in, absolute or below `~/`; without it, the user's home.
        greeting: printed first, followed by the process's number, so that what login scripts print can be told apart.
        stdin: whether the command reads its standard input from here; else it has none.
    """
    assert argv, "an empty command"
    for name in environment or {}:
        assert _VARIABLE.fullmatch(name), name
    parts = [f"printf '%s %s\\n' {quote(greeting)} $$"] if greeting else []
    parts += [f"export {name}={quote(value)}" for name, value in (environment or {}).items()]
    parts += [f"cd {folder(cwd)} || exit {CANNOT_ENTER}"] if cwd is not None else []
    parts += [f"exec {' '.join(map(quote, argv))}" + ("" if stdin else " </dev/null")]
    return "; ".join(parts)
