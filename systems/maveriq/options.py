"""What the commands share: a parser whose complaints are one line, and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from systems.common.errors import InputError

UNUSABLE, INTERRUPTED = 2, 130


class OneLineParser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, as every other error here: it raises InputError."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as an InputError."""
        raise InputError("command line", "options", message, "see --help")


def run_command(command: Callable[[], int]) -> int:
    """The exit code of `command`: 2 and one line on stderr for bad input, 130 for Ctrl+C, 0 when its reader has left."""
    try:
        return command()
    except InputError as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # closing stdout again must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
