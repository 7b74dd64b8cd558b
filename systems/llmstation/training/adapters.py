"""The trainable part: low-rank adapters beside frozen weights, their gradients and their optimiser.

All A and B of a model are one flat float32 vector, so the optimiser is one kernel however many there are (AdamW, fused). The
products use copies in the weights' number format, laid out by site: A of a site's modules one below the other, B times alpha
/ rank block by block on a diagonal, so that q, k and v share two products instead of six. `publish` makes these copies after
a step.

    site    low = x A.T;  y = x W.T + low B.T
    back    dlow = dy B;  dB = dy.T low;  dA = dlow.T x;  dx = dy W + dlow A

    x: [tokens, inner]; W: [outer, inner]; A: [parts * rank, inner]; B: [outer, parts * rank]

Gradients lie as the copies do, in float32; the zeros of B's layout have no place in the flat vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.lora import MODULES, Adapter
from systems.common.torch_engine.numerics import DTYPES

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
_PLACES = {
    name.rsplit(".", 1)[1].removesuffix("_proj"): (site, part, name)
    for site, names in MODULES.items()
    for part, name in enumerate(names)
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What is trained and how (sheet 2.5): rank, alpha, the projections adapted, AdamW's learning rate and weight decay."""

    rank: int = 8
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "k", "v")
    lr: float = 3e-4
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError("training", "rank", self.rank, "use a rank of at least 1")
        if not self.targets or set(self.targets) - set(TARGETS) or len(set(self.targets)) < len(self.targets):
            raise InputError("training", "targets", self.targets, f"use some of {', '.join(TARGETS)}, each once")


@dataclass(frozen=True, slots=True)
class Site:
    """One site of one layer: `a` and `b` as the products read them (see the module), and their gradients."""

    a: Tensor
    b: Tensor
    grad_a: Tensor
    grad_b: Tensor


@dataclass(frozen=True, slots=True)
class Module:
    """Where a module's A and B lie in the flat vector and in the copies."""

    layer: int
    name: str
    a: slice
    b: slice


class Adapters:
    """The adapters of one model.

    Attributes:
        flat: every A and B, float32; what the optimiser moves.
        sites: per layer the sites that are adapted, by name.
    """

    def __init__(self, shape: ModelShape, config: LoraConfig, device: torch.device | str) -> None:
        self.shape, self.config, self.scale = shape, config, config.alpha / config.rank
        self.modules: list[Module] = []
        self._places: list[Tensor] = []
        self._scales: list[Tensor] = []
        self._starts: list[Tensor] = []
        self.sites: list[dict[str, Site]] = []
        rooms = self._lay_out()
        size = sum(rows * columns for _, _, rows, columns in rooms)
        with torch.inference_mode(False):
            self._copies = torch.zeros(size, dtype=DTYPES[shape.dtype], device=device)
            self._grads = torch.zeros(size, dtype=torch.float32, device=device)
            self._where = torch.cat(self._places).to(device)
            self._scale = torch.cat(self._scales).to(device)
            self.flat = torch.cat(self._starts).to(device).requires_grad_()
            self.flat.grad = torch.zeros_like(self.flat)
            cuda = self.flat.is_cuda  # capturable: its count of steps lives on the device, for CUDA graphs
            self._optimizer = torch.optim.AdamW(
                [self.flat], lr=config.lr, weight_decay=config.weight_decay, fused=True, capturable=cuda
            )
        del self._places, self._scales, self._starts
        self._sites(rooms)
        self.publish()

    # ---- layout

    def _lay_out(self) -> list[tuple[int, str, int, int]]:
        """Plan the copies: rooms (layer, site, rows, columns), A's and B's in turn; fills `modules` and the start values."""
        shape, rank = self.shape, self.config.rank
        inner = {"qkv": shape.hidden, "o": shape.q_width, "up": shape.hidden, "down": shape.mlp}
        outer = {
            "qkv": (shape.q_width, shape.kv_width, shape.kv_width), "o": (shape.hidden,), "up": (shape.mlp,) * 2,
            "down": (shape.hidden,),
        }  # fmt: skip
        generator = torch.Generator().manual_seed(self.config.seed)
        chosen: dict[str, list[tuple[int, str]]] = {}
        for target in TARGETS:
            if target in self.config.targets:
                site, part, name = _PLACES[target]
                chosen.setdefault(site, []).append((part, name))
        rooms, copied, flat = [], 0, 0
        for layer in range(shape.layers):
            for site, parts in chosen.items():
                wide, tall, rows = inner[site], sum(outer[site]), len(parts) * rank
                for i, (part, name) in enumerate(parts):
                    bound = 1 / math.sqrt(wide)  # Kaiming-uniform with a = sqrt(5), as peft starts A
                    a = torch.empty(rank, wide).uniform_(-bound, bound, generator=generator)
                    top, height = sum(outer[site][:part]), outer[site][part]
                    a_places = copied + torch.arange(i * rank * wide, (i + 1) * rank * wide)
                    grid = (top + torch.arange(height))[:, None] * rows + i * rank + torch.arange(rank)
                    b_places = copied + rows * wide + grid.flatten()
                    ends = flat + rank * wide, flat + rank * (wide + height)
                    self.modules.append(Module(layer, name, slice(flat, ends[0]), slice(*ends)))
                    self._places += [a_places, b_places]
                    self._scales += [torch.ones(rank * wide), torch.full((rank * height,), self.scale)]
                    self._starts += [a.flatten(), torch.zeros(rank * height)]
                    flat = ends[1]
                rooms += [(layer, site, rows, wide), (layer, site, tall, rows)]
                copied += rows * (wide + tall)
        return rooms

    def _sites(self, rooms: list[tuple[int, str, int, int]]) -> None:
        sizes = [rows * columns for _, _, rows, columns in rooms]
        copies, grads = self._copies.split(sizes), self._grads.split(sizes)
        self.sites = [{} for _ in range(self.shape.layers)]
        for i in range(0, len(rooms), 2):
            layer, site = rooms[i][:2]
            (a, b), (grad_a, grad_b) = (
                [part[i + j].view(rooms[i + j][2:]) for j in range(2)] for part in (copies, grads)
            )  # fmt: skip
            self.sites[layer][site] = Site(a, b, grad_a, grad_b)

    # ---- training

    @torch.no_grad()
    def publish(self) -> None:
        """Bring the copies that products read up to date with `flat`."""
        self._copies.index_copy_(0, self._where, (self.flat * self._scale).to(self._copies.dtype))

    def gradient(self) -> Tensor:
        """The gradient of `flat` from what the backward pass left; written to `flat.grad`."""
        assert self.flat.grad is not None
        torch.mul(self._grads.index_select(0, self._where), self._scale, out=self.flat.grad)
        return self.flat.grad

    def step(self) -> None:
        """One optimiser step on the gradients of the backward pass, then `publish`."""
        self.gradient()
        self._optimizer.step()
        self.publish()

    # ---- state

    def state(self) -> dict[str, Tensor]:
        """A copy of the parameters and the optimiser's state; `restore` takes it back."""
        kept = self._optimizer.state.get(self.flat, {})
        return {"flat": self.flat.detach().clone()} | {name: value.clone() for name, value in kept.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go back to `state`, in place: captured graphs go on using the same memory."""
        self.flat.copy_(state["flat"])
        for name, value in self._optimizer.state.get(self.flat, {}).items():
            value.copy_(state[name]) if name in state else value.zero_()
        self.publish()

    def pair(self, module: Module) -> tuple[Tensor, Tensor]:
        """A [rank, inputs] and B [outputs, rank] of a module: views of `flat`."""
        flat, rank = self.flat.detach(), self.config.rank
        return flat[module.a].view(rank, -1), flat[module.b].view(-1, rank)

    def export(self) -> Adapter:
        """The adapters as serving loads them (`AdapterBank.load`); copies."""
        pairs = {f"model.layers.{m.layer}.{m.name}": self.pair(m) for m in self.modules}
        return Adapter({name: (a.clone(), b.clone()) for name, (a, b) in pairs.items()}, self.scale)
