# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Merging adapters into the weights, and keeping the weights what they are.

A merge, an unmerge and a direct change a -> b are one pass each: every matrix is read once and written once (sheet, 2.3).
Adding and taking out again in 16 bits does not restore a weight: each pass rounds once, and the roundings pile up. Two schemes:

* `Copy` (default where it fits): the pristine weights stay, unmerged batches read them; merged batches read a second set of the
  layers' matrices, which every merge makes from the pristine ones. Exact by construction: what is served depends on the
  adapter alone, not on what was merged before. Unmerging costs nothing, nor does merging again what was merged last, and a
  merge can run while unmerged batches go on. Costs the layers' bytes once more (12.95 GB of Llama-2-7B).
* `InPlace`: one set of weights, a -> b as W += [B_b | -B_a] [A_b; A_a]. After N passes a weight is off by at most
  ((1 + u)^N - 1) (|W| + |largest merged delta|), u the unit roundoff (`drift_bound`); a pristine copy in host memory is
  brought back after `restore_every` passes (12.95 GB at 55 GB/s: 0.24 s), so N never exceeds that.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from systems.common.errors import InputError
from systems.common.torch_engine.linear import Linear
from systems.common.torch_engine.lora import matrices
from systems.common.torch_engine.quantised import Quantised
from systems.common.torch_engine.weights import Layer, Weights
from systems.dlora.lora_engine.passes import Passes

SAFETY = 4 * 2.0**-24
"""The sums in float32 before a pass rounds: at most four roundings, which matter only to float32 weights."""


UNKNOWN = -1
RESTORE_EVERY = 20
"""Passes in place before the pristine weights come back: a bound of 1 % in float16, 8 % in bfloat16."""


def drift_bound(dtype: torch.dtype, passes: int) -> float:
    """Most that `passes` passes in place can move a weight, as a share of |W| + |largest merged delta|."""
    return math.expm1(passes * math.log1p(torch.finfo(dtype).eps / 2 + SAFETY))


def layer_bytes(weights: Weights) -> int:
    """Bytes of the matrices that adapters change."""
    return sum(m.weight.numel() * m.weight.itemsize for layer in weights.layers for m in matrices(layer).values())


class MergedWeights(Protocol):
    """A scheme.

    Attributes:
        merged: slot of the adapter that `for_merged` holds; 0 for none, `UNKNOWN` for one that has left its slot.
        passes: passes over the weights so far.
    """

    merged: int
    passes: int

    @property
    def for_merged(self) -> Weights:
        """What batches of the merged adapter read."""
        ...

    @property
    def for_unmerged(self) -> Weights:
        """What unmerged batches read; valid after `unmerge` only."""
        ...

    def merge(self, slot: int) -> None:
        """Launch what is needed so that work launched afterwards finds the adapter of `slot` merged in `for_merged`."""
        ...

    def unmerge(self) -> None:
        """Launch what is needed so that work launched afterwards finds pristine weights in `for_unmerged`."""
        ...

    def warm(self) -> None:
        """Capture what a pass over the weights needs, before serving: nothing is merged then."""
        ...

    def forget(self, slot: int) -> None:
        """`slot` will hold another adapter: what was merged from it is no longer valid."""
        ...


class Copy:
    """See the module: pristine weights for unmerged batches, a copy of the layers' matrices for merged ones."""

    def __init__(self, weights: Weights, passes: Passes) -> None:
        """Raises torch.OutOfMemoryError when the copy does not fit, InputError for quantised weights."""
        _check(weights)
        self._pristine, self._passes = weights, passes
        self._served = Weights(
            weights.embedding, weights.positions, [_twin(layer) for layer in weights.layers], weights.norm, weights.head
        )
        self.merged = self.passes = 0

    @property
    def for_merged(self) -> Weights:
        """See `MergedWeights`."""
        return self._served

    @property
    def for_unmerged(self) -> Weights:
        """See `MergedWeights`. Always pristine."""
        return self._pristine

    def merge(self, slot: int) -> None:
        """See `MergedWeights`. Free when `slot` was merged last."""
        if slot != self.merged:
            self._passes.run(self._pristine, self._served, 0, slot)
            self.merged, self.passes = slot, self.passes + 1

    def unmerge(self) -> None:
        """See `MergedWeights`. Nothing to do: `merged` stays what the copy holds."""

    def warm(self) -> None:
        """See `MergedWeights`."""
        self._passes.run(self._pristine, self._served, 0, 0)
        self.merged = 0

    def forget(self, slot: int) -> None:
        """See `MergedWeights`."""
        if self.merged == slot:
            self.merged = UNKNOWN


class InPlace:
    """See the module: one set of weights, brought back from host memory after `restore_every` passes (0: never)."""

    def __init__(self, weights: Weights, passes: Passes, restore_every: int = RESTORE_EVERY) -> None:
        """Raises InputError for quantised weights."""
        _check(weights)
        self._weights, self._passes, self._every = weights, passes, restore_every
        self.merged = self.passes = self.restores = self._since = 0
        pin = weights.layers[0].qkv.weight.is_cuda
        self._pristine: list[dict[str, Tensor]] = []
        for layer in weights.layers if restore_every else []:
            kept = {site: m.weight.cpu() if pin else m.weight.clone() for site, m in matrices(layer).items()}
            self._pristine.append({site: t.pin_memory() if pin else t for site, t in kept.items()})

    @property
    def for_merged(self) -> Weights:
        """See `MergedWeights`."""
        return self._weights

    @property
    def for_unmerged(self) -> Weights:
        """See `MergedWeights`. The same matrices: call `unmerge` first."""
        return self._weights

    def merge(self, slot: int) -> None:
        """See `MergedWeights`. One pass, whatever was merged before."""
        if slot == self.merged:
            return
        if self._every and self._since >= self._every:
            self.restore()
        if slot != self.merged:
            self._passes.run(self._weights, self._weights, self.merged, slot)
            self.merged, self.passes, self._since = slot, self.passes + 1, self._since + 1

    def unmerge(self) -> None:
        """See `MergedWeights`. One pass."""
        self.merge(0)

    def warm(self) -> None:
        """See `MergedWeights`. A pass that adds nothing changes no bit."""
        self._passes.run(self._weights, self._weights, 0, 0)

    def forget(self, slot: int) -> None:
        """See `MergedWeights`. The merged adapter's matrices are needed to take it out: its slot is pinned."""
        assert slot != self.merged, "the merged adapter's slot is pinned"

    def restore(self) -> None:
        """Bring the pristine weights back; nothing is merged then."""
        for layer, kept in zip(self._weights.layers, self._pristine, strict=True):
            for site, matrix in matrices(layer).items():
                matrix.weight.copy_(kept[site], non_blocking=True)
        self.merged = self._since = 0
        self.restores += 1


def choose(scheme: str, weights: Weights, passes: Passes, keep_bytes: int = 0) -> Copy | InPlace:
    """The scheme of a name; `auto`: `copy` where the device has room for it and `keep_bytes` more (KV cache), else `in-place`.

    Raises:
        InputError: there is no such scheme, or the weights are quantised.
    """
    if scheme not in ("auto", "copy", "in-place"):
        raise InputError("lora engine", "scheme", scheme, "use auto, copy or in-place")
    if scheme == "auto" and weights.layers[0].qkv.weight.is_cuda:
        torch.cuda.empty_cache()  # what PyTorch keeps for later is free too
        scheme = "copy" if torch.cuda.mem_get_info()[0] >= layer_bytes(weights) + keep_bytes else "in-place"
    return InPlace(weights, passes) if scheme == "in-place" else Copy(weights, passes)


def _twin(layer: Layer) -> Layer:
    """The layer with matrices of its own; norms and biases are shared."""
    qkv, o, up, down = (Linear(m.weight.clone(), m.bias) for m in matrices(layer).values())
    return Layer(layer.norm1, qkv, o, layer.norm2, up, down)


def _check(weights: Weights) -> None:
    if any(isinstance(m, Quantised) for m in matrices(weights.layers[0]).values()):
        raise InputError("lora engine", "weights", "quantised", "adapters cannot be merged into them: serve dense weights")
