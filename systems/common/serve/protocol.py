"""Bodies of requests: what OpenAI's API and vLLM's additions to it say, as far as the engine can do it.

A field that is not here, or a value that the engine cannot honour, is refused and named: nothing is ignored in silence. The
exceptions are `user`, `metadata` and `store`, which have no effect on an answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from systems.common.serve.http import HttpError

Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
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
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stop_token_ids: list[int] | None = None
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

    prompt: str | Tokens | Annotated[list[str | Tokens], Field(min_length=1)]
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
    content: str | list[Part]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class Chat(Common):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    response_format: Literal[None] = None


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
    given = repr(first.get("input"))
    shown = given if len(given) <= 80 else given[:77] + "..."
    if first["type"] == "missing":
        return field, "is missing"
    if first["type"] == "extra_forbidden":
        return ".".join(place), "is not a field that this server knows"
    alike = [c["msg"] for c in complaints if c["loc"] and c["loc"][0] == first["loc"][0]]
    return field, f"{'; or '.join(dict.fromkeys(alike))} (got {shown})"
