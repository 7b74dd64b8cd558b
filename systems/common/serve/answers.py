"""Bodies of answers: whole ones and pieces, of completions and of chats."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Style:
    """How one request's answer is written. `chat`: as a conversation; `ids`: with the tokens themselves."""

    id: str
    model: str
    chat: bool
    ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        """The answer in one."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices, "usage": usage}

    def choice(self, index: int, text: str, tokens: list[int], end: str) -> dict[str, Any]:
        """One prompt's answer in the whole."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._choice(index, said, tokens, end)

    def piece(self, choices: list[dict[str, Any]], usage: Mapping[str, int] | None, told: bool) -> dict[str, Any]:
        """A piece of a stream; `told`: the user asked for `usage`, which is null where it does not belong."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return {**head, "usage": usage} if told else head

    def part(self, index: int, text: str, tokens: list[int], end: str | None, first: bool = False) -> dict[str, Any]:
        """One prompt's part in a piece."""
        role = {"role": "assistant"} if first else {}
        said = {"delta": {**role, "content": text}} if self.chat else {"text": text}
        return self._choice(index, said, tokens, end)

    def _choice(self, index: int, said: dict[str, Any], tokens: list[int], end: str | None) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": end}
        if self.ids:
            choice["token_ids"] = tokens
        return choice


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """How many tokens went in and came out."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
