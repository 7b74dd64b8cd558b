"""Where everything goes in a host's `work_dir`."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = ("facts", "sync", "environment", "smoke")
"""What is done on a host, in order; `ready` is the state in which all of it is done."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders below `root`, the host's `work_dir` as an absolute path."""

    root: str

    @property
    def checkout(self) -> str:
        """The project's files, and its environment in `.venv`."""
        return f"{self.root}/checkout"

    @property
    def mirror(self) -> str:
        """The datasets, where the project's configuration looks for them unless told otherwise."""
        return f"{self.root}/shared/data"

    @property
    def wheels(self) -> str:
        """Packages for a host without a network; there only while the environment is made."""
        return f"{self.root}/wheels"

    @property
    def state(self) -> str:
        """What has been done, as JSON."""
        return f"{self.root}/.fivefold.json"

    @property
    def python(self) -> str:
        """The interpreter of the environment."""
        return f"{self.checkout}/.venv/bin/python"

    @property
    def made(self) -> tuple[str, ...]:
        """All that provisioning makes below the root; the state comes last, for without it nobody knows what is ours."""
        dispatched = (f"{self.root}/{name}" for name in ("jobs", "code", "data", "slots", "launch"))
        return (self.checkout, self.mirror, self.wheels, *dispatched, self.state)
