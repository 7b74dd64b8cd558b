"""What can go wrong between here and another host. Each text is one line: `host: what: mend`."""

from __future__ import annotations

from systems.registry import InputError


def one_line(text: str, most: int = 400) -> str:
    """`text`, which another machine may have chosen, as one printable line of at most `most` characters."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    words = " ".join(shown.split())
    return words if len(words) <= most else f"{words[: most - 3]}..."


class RemoteError(InputError):
    """Something about another host; entry points print it as any InputError."""

    def __init__(self, host: str, what: str, mend: str) -> None:
        """`host` is its name in the inventory, `what` happened, and this is how to `mend` it."""
        self.host, self.what = host, what
        super().__init__(host, what, "", mend)

    def _line(self) -> str:
        return one_line(f"{self.host}: {self.what}: {self.mend}", 1000)

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str, str]]:  # type: ignore[override]
        return type(self), (self.host, self.what, self.mend)


class PlaceholderError(RemoteError):
    """The inventory only shows what the host would look like."""


class HostKeyError(RemoteError):
    """No key is pinned, or the host shows another one: nothing was sent to it."""


class LoginError(RemoteError):
    """The host refuses this user or this key, or the key cannot be used."""


class UnreachableError(RemoteError):
    """No connection, after all attempts. No command was sent."""


class LostError(RemoteError):
    """The connection ended or fell silent while a command or a transfer was under way: it may have had its effect."""


class CommandTimeoutError(RemoteError):
    """A command took longer than it was given; it was told to end."""


class CommandFailedError(RemoteError):
    """A command ended with another status than 0; `returncode` and `stderr` say more."""

    def __init__(self, host: str, what: str, mend: str, returncode: int = 1, stderr: str = "") -> None:
        """As for RemoteError."""
        self.returncode, self.stderr = returncode, stderr
        super().__init__(host, what, mend)

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str, str, int, str]]:  # type: ignore[override]
        return type(self), (self.host, self.what, self.mend, self.returncode, self.stderr)


class TransferError(RemoteError):
    """Files did not arrive whole; what was there before is as it was."""
