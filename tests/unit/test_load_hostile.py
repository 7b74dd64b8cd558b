"""Servers that count nonsense: an answer that is refused, never a run that is lost."""

from __future__ import annotations

import json

import pytest

from systems.common.errors import InputError
from systems.common.load.answer import MOST_TOKENS, Answer
from systems.common.load.options import extra
from systems.common.load.wire import BadResponseError


def piece(prompt: object, completion: object, end: str | None = None) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return b"data: " + json.dumps({"choices": [{"text": "a", "finish_reason": end}], "usage": usage}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        (1, float("inf")),
        (1, float("nan")),
        (float("-inf"), 1),
        (1, 10**15),
        (1, MOST_TOKENS + 1),
        (-7, 1),
        (1, -1),
        (None, 1),
        ([], 1),
    ],
)
def test_counts_that_cannot_be_are_a_bad_response(prompt: object, completion: object) -> None:
    answer = Answer()
    with pytest.raises(BadResponseError, match="not an event of a completion"):
        answer.body(0.0, 200, piece(prompt, completion))
    assert answer.token_s == []


def test_counts_that_can_be_are_taken() -> None:
    answer = Answer()
    answer.body(1.0, 200, piece(0, 0))
    answer.body(2.0, 200, piece(0, 3, "length"))
    answer.end(200)
    assert answer.token_s == [2.0] * 3 and answer.output_tokens == 3


def test_extra_fields_of_any_depth_are_one_line() -> None:
    with pytest.raises(InputError, match="give a JSON object"):
        extra("[" * 100_000)
