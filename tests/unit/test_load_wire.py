"""The bytes of a response, however the network cuts them."""

from __future__ import annotations

import contextlib
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.load.answer import Answer, CutShortError, ServerError, message
from systems.common.load.wire import BadResponseError, EventReader, ResponseReader

bodies = st.lists(st.binary(min_size=1, max_size=40), max_size=8)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(pieces: list[bytes]) -> bytes:
    return (
        HEAD
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%X;x=y\r\n%b\r\n" % (len(p), p) for p in pieces)
        + b"0\r\n\r\n"
    )


def sized(pieces: list[bytes]) -> bytes:
    body = b"".join(pieces)
    return HEAD + b"content-LENGTH: %d\r\n\r\n%b" % (len(body), body)


def unsized(pieces: list[bytes]) -> bytes:
    return HEAD + b"\r\n" + b"".join(pieces)


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


def read(parts: list[bytes]) -> tuple[ResponseReader, bytes]:
    reader, body = ResponseReader(), b""
    for part in parts:
        body += b"".join(reader.feed(part))
    return reader, body


@given(bodies, st.lists(st.integers(0, 10_000), max_size=12), st.sampled_from([chunked, sized, unsized]))
def test_a_body_is_the_same_however_it_was_cut(pieces: list[bytes], places: list[int], framed) -> None:
    reader, body = read(cuts(framed(pieces), places))
    assert body == b"".join(pieces) and reader.status == 200
    assert reader.headers["content-type"] == "text/event-stream"
    assert reader.done is (framed is not unsized)
    assert reader.keep_alive is (framed is not unsized)
    if framed is unsized:
        reader.end()
        assert reader.done and not reader.keep_alive


@given(bodies.filter(bool), st.integers(1, 10_000), st.sampled_from([chunked, sized]))
def test_a_body_that_is_cut_off_is_noticed(pieces: list[bytes], short: int, framed) -> None:
    data = framed(pieces)
    reader, _ = read([data[: -(short % len(data) or 1)]])
    assert not reader.done
    with pytest.raises(BadResponseError):
        reader.end()


@given(st.binary(max_size=300))
def test_nonsense_is_refused_or_waited_on_but_is_no_fault(data: bytes) -> None:
    reader = ResponseReader()
    try:
        reader.feed(data)
    except BadResponseError:
        return
    assert not reader.done


@pytest.mark.parametrize(
    "data",
    [
        b"220 mail.example.org ESMTP\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        HEAD + b"Content-Length: 1\r\n\r\nab",
        b"HTTP/1.1 " + b"x" * 70_000,
    ],
)
def test_what_is_no_http_is_refused(data: bytes) -> None:
    with pytest.raises(BadResponseError):
        ResponseReader().feed(data)


def test_a_server_may_say_continue_and_may_close() -> None:
    reader, body = read([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not\r\nConnection: Close\r\nContent-Length: 2\r\n\r\nno"])
    assert (reader.status, body, reader.done, reader.keep_alive) == (404, b"no", True, False)
    assert read([b"HTTP/1.1 204 Empty\r\n\r\n"])[0].done


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1), max_size=6),
    st.lists(st.integers(0, 999)),
)
def test_events_are_the_same_however_they_were_cut(texts: list[str], places: list[int]) -> None:
    body = b": a comment\n\n" + b"".join(b"event: x\r\ndata: %b\r\n\r\n" % text.encode() for text in texts)
    reader = EventReader()
    found = [event for part in cuts(body, places) for event in reader.feed(part)]
    assert found == [text.encode() for text in texts] and not reader.pending


def test_an_event_of_several_lines_is_one_and_half_an_event_is_pending() -> None:
    reader = EventReader()
    assert list(reader.feed(b"data: a\ndata:b\n\ndata: c")) == [b"a\nb"]
    assert reader.pending


def event(text: str | None, reason: str | None = None, usage: tuple[int, int] | None = None, chat: bool = False) -> bytes:
    said: dict[str, object] = {"delta": {"content": text}} if chat else {"text": text}
    content: dict[str, object] = {"choices": [] if text is None else [{"index": 0, **said, "finish_reason": reason}]}
    if usage:
        content["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def answered(*events: tuple[float, bytes]) -> Answer:
    answer = Answer()
    for now_s, data in events:
        answer.body(now_s, 200, data)
    return answer


def test_tokens_have_the_times_of_their_events() -> None:
    answer = answered((1.0, event("a")), (1.5, event("")), (2.0, event("c", "length")), (2.1, b"data: [DONE]\n\n"))
    answer.end(200)
    assert answer.token_s == [1.0, 1.5, 2.0] and answer.output_tokens == 3 and answer.events == 3
    assert (answer.first_token_s, answer.last_token_s) == (1.0, 2.0)


def test_a_server_that_counts_along_is_believed() -> None:
    answer = answered((1.0, event("a", usage=(7, 1))), (2.0, event("bcd", usage=(7, 4))), (3.0, event("", "length", (7, 4))))
    assert answer.token_s == [1.0, 2.0, 2.0, 2.0]
    assert (answer.prompt_tokens, answer.output_tokens, answer.events) == (7, 4, 2)


def test_the_count_at_the_end_corrects_the_total() -> None:
    answer = answered(
        (1.0, event("a b")), (2.0, event("c", "stop")), (2.1, event(None, usage=(7, 3))), (2.1, b"data: [DONE]\n\n")
    )
    answer.end(200)
    assert answer.token_s == [1.0, 2.0] and answer.output_tokens == 3


def test_a_chat_begins_with_a_role_and_that_is_no_token() -> None:
    role = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}\n\n'
    last = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
    answer = answered((1.0, role), (2.0, event("a", chat=True)), (3.0, event("b", chat=True)), (3.5, last))
    assert answer.token_s == [2.0, 3.0] and answer.finished


@pytest.mark.parametrize(
    "data",
    [b"{", b"[]", b"{}", b"null", b'{"choices": 3}', b'{"choices": [{}], "usage": {}, "x": 1', b'{"choices": ["a"]}', b"\xff"],
)
def test_garbage_is_a_bad_response(data: bytes) -> None:
    with pytest.raises(BadResponseError):
        answered((1.0, b"data: " + data + b"\n\n"))


@given(st.binary(max_size=80))
def test_no_event_is_a_fault_of_ours(data: bytes) -> None:
    with contextlib.suppress(BadResponseError, ServerError):
        answered((1.0, b"data: " + data.replace(b"\n", b" ") + b"\n\n"))


def test_errors_of_the_server_keep_their_kind_and_words() -> None:
    with pytest.raises(ServerError, match="the engine died") as caught:
        answered((1.0, b'data: {"error": {"message": "the engine died"}}\n\n'))
    assert caught.value.kind == "server-error"
    answer = Answer()
    answer.body(1.0, 400, b'{"error": {"mess')
    answer.body(1.0, 400, b'age": "too\\nlong"}}')
    with pytest.raises(ServerError, match="too long") as caught:
        answer.end(400)
    assert caught.value.kind == "http-400"


@pytest.mark.parametrize("events", [[event("a")], [b"data: [DO"], []])
def test_an_answer_without_end_is_cut_short(events: list[bytes]) -> None:
    with pytest.raises(CutShortError):
        answered(*((1.0, data) for data in events)).end(200)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"message": "m"}', "m"),
        (b'{"error": "e"}', "e"),
        (b"<html>\n oops", "<html> oops"),
        (b"\xff", "\ufffd"),
        (b"[1]", "[1]"),
        (b"x" * 999, "x" * 300),
    ],
)
def test_what_an_error_says(body: bytes, text: str) -> None:
    assert message(body) == text
