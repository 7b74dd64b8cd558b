"""From the streams of a request's prompts to its answer, in one or in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from systems.common.errors import InputError
from systems.common.serve.answers import Style, usage
from systems.common.serve.http import DONE, Exchange, HttpError, event
from systems.common.serve.protocol import Common
from systems.common.serve.streams import EngineDiedError, Stream, Streams
from systems.common.serve.text import Answer


@dataclass(slots=True)
class Part:
    """One prompt of a request on its way: its stream and its text."""

    index: int
    stream: Stream
    answer: Answer
    begun: bool = False
    end: str | None = None


def as_http(error: EngineDiedError | InputError) -> HttpError:
    """What went wrong in the engine, as an answer."""
    if isinstance(error, EngineDiedError):
        return HttpError(500, str(error), code="engine_died")
    return HttpError(400, str(error), error.key)


async def _news(
    streams: Streams, parts: list[Part], wake: asyncio.Event, gone: asyncio.Event
) -> AsyncIterator[tuple[Part, str, list[int]]]:
    """What comes of `parts`: the part, its new text and tokens; `part.end` says that it was the last."""
    open_parts = list(parts)
    while open_parts:
        await wake.wait()
        wake.clear()
        if gone.is_set():
            raise ConnectionResetError
        for part in open_parts:
            tokens, end = part.stream.take()
            if not tokens and end is None:
                continue
            taken = part.answer.tokens
            last_is_stop = end == "stop" and bool(tokens)
            text = part.answer.push(tokens[:-1] if last_is_stop else tokens)
            if part.answer.stopped:
                end = "stop"
                streams.abort(part.stream, "stop")
            elif last_is_stop:
                part.answer.tokens += 1
            if end is not None:
                text += part.answer.finish()
            part.end = end
            yield part, text, tokens[: part.answer.tokens - taken]
        open_parts = [part for part in open_parts if part.end is None]


async def whole(
    streams: Streams, exchange: Exchange, parts: list[Part], style: Style, wake: asyncio.Event, gone: asyncio.Event
) -> None:
    """Answer with everything at once. Raises what went wrong, ConnectionResetError when the client has gone."""
    texts: list[list[str]] = [[] for _ in parts]
    ids: list[list[int]] = [[] for _ in parts]
    async for part, text, tokens in _news(streams, parts, wake, gone):
        texts[part.index].append(text)
        ids[part.index] += tokens
    if any(part.end == "abort" for part in parts):
        raise HttpError(503, "the server ended before the answer was complete", code="aborted")
    choices = [style.choice(p.index, "".join(texts[p.index]), ids[p.index], p.end or "") for p in parts]
    await exchange.json(style.whole(choices, _used(parts)))


async def pieces(
    streams: Streams, parts: list[Part], wanted: Common, style: Style, wake: asyncio.Event, gone: asyncio.Event
) -> AsyncIterator[bytes]:
    """The answer as server-sent events. Raises ConnectionResetError when the client has gone; errors become events."""
    options = wanted.stream_options
    told = options is not None and options.include_usage
    always = options is not None and options.continuous_usage_stats
    try:
        async for part, text, tokens in _news(streams, parts, wake, gone):
            choice = style.part(part.index, text, tokens, part.end, first=not part.begun)
            part.begun = True
            yield event(style.piece([choice], _used([part]) if always else None, told or always))
    except (EngineDiedError, InputError) as error:  # the head is out already: all that is left is an event
        yield event(as_http(error).body)
        return
    if told:
        yield event(style.piece([], _used(parts), told=True))
    yield DONE


def _used(parts: list[Part]) -> dict[str, int]:
    return usage(sum(part.stream.prompt_tokens for part in parts), sum(part.answer.tokens for part in parts))
