"""Prompts of an exact number of tokens, all different, from a seed.

| kind | what is sent | exact |
| --- | --- | --- |
| `Ids` | a list of random token ids below the vocabulary's size | yes, on every server that takes ids (vLLM, SGLang, ours) |
| `Words` | random common English words, each one token in most vocabularies | about |
| `Texts` | text that a given tokenizer encodes to that many tokens | yes, for that tokenizer, special tokens aside |

Random prompts share no prefix, so that a prefix cache finds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from systems.common.errors import InputError
from systems.common.workloads.streams import stream

Prompt = str | list[int]

_COMMON = (
    "the of and to in is that for it was on are as with his they at be this from have or by one had not but what all were when"
    " we there can an your which their said if do will each about how up out them then she many some so these would other into"
    " has more her two like him see time could no make than first been its who now people my made over did down only way find"
    " use may water long little very after words called just where most know"
)
WORDS = tuple(_COMMON.split())
"""The commonest English words: one token each, with the space before them, in byte-pair vocabularies of 32,000 and more."""


class Prompts(Protocol):
    """Makes prompts; calls in the same order give the same prompts."""

    def make(self, tokens: int) -> Prompt:
        """A prompt of `tokens` tokens."""
        ...


class Ids:
    """Token ids, uniform below `vocab`, without those of `special`."""

    def __init__(self, seed: int, vocab: int, special: frozenset[int] = frozenset()) -> None:
        """Raises InputError when `vocab` leaves no id to choose."""
        if vocab - len(special) < 1:
            raise InputError("load", "--vocab", vocab, "give the size of the model's vocabulary")
        self._rng = stream(seed, "prompts")
        self._usable = np.array(sorted(set(range(vocab)) - special)) if special else None
        self._vocab = vocab

    def make(self, tokens: int) -> list[int]:
        """`tokens` ids."""
        if self._usable is None:
            ids: list[int] = self._rng.integers(0, self._vocab, size=tokens).tolist()
        else:
            ids = self._rng.choice(self._usable, size=tokens).tolist()
        return ids


class Words:
    """Common words, for servers that take no ids and whose tokenizer is not at hand."""

    def __init__(self, seed: int) -> None:
        self._rng = stream(seed, "prompts")

    def make(self, tokens: int) -> str:
        """`tokens` words."""
        return " ".join(WORDS[place] for place in self._rng.integers(0, len(WORDS), size=tokens).tolist())


class Texts:
    """Text of an exact length under a tokenizer: random ids, decoded; grown or cut until it encodes to the right number."""

    ROUNDS = 50

    def __init__(self, seed: int, folder: Path) -> None:
        """`folder` holds a `tokenizer.json`. Raises InputError when it can't be read or `tokenizers` is not installed."""
        self._tokenizer = load_tokenizer(folder)
        self._ids = Ids(seed, *usable(self._tokenizer))

    def make(self, tokens: int) -> str:
        """Text of `tokens` tokens. Raises InputError when the tokenizer allows none (that has not been seen)."""
        ids = self._ids.make(tokens)
        for _ in range(self.ROUNDS):
            text = self._tokenizer.decode(ids)
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(ids) == tokens:
                return str(text)
            ids = ids[:tokens] + self._ids.make(max(0, tokens - len(ids)))
        raise InputError("load", "--tokenizer", tokens, "no text of so many tokens found: use --prompts ids")


def usable(tokenizer: Any) -> tuple[int, frozenset[int]]:  # noqa: ANN401 - the library has no types
    """The size of its vocabulary, and the ids that are no text (special and added tokens)."""
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    return size, frozenset(place for place in tokenizer.get_added_tokens_decoder() if place < size)


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    """The tokenizer of the Hugging Face model folder `folder`.

    Raises InputError when there is none, it can't be read or `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError("load", "--tokenizer", str(folder), "needs the package tokenizers: `make torch`") from error
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    if not path.is_file():
        raise InputError("load", "--tokenizer", str(folder), "give a folder with a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # whatever its Rust side raises is about this file
        raise InputError("load", "--tokenizer", str(path), f"not a tokenizer: {error}") from error
