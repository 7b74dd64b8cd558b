"""Bodies of requests: what OpenAI's API and vLLM's additions to it say, as far as the engine can do it.

A field that is not here, or a value that the engine cannot honour, is refused and named: nothing is ignored in silence. The
exceptions are `user`, `metadata` and `store`, which have no effect on an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from systems.common.serve.http import HttpError

MOST_PROMPTS = 2048
"""Prompts of one request, as OpenAI's API has it."""
MOST_COMPLAINTS = 100
"""Complaints about one body beyond which none is told: a body can have millions, and each costs microseconds."""
SHOWN = 80
"""Characters of a wrong value that an error repeats."""
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
One = Annotated[float, Field(ge=1, le=1)]
Zero = Annotated[float, Field(ge=0, le=0)]


class StreamOptions(BaseModel):
    """`include_usage`: a last piece with the numbers of tokens. `continuous_usage_stats`: with every piece."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Common(BaseModel):
    """What both kinds of request have. `ignore_eos`, `min_tokens`, `stop_token_ids` and `return_token_ids` are vLLM's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    return_token_ids: bool | None = False
    # honoured at these values only
    n: One | None = 1
    presence_penalty: Zero | None = 0
    frequency_penalty: Zero | None = 0
    repetition_penalty: One | None = 1
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    top_k: Literal[-1, 0] | None = None
    min_p: Zero | None = None
    # without effect
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Common):
    """Body of `/v1/completions`."""

    prompt: str | Tokens | Annotated[list[str | Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    echo: Literal[False] | None = False
    suffix: Literal[None] = None
    best_of: One | None = None
    logprobs: Literal[None] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt, text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class Part(BaseModel):
    """A part of a message: text is all that there is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class TextFormat(BaseModel):
    """The format of an answer that is no JSON: the only one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class Chat(Common):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None


class AdapterFolder(BaseModel):
    """Body of `POST /v1/adapters`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    path: str


Body = TypeVar("Body", bound=BaseModel)


def read(body: bytes, kind: type[Body]) -> Body:
    """A request's body as `kind`. Raises HttpError (400) naming the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if (count := error.error_count()) > MOST_COMPLAINTS:
            raise HttpError(400, f"the body: {count} things are wrong with it") from error
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise HttpError(400, f"the body is no JSON: {first['msg']}") from error
        field, complaint = explain(error)
        raise HttpError(400, f"{field}: {complaint}", field) from error


def explain(error: ValidationError) -> tuple[str, str]:
    """The field and what is wrong with it, of the first complaint."""
    complaints = error.errors(include_url=False, include_context=False)
    first = complaints[0]
    place = [str(part) for part in first["loc"]]
    field = place[0] if place else "body"
    shown = brief(first.get("input"))
    if first["type"] == "missing":
        return field, "is missing"
    if first["type"] == "extra_forbidden":
        return brief(".".join(place), str), "is not a field that this server knows"
    alike = [c["msg"] for c in complaints if c["loc"] and c["loc"][0] == first["loc"][0]]
    return field, f"{'; or '.join(dict.fromkeys(alike))} (got {shown})"


def brief(value: object, text: Callable[[object], str] = repr) -> str:
    """A value of a request, as an error shows it: users paste errors, and logs keep them."""
    shown = text(value[: SHOWN + 1] if isinstance(value, str | list) else value)
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
