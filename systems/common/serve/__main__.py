"""`python -m systems.common.serve`: see `docs/serving.md`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from systems.common.errors import InputError
from systems.common.serve.config import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; the exit code (`server` lists them)."""
    try:
        config = parse(arguments)
        try:
            from systems.common.serve.server import serve  # PyTorch and uvicorn: not needed for --help
        except ModuleNotFoundError as error:
            raise InputError("serve", "import", error.name, "not installed: run `make torch`") from error
        return serve(config)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
