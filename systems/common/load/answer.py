"""From the events of one streamed answer to the times of its tokens, and what was wrong with it. Pure.

How many tokens an event carries is what the server's usage says, where it counts along (`continuous_usage_stats`: vLLM,
SGLang, ours); elsewhere an event with text is one token, and the usage at the end corrects the total.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from systems.common.load.wire import BadResponseError, EventReader

DONE = b"[DONE]"
MOST_TOKENS = 10_000_000
"""A server that counts more in one request is not believed."""
MOST_TEXT = 300
"""Characters of an error message that are kept."""


class ServerError(Exception):
    """The server answered with an error: `kind` as metrics count it, and what it said."""

    def __init__(self, kind: str, message: str) -> None:
        """`kind` is `http-404` or `server-error`."""
        super().__init__(message)
        self.kind = kind


class CutShortError(ValueError):
    """The stream ended, or broke off, before the answer did."""


class Answer:
    """What came back for one request; all times are on the clock that `body` is called with.

    Attributes:
        token_s: when each output token came; tokens of one event share its time.
        events: events that carried tokens.
        prompt_tokens, completion_tokens: as the server's usage counts them; None where it does not.
        finished: whether the server said that the answer is complete.
    """

    __slots__ = ("_counted", "_error", "_events", "completion_tokens", "events", "finished", "prompt_tokens", "token_s")

    def __init__(self) -> None:
        self._events = EventReader()
        self._error = b""
        self._counted = 0
        self.token_s: list[float] = []
        self.events = 0
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.finished = False

    @property
    def first_token_s(self) -> float:
        """When the first token came; NaN without one."""
        return self.token_s[0] if self.token_s else math.nan

    @property
    def last_token_s(self) -> float:
        """When the last token came; NaN without one."""
        return self.token_s[-1] if self.token_s else math.nan

    @property
    def output_tokens(self) -> int:
        """How many tokens the answer has: the server's own count where it gave one."""
        return len(self.token_s) if self.completion_tokens is None else self.completion_tokens

    def body(self, now_s: float, status: int, piece: bytes) -> None:
        """A piece of the body, received at `now_s`.

        Raises:
            BadResponseError: an event is no JSON of the expected shape.
            ServerError: the server reports an error inside its stream.
        """
        if status != 200:
            self._error += piece[: 4 * MOST_TEXT - len(self._error)]
            return
        for data in self._events.feed(piece):
            if data == DONE:
                self.finished = True
            else:
                self._event(now_s, data)

    def end(self, status: int) -> None:
        """The response is over.

        Raises:
            ServerError: `status` is not 200.
            CutShortError: the stream ended before the answer did.
        """
        if status != 200:
            raise ServerError(f"http-{status}", message(self._error))
        if self._events.pending or not self.finished:
            raise CutShortError("the stream ended before the answer did")

    def _event(self, now_s: float, data: bytes) -> None:
        try:
            event = json.loads(data)
            if not isinstance(event, dict):
                raise TypeError
            if "error" in event or event.get("object") == "error":
                raise ServerError("server-error", message(data))
            self._count(now_s, event)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError) as error:
            raise BadResponseError(f"not an event of a completion: {data[:80]!r}") from error

    def _count(self, now_s: float, event: Mapping[str, Any]) -> None:
        choice = event["choices"][0] if event["choices"] else {}
        ending = choice.get("finish_reason") is not None
        usage = event.get("usage")
        if usage:
            self.prompt_tokens, self.completion_tokens = _number(usage["prompt_tokens"]), _number(usage["completion_tokens"])
        if not choice:
            return
        new = self.completion_tokens - self._counted if usage and self.completion_tokens is not None else _guess(choice, ending)
        if new > 0:
            self.token_s.extend([now_s] * new)
            self.events += 1
            self._counted += new
        self.finished = self.finished or ending


def _number(said: Any) -> int:  # noqa: ANN401 - from JSON
    number = int(said)
    if not 0 <= number <= MOST_TOKENS:
        raise ValueError
    return number


def _guess(choice: Mapping[str, Any], ending: bool) -> int:
    """1 if an event of an answer whose tokens nobody counts carries one, else 0.

    A completion's token may have no text (half a character), a chat's first event has a role and no token.
    """
    if "delta" in choice:
        return int(any(choice["delta"].get(key) for key in ("content", "reasoning_content", "reasoning")))
    return int(bool(choice.get("text")) or not ending)


def message(body: bytes) -> str:
    """What an error's body says, in one line: the usual places in its JSON, else its text."""
    text = body.decode("utf-8", "replace")
    try:
        said = json.loads(text)
        inner = said.get("error", said) if isinstance(said, dict) else said
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, RecursionError):
        pass
    return " ".join(text.split())[:MOST_TEXT]
