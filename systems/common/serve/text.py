"""Text out of tokens, piece by piece: an incremental detokeniser, and stop strings across any boundary.

Both are pure, and both promise the same: however the input is cut into pieces, the pieces joined are the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

HOLE = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet one."""
CONTEXT_TOKENS = 5
"""Tokens of the prompt that are decoded along with the first ones, for decoders that treat a text's beginning specially."""

LONGEST_DOUBT = 64
"""Tokens without a whole character after which holes are taken for what they are: a character has four bytes at most."""


class Detokenizer:
    """Text of a growing list of tokens.

    It decodes a short window again with every push: from a place known to be between two characters. What might still change
    (a character whose last bytes have not come) is held back.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        """`decode` turns tokens into text; the last tokens of `prompt` are context and never returned."""
        self._decode = decode
        self._window = list(prompt[-CONTEXT_TOKENS:])
        known = decode(self._window) if self._window else ""
        if known.endswith(HOLE):  # a prompt that ends within a character: its bytes are not the answer's
            self._window, known = [], ""
        self._known = len(known)
        """Characters of the window's text that have been returned (or are the prompt's)."""
        self._fresh = len(self._window)
        """Tokens of the window whose text has been returned whole."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` make certain."""
        pieces = []
        for token in tokens:
            self._window.append(token)
            text = self._decode(self._window)
            if text.endswith(HOLE):
                sure = len(text.rstrip(HOLE))
                pieces.append(text[self._known : sure])
                self._known = max(self._known, sure)
                if len(self._window) > LONGEST_DOUBT:
                    pieces.append(self._let_go(text))
            else:
                pieces.append(text[self._known :])
                self._slide(text)
        return "".join(pieces)

    def flush(self) -> str:
        """The text held back, when no more tokens come."""
        rest = self._decode(self._window)[self._known :]
        self._known += len(rest)
        return rest

    def _let_go(self, text: str) -> str:
        """Return all of a long window but what its last tokens may still become, and forget it: else every push costs more."""
        for kept in range(4, 8):
            first, last = self._window[:-kept], self._window[-kept:]
            size = len(decoded := self._decode(first))
            if decoded + self._decode(last) == text:  # else the cut would go through a character
                piece = text[self._known : size]
                self._window, self._known, self._fresh = last, max(0, self._known - size), 0
                return piece
        return ""

    def _slide(self, text: str) -> None:
        """The window ends between two characters: what came before its newest tokens need not be decoded again."""
        newest = self._window[self._fresh :]
        alone = self._decode(newest)
        self._window, self._known, self._fresh = newest, len(alone), len(newest)


class StopStrings:
    """Cuts a text where the first of some strings is complete, and holds back what may yet become one.

    First is the string that ends first; of several that end together, the longest. That does not depend on the pieces.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.met = False
        """Whether a stop string has come; nothing is returned after it."""

    def push(self, piece: str) -> str:
        """The text that may go out now: never a stop string, nor what may be the beginning of one."""
        if self.met:
            return ""
        if not self._strings:
            return piece
        text = self._held + piece
        ends = [(at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0]
        if ends:
            self.met, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


class Answer:
    """The text of one answer: tokens in, text out, stop strings seen to."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        """`stop` strings that begin within the first `min_tokens` tokens do not count."""
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop)
        self._spared = min_tokens
        self.tokens = 0
        """Tokens taken in, the one that completed a stop string included."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.met

    def push(self, tokens: Sequence[int]) -> str:
        """The text that may go out; what follows a stop string is dropped, tokens and text."""
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            piece = self._detokenizer.push((token,))
            pieces.append(piece if self.tokens <= self._spared else self._stops.push(piece))
        return "".join(pieces)

    def finish(self) -> str:
        """The text held back at the end."""
        if self.stopped:
            return ""
        last = self._stops.push(self._detokenizer.flush())
        return last + self._stops.flush()
