"""The next token, chosen on the device: greedy, or by temperature and top-p.

A draw depends on the request's seed and the token's position alone, never on which other requests are in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request wants its tokens.

    `temperature` 0 is greedy. Generation ends early after one of `stop_tokens`, none of which is chosen before there are
    `min_tokens` tokens (as in vLLM).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()
    min_tokens: int = 0

    def __post_init__(self) -> None:
        assert self.temperature >= 0 and 0 < self.top_p <= 1, self


@dataclass(frozen=True, slots=True)
class Wants:
    """How the rows of a batch want their tokens, on the device.

    Attributes:
        temperature, top_p, seeds: [rows]; no `top_p` where all rows keep everything.
        banned: row, token, and the position before which that token must not come there; [3, bans], None where there are none.
    """

    temperature: Tensor
    top_p: Tensor | None
    seeds: Tensor
    banned: Tensor | None

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        """A token for each row of `logits` [rows, vocab], which come to stand at `positions` [rows]. May overwrite `logits`."""
        count = len(logits)
        if self.banned is not None:
            forbid(logits, self.banned, positions)
        top_p = None if self.top_p is None else self.top_p[:count]
        return sample(logits, self.temperature[:count], top_p, uniform(self.seeds[:count], positions))


def forbid(logits: Tensor, banned: Tensor, positions: Tensor) -> None:
    """Make tokens impossible in place: each of `banned` (see `Wants`) whose row's position lies before its own."""
    rows, tokens, until = banned
    logits[rows, tokens] = torch.where(positions[rows] < until, float("-inf"), logits[rows, tokens])


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) per row, the same on every device: splitmix64's mixing of (seed, position)."""
    x = seeds * 0x5851F42D4C957F2D + positions * 0x14057B7EF767814F + 0x1E3779B97F4A7C15  # int64, wraps
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((x >> 40) & 0xFFFFFF).to(torch.float32) / (1 << 24)


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor | None, draw: Tensor) -> Tensor:
    """One token per row of `logits` [rows, vocab], by inverting the cumulative distribution at `draw` [rows].

    Rows of temperature 0 take the likeliest token. `top_p` keeps the likeliest tokens up to that mass (None: all, and no sort).
    """
    hot = torch.where(temperature > 0, temperature, 1.0)[:, None]
    mass = torch.softmax(logits.float() / hot, -1)
    token = _invert(mass, draw)
    if top_p is not None:
        mass, order = torch.sort(mass, dim=-1, descending=True, stable=True)
        share = top_p.clamp_min(torch.finfo(torch.float32).tiny)  # the likeliest is always kept
        kept = torch.where(mass.cumsum(-1) - mass < share[:, None], mass, 0.0)
        # rows that keep everything are not read off the sorted side: their token must not depend on their neighbours
        token = torch.where(top_p < 1, order.gather(-1, _invert(kept, draw)[:, None])[:, 0], token)
    return torch.where(temperature > 0, token, logits.argmax(-1))


def _invert(mass: Tensor, draw: Tensor) -> Tensor:
    """Where the cumulative sum of `mass` [rows, n] passes the share `draw` [rows] of its total; never a place without mass."""
    below = mass.cumsum(-1)
    place = torch.searchsorted(below, (draw * below[:, -1])[:, None], right=True)
    last = mass.shape[-1] - 1 - (mass > 0).to(torch.int8).flip(-1).argmax(-1, keepdim=True)
    return torch.minimum(place, last)[:, 0]
