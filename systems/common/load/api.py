"""The requests that are sent: OpenAI's completions and chat completions, and what some servers understand beyond them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from systems.common.load.connection import Target
from systems.common.load.prompts import Prompt

_FORCED: Mapping[str, object] = {
    "ignore_eos": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
KINDS: Mapping[str, Mapping[str, object]] = {
    "fivefold": _FORCED,
    "openai": {"stream_options": {"include_usage": True}},
    "sglang": _FORCED,
    "vllm": _FORCED,
}
"""Kinds of server, and what is sent to each beyond OpenAI's own fields. All but `openai` take token ids and force an answer's
length; `openai` takes text and may stop early."""

PATHS = {"completions": "/completions", "chat": "/chat/completions"}


@dataclass(frozen=True, slots=True)
class Api:
    """How requests look.

    Attributes:
        target: where they go.
        model: the model's name; a request that names an adapter says `adapter_model` instead, `{adapter}` replaced.
        kind: one of `KINDS`; route: one of `PATHS`.
        extra: further fields of every request's body, which win over the others.
        api_key: sent as a bearer token; never shown.
    """

    target: Target
    model: str
    kind: str = "vllm"
    route: str = "completions"
    adapter_model: str = "{adapter}"
    temperature: float = 0.0
    extra: Mapping[str, object] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)

    def model_for(self, adapter: str | None) -> str:
        """The model name of a request."""
        return self.model if adapter is None else self.adapter_model.replace("{adapter}", adapter)

    def request(self, prompt: Prompt, output_tokens: int, adapter: str | None = None, name: str = "") -> bytes:
        """A whole HTTP request: a streamed answer of `output_tokens` tokens (at most, for kind `openai`).

        `name` goes along as `X-Request-Id`, by which servers log and we match their logs.
        """
        body: dict[str, object] = {
            "model": self.model_for(adapter),
            **self._prompt(prompt),
            "max_tokens": output_tokens,
            "temperature": self.temperature,
            "stream": True,
            **KINDS[self.kind],
            **self.extra,
        }
        data = json.dumps(body, separators=(",", ":")).encode()
        head = [*self._head("POST", PATHS[self.route]), "Content-Type: application/json", "Accept: text/event-stream"]
        head += [f"X-Request-Id: {name}"] if name else []
        return "\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data

    def get(self, path: str) -> bytes:
        """A GET of `path` below the server's base."""
        return "\r\n".join([*self._head("GET", path), "Accept: application/json", "", ""]).encode()

    def hide(self, text: str) -> str:
        """`text` without the key, should a server have repeated it."""
        return text.replace(self.api_key, "(hidden)") if self.api_key else text

    def _head(self, method: str, path: str) -> list[str]:
        head = [f"{method} {self.target.base}{path} HTTP/1.1", f"Host: {self.target.authority}", "User-Agent: fivefold-load"]
        return head if self.api_key is None else [*head, f"Authorization: Bearer {self.api_key}"]

    def _prompt(self, prompt: Prompt) -> dict[str, object]:
        if self.route == "completions":
            return {"prompt": prompt}
        assert isinstance(prompt, str), "a chat takes text"
        return {"messages": [{"role": "user", "content": prompt}]}
