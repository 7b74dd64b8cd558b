"""Text to tokens and back: a model's own tokenizer, or a stand-in where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from systems.common.errors import InputError
from systems.common.serve.config import ServeConfig

Messages = Sequence[Mapping[str, str]]


class Tokenizer(Protocol):
    """What the server needs of a tokenizer.

    Attributes:
        name: what `/v1/models` says of it.
        stop_tokens: tokens that end an answer.
    """

    name: str
    stop_tokens: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; special ones are left out."""
        ...

    def chat(self, messages: Messages) -> list[int]:
        """Tokens of a conversation, up to where the assistant speaks. Raises ValueError where it cannot be written."""
        ...


class Bytes:
    """A stand-in for random weights: a byte of UTF-8 is the token of that number, and token n reads as byte n mod 256."""

    name = "stand-in: one token per byte of UTF-8; a token reads as its number mod 256"
    stop_tokens: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """The bytes as text; those that are no UTF-8 read as U+FFFD."""
        return bytes(token % 256 for token in tokens).decode("utf-8", "replace")

    def chat(self, messages: Messages) -> list[int]:
        """One line per message, `role: content`."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant: ")


class HuggingFace:
    """A tokenizer that transformers has loaded."""

    def __init__(self, loaded: Any, name: str, stop_tokens: frozenset[int]) -> None:  # noqa: ANN401
        self._loaded = loaded
        self.name = name
        self.stop_tokens = stop_tokens

    def encode(self, text: str) -> list[int]:
        """With what the model's own tokenizer puts before a text."""
        return list(self._loaded(text)["input_ids"])

    def decode(self, tokens: list[int]) -> str:
        """Exactly the tokens' text, blanks untouched."""
        return str(self._loaded.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def chat(self, messages: Messages) -> list[int]:
        """By the tokenizer's chat template."""
        if not self._loaded.chat_template:
            raise ValueError("this model's tokenizer has no chat template: use /v1/completions")
        try:
            text = self._loaded.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like (jinja2's TemplateError among others)
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        return list(self._loaded(text, add_special_tokens=False)["input_ids"])


def choose(config: ServeConfig) -> Tokenizer:
    """The tokenizer that a user names, else the one beside the weights, else the stand-in. Raises InputError."""
    if config.tokenizer is not None:
        return load(config.tokenizer)
    if config.gguf is not None:
        return load(config.gguf.parent, config.gguf.name)
    if config.weights is not None and (config.weights / "tokenizer.json").is_file():
        return load(config.weights)
    return Bytes()


def load(folder: Path, gguf: str | None = None) -> HuggingFace:
    """The tokenizer in `folder` (or in its GGUF file `gguf`). Raises InputError where there is none."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}), local_files_only=True)
    except Exception as error:  # transformers raises a dozen kinds for a folder that holds no tokenizer
        raise InputError(folder, "tokenizer", str(error), "name a folder with tokenizer.json, or leave it out") from error
    stops = {loaded.eos_token_id} if loaded.eos_token_id is not None else set()
    return HuggingFace(loaded, f"{type(loaded).__name__} of {folder.name}", frozenset(stops | _generation_stops(folder)))


def _generation_stops(folder: Path) -> set[int]:
    """Further tokens that end an answer, by the folder's generation_config.json."""
    import json

    file = folder / "generation_config.json"
    if not file.is_file():
        return set()
    try:
        stops = json.loads(file.read_text()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise InputError(file, "json", str(error), "not a JSON object: copy it again or remove it") from error
    return {stop for stop in (stops if isinstance(stops, list) else [stops]) if isinstance(stop, int)}
