"""Tokens to text: however the tokens are cut into pieces, the pieces joined are the same text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systems.common.serve.text import Answer, Detokenizer, StopStrings
from systems.common.serve.tokenizers import Bytes

decode = Bytes().decode


def cut(items: list, places: list[int]) -> list[list]:
    """`items` in consecutive pieces (some empty)."""
    edges = [0, *sorted(place % (len(items) + 1) for place in places), len(items)]
    return [items[a:b] for a, b in pairwise(edges)]


def through(decoder: Callable[[list[int]], str], pieces: list[list[int]], prompt: list[int] | None = None) -> str:
    detokenizer = Detokenizer(decoder, prompt or [])
    return "".join([*(detokenizer.push(piece) for piece in pieces), detokenizer.flush()])


tokens = st.one_of(
    st.lists(st.integers(0, 255), max_size=40),
    st.text(max_size=20).map(lambda text: list(text.encode("utf-8", "surrogatepass"))),
)
places = st.lists(st.integers(0, 60), max_size=8)


@given(tokens, places)
def test_bytes_in_any_pieces_give_their_text(ids: list[int], where: list[int]) -> None:
    assert through(decode, cut(ids, where)) == decode(ids)


@given(tokens, tokens, places)
def test_the_prompt_is_context_only(prompt: list[int], ids: list[int], where: list[int]) -> None:
    """After a prompt that ends with a whole character, the text is what the tokens alone say."""
    if not decode(prompt).endswith("\ufffd"):
        assert through(decode, cut(ids, where), prompt) == decode(ids)


def test_a_character_comes_out_once_and_whole() -> None:
    detokenizer = Detokenizer(decode)
    assert [detokenizer.push([byte]) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert detokenizer.push([0xE2, 0x82]) == "" and detokenizer.flush() == "\ufffd" and detokenizer.flush() == ""


TEXTS = ["the quick brown fox", "jumps over the lazy dog", "grüße, 世界! 🙂", "a\n\n  b\tc", "don't  stop"]


@cache
def byte_level() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@cache
def metaspace() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350, special_tokens=[f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:2], trainer)
    return tokenizer


@given(st.lists(st.integers(0, 300), max_size=30), places)
def test_any_tokens_of_a_byte_level_tokenizer(ids: list[int], where: list[int]) -> None:
    tokenizer = byte_level()
    ids = [i % tokenizer.get_vocab_size() for i in ids]
    assert through(tokenizer.decode, cut(ids, where)) == tokenizer.decode(ids)


@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3).map(" ".join), places)
def test_any_text_of_a_sentencepiece_tokenizer(text: str, where: list[int]) -> None:
    """Whose decoder drops the first blank, and writes characters that it does not know as bytes."""
    tokenizer = metaspace()

    def plain(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    encoded = tokenizer.encode(text, add_special_tokens=False).ids
    assert through(plain, cut(encoded, where)) == plain(encoded)


def test_a_blank_after_the_prompt_is_kept() -> None:
    tokenizer = metaspace()
    prompt, answer = (tokenizer.encode(text).ids for text in ("the quick", "brown fox"))
    assert through(tokenizer.decode, [answer], prompt) == " brown fox"
    assert through(tokenizer.decode, [answer]) == "brown fox"


# ---- stop strings

letters = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def first_stop(text: str, strings: list[str]) -> str:
    """The text before the stop string that is complete first (of several, the longest), by trying every end."""
    for end in range(len(text) + 1):
        starts = [end - len(string) for string in strings if text[:end].endswith(string)]
        if starts:
            return text[: min(starts)]
    return text


@given(letters, stops, places)
def test_stop_strings_in_any_pieces(text: str, strings: list[str], where: list[int]) -> None:
    stopper = StopStrings(strings)
    said = "".join([*(stopper.push("".join(piece)) for piece in cut(list(text), where)), stopper.flush()])
    assert said == first_stop(text, strings)
    assert stopper.met == any(string in text for string in strings)


@given(letters, stops, places)
def test_what_went_out_is_never_taken_back(text: str, strings: list[str], where: list[int]) -> None:
    """And nothing is held back that cannot become a stop string."""
    stopper, said, taken = StopStrings(strings), "", ""
    for piece in cut(list(text), where):
        taken += "".join(piece)
        said += stopper.push("".join(piece))
        assert first_stop(text, strings).startswith(said)
        if not stopper.met:
            held = taken[len(said) :]
            assert not held or any(string.startswith(held) and string != held for string in strings)


@given(tokens, st.lists(st.text("ab€ ", min_size=1, max_size=3), max_size=2), st.integers(0, 5), places)
def test_an_answer_does_not_depend_on_the_pieces(ids: list[int], strings: list[str], spared: int, where: list[int]) -> None:
    def told(pieces: list[list[int]]) -> tuple[str, bool, int]:
        answer = Answer(Detokenizer(decode), strings, spared)
        return "".join([*(answer.push(piece) for piece in pieces), answer.finish()]), answer.stopped, answer.tokens

    whole = told([ids])
    assert told(cut(ids, where)) == whole == told([[token] for token in ids])
    if not spared:
        assert whole[0] == first_stop(decode(ids), strings)


def test_tokens_after_a_stop_string_do_not_count() -> None:
    answer = Answer(Detokenizer(decode), ["END"])
    assert answer.push(list(b"say EN")) == "say " and answer.push(list(b"D more")) == ""
    assert answer.stopped and answer.tokens == 7 and answer.finish() == ""


def test_a_stop_string_among_the_first_tokens_is_spared() -> None:
    answer = Answer(Detokenizer(decode), ["x"], min_tokens=3)
    assert answer.push(list(b"axbxc")) == "axb" and answer.stopped


@given(st.lists(st.sampled_from([0x80, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0x82, 0x61]), max_size=400), places)
def test_long_runs_of_broken_bytes_are_the_same_text(ids: list[int], where: list[int]) -> None:
    assert through(decode, cut(ids, where)) == decode(ids)


def test_a_token_costs_the_same_however_long_nothing_but_holes_have_come() -> None:
    decoded = 0

    def counting(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    assert through(counting, [[0x80]] * 5000) == "\ufffd" * 5000
    assert decoded < 5000 * 100
