"""What a hostile or a slow client costs: bodies, wrong values by the million, connections that say nothing."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from systems.common.serve import http
from systems.common.serve.http import Exchange, HttpError
from systems.common.serve.protocol import MOST_COMPLAINTS, Chat, Completion, brief, read
from systems.common.serve.silence import Silent

PLAIN: dict[str, Any] = {"model": "tiny", "prompt": [1]}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Completion, {**PLAIN, "prompt": [1.5] * 3000}),
        (Completion, {**PLAIN, "prompt": [[1.5] * 3000] * 3}),
        (Completion, {**PLAIN, "prompt": [{}] * 3000}),
        (Completion, {**PLAIN, "stop_token_ids": ["a"] * 3000}),
        (Chat, {"model": "tiny", "messages": [{"role": 1}] * 3000}),
        (Chat, {"model": "tiny", "messages": [{"role": "user", "content": [1] * 3000}]}),
    ],
)
def test_of_a_million_wrong_values_only_the_first_is_looked_at(kind: type[Completion | Chat], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        kind.model_validate_json(json.dumps(body))
    assert raised.value.error_count() <= 10
    with pytest.raises(HttpError) as refused:
        read(json.dumps(body).encode(), kind)
    assert refused.value.status == 400 and len(str(refused.value)) < 500


def test_a_body_of_unknown_fields_is_not_listed() -> None:
    with pytest.raises(HttpError, match="5000 things are wrong"):
        read(json.dumps({**PLAIN, **{f"x{i}": 1 for i in range(5000)}}).encode(), Completion)
    with pytest.raises(HttpError, match="x0: is not a field"):
        read(json.dumps({**PLAIN, **{f"x{i}": 1 for i in range(MOST_COMPLAINTS)}}).encode(), Completion)


def test_prompts_of_one_request_are_counted() -> None:
    assert len(read(json.dumps({**PLAIN, "prompt": [[1]] * 2048}).encode(), Completion).prompts) == 2048
    with pytest.raises(HttpError, match="at most 2048"):
        read(json.dumps({**PLAIN, "prompt": [[1]] * 2049}).encode(), Completion)


def test_errors_repeat_little_of_what_was_sent() -> None:
    assert brief("a" * 10_000) == repr("a" * 81)[:77] + "..." and brief(10**9) == "1000000000"
    with pytest.raises(HttpError) as refused:
        read(json.dumps({**PLAIN, "k" * 5000: 1}).encode(), Completion)
    assert len(str(refused.value)) < 200


def exchange(*events: dict[str, Any], sent: list[dict[str, Any]] | None = None) -> Exchange:
    """One whose client says `events` and then nothing any more."""
    said = iter(events)

    async def receive() -> dict[str, Any]:
        return next(said, None) or await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(event: Any) -> None:
        if sent is not None:
            sent.append(event)

    return Exchange({"type": "http"}, receive, send)


HALF = {"type": "http.request", "body": b"{", "more_body": True}


def test_a_body_must_come_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_S", 0.01)
    sent: list[dict[str, Any]] = []

    async def slow() -> None:
        one = exchange(HALF, sent=sent)
        with pytest.raises(HttpError) as late:
            await one.body()
        await one.refuse(late.value)

    asyncio.run(slow())
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]


def test_a_half_sent_body_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HURRY_S", 0.01)

    async def ending() -> HttpError:
        one = exchange(HALF)
        reading = asyncio.create_task(one.body())
        await asyncio.sleep(0)
        one.hurry()
        with pytest.raises(HttpError) as ended:
            await reading
        return ended.value

    error = asyncio.run(ending())
    assert error.status == 503 and error.code == "draining"


def test_a_body_is_as_long_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_BODY_BYTES", 4)
    parts = [{"type": "http.request", "body": b"ab", "more_body": True}, {"type": "http.request", "body": b"cd"}]
    assert asyncio.run(exchange(*parts).body()) == b"abcd"
    with pytest.raises(HttpError) as refused:
        asyncio.run(exchange(parts[0], parts[0], parts[0]).body())
    assert refused.value.status == 413


def test_connections_that_never_ask_are_told_from_those_that_do() -> None:
    def cycle(complete: bool) -> SimpleNamespace:
        return SimpleNamespace(response_complete=complete)

    class Connection:
        def __init__(self, of: SimpleNamespace | None) -> None:
            self.cycle = of

    mute, busy, done, steady = Connection(None), Connection(cycle(False)), Connection(cycle(True)), Connection(cycle(True))
    silent = Silent(75.0)
    for now_s in range(0, 75, 5):
        steady.cycle = cycle(True)  # one answer after another, never seen at work
        assert not silent.overdue([mute, busy, done, steady], float(now_s))
    assert silent.overdue([mute, busy, done, steady], 76.0) == [mute, done]
    busy.cycle = cycle(True)
    assert silent.overdue([busy, steady], 77.0) == []
    assert silent.overdue([busy, steady], 153.0) == [busy, steady]
