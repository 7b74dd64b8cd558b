# mypy: disable-error-code="no-untyped-call, no-any-return"
"""Low-rank adapters beside the shared weights: a bank of them on the device, applied per sequence, or merged into the weights.

One interface, three ways to apply a batch whose sequences use different adapters: `einsum` and `bmm` gather each token's
matrices (any device), `triton` reads them where they lie (prompts: `kernels.grouped_lora`, decoding rows: `lora_rows`). Adapter
0 is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.attention import Chunks
from systems.common.torch_engine.kernels.grouped_lora import grouped_lora
from systems.common.torch_engine.kernels.paged_prefill import TILE_Q
from systems.common.torch_engine.linear import Linear
from systems.common.torch_engine.lora_rows import DecodingRows
from systems.common.torch_engine.numerics import DTYPES
from systems.common.torch_engine.quantised import Quantised
from systems.common.torch_engine.weights import Layer, Weights

MODULES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Sites of a layer that an adapter can change, and the Hugging Face modules that each joins."""
ATTENTION_SITES = ("qkv", "o")


@dataclass(frozen=True, slots=True)
class Adapter:
    """Per module (`model.layers.3.self_attn.q_proj`) A [rank, inputs] and B [outputs, rank]; `scale` is alpha / rank."""

    modules: Mapping[str, tuple[Tensor, Tensor]]
    scale: float = 1.0

    @classmethod
    def from_peft(cls, tensors: Mapping[str, Tensor], rank: int, alpha: float) -> Adapter:
        """From a peft checkpoint's tensors (`base_model.model.<module>.lora_A.weight`)."""
        names = [name for name in tensors if name.endswith(".lora_A.weight")]
        pairs = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
                tensors[name],
                tensors[name.replace("lora_A", "lora_B")],
            )
            for name in names
        }
        return cls(pairs, alpha / rank)


def random_adapter(
    shape: ModelShape, rank: int, seed: int, sites: tuple[str, ...] = ATTENTION_SITES, device: torch.device | str = "cpu"
) -> Adapter:
    """Normal A and B, so that B A changes the layer's output by about a tenth."""
    generator = torch.Generator(device).manual_seed(seed)
    inner, outer = _widths(shape)

    def matrix(rows: int, columns: int, deviation: float) -> Tensor:
        return torch.empty(rows, columns, dtype=DTYPES[shape.dtype], device=device).normal_(0, deviation, generator=generator)

    return Adapter(
        {
            f"model.layers.{i}.{module}": (
                matrix(rank, inner[site], inner[site] ** -0.5),
                matrix(outer[site][part], rank, 0.1 * rank**-0.5),
            )
            for i in range(shape.layers)
            for site in sites
            for part, module in enumerate(MODULES[site])
        }
    )


def _widths(shape: ModelShape) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Inputs of each site, and outputs of each of its parts."""
    inner = {"qkv": shape.hidden, "o": shape.q_width, "up": shape.hidden, "down": shape.mlp}
    outer = {
        "qkv": (shape.q_width, shape.kv_width, shape.kv_width),
        "o": (shape.hidden,),
        "up": (shape.mlp,) * 2,
        "down": (shape.hidden,),
    }
    return inner, outer


class AdapterBank:
    """Room for `capacity` adapters of up to `rank` on the device.

    Attributes:
        of_slot: adapter (0: none) of the sequence in each slot, read by the kernels; [slots + 1].
        sites: what the adapters may change.
    """

    def __init__(
        self, shape: ModelShape, capacity: int, rank: int, slots: int, sites: tuple[str, ...] = ATTENTION_SITES,
        device: torch.device | str = "cpu", backend: str = "auto", beside: bool = True,
    ) -> None:  # fmt: skip
        """`slots`: sequences that run at once. `beside`: `triton`'s first half on a stream beside the layer's product."""
        self.shape, self.sites, self.rank = shape, sites, max(16, 1 << (rank - 1).bit_length())
        inner, outer = _widths(shape)
        dtype = DTYPES[shape.dtype]

        def room(rows: int, columns: int) -> Tensor:
            return torch.zeros(shape.layers, capacity + 1, rows, columns, dtype=dtype, device=device)

        self.ends = {site: tuple(torch.tensor(outer[site]).cumsum(0).tolist()) for site in sites}
        self.a = {site: room(len(outer[site]) * self.rank, inner[site]) for site in sites}
        self.b = {site: room(sum(outer[site]), self.rank) for site in sites}
        self.of_slot = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self.index: dict[str, int] = {}
        self.capacity = capacity
        name = ("triton" if torch.device(device).type == "cuda" else "bmm") if backend == "auto" else backend
        if name not in (names := (*BACKENDS, "triton")):
            raise InputError("engine", "lora", backend, f"use auto or one of {', '.join(names)}")
        self.backend = name
        self._apply = BACKENDS.get(name)
        self._first = next(site for site in MODULES if site in sites)
        self._rows: DecodingRows | None = None
        if name == "triton":
            parts = max(len(ends) for ends in self.ends.values())
            self._rows = DecodingRows(slots, parts, self.rank, device, beside)
        self._stream = torch.cuda.Stream() if torch.device(device).type == "cuda" else None

    def load(self, name: str, adapter: Adapter) -> None:
        """Copy `adapter` in under `name`, on a stream of its own; work launched afterwards sees it.

        Raises:
            InputError: no room, a rank above the bank's, or a module that the bank's sites leave out.
        """
        if name not in self.index and len(self.index) == self.capacity:
            raise InputError(f"adapter {name}", "capacity", self.capacity, "the bank is full: raise it or drop an adapter")
        taken = set(self.index.values())
        place = self.index.get(name) or next(i for i in range(1, self.capacity + 1) if i not in taken)
        known = {module: (site, part) for site in self.sites for part, module in enumerate(MODULES[site])}
        for module, (a, _) in adapter.modules.items():
            kind = module.split(".", 3)[3]
            if kind not in known:
                raise InputError(f"adapter {name}", "module", module, f"the engine applies adapters to {', '.join(known)} only")
            if a.shape[0] > self.rank:
                raise InputError(f"adapter {name}", "rank", a.shape[0], f"higher than the bank's {self.rank}: raise lora_rank")
        if self._stream is None:
            self._copy(place, adapter, known)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._copy(place, adapter, known)
            torch.cuda.current_stream().wait_stream(self._stream)
        self.index[name] = place

    def unload(self, name: str) -> None:
        """Free the place of an adapter that no sequence uses. Raises KeyError when there is none of that name."""
        del self.index[name]

    def _copy(self, place: int, adapter: Adapter, known: Mapping[str, tuple[str, int]]) -> None:
        for site in self.sites:
            self.a[site][:, place] = 0
            self.b[site][:, place] = 0
        for module, (a, b) in adapter.modules.items():
            _, _, layer, kind = module.split(".", 3)
            site, part = known[kind]
            begin = (0, *self.ends[site])[part]
            top = part * self.rank
            self.a[site][int(layer), place, top : top + a.shape[0]].copy_(a, non_blocking=True)
            b_room = self.b[site][int(layer), place, begin : begin + b.shape[0], : b.shape[1]]
            b_room.copy_((b.to(b_room.device, non_blocking=True).float() * adapter.scale).to(b_room.dtype))

    def before(self, x: Tensor, layer: int, site: str, slots: Tensor, chunks: Chunks | None) -> None:
        """Called before a site's product is launched: for what runs beside it, or must be waited for."""
        if self._rows is None or site not in self.sites:
            return
        if layer == 0 and site == self._first:
            self._rows.enter(self.of_slot, slots)
        if chunks is None:
            self._rows.mark()

    def add(self, y: Tensor, x: Tensor, layer: int, site: str, slots: Tensor, chunks: Chunks | None) -> None:
        """Add the adapters' part of a site to its output `y` in place: decoding rows of `slots` first, then `chunks`."""
        if site not in self.sites:
            return
        a, b, ends, rows = self.a[site][layer], self.b[site][layer], self.ends[site], len(slots)
        if self._apply is not None:
            self._apply(y, x, a, b, ends, self.of_slot, slots, chunks)
            return
        assert self._rows is not None
        if rows:
            self._rows.add(y[:rows], x[:rows], a, b, ends, beside=chunks is None)
        if chunks is not None:
            grouped_lora(y[rows:], x[rows:], a, b, ends, self.of_slot, chunks.tiles, chunks.table, TILE_Q)


def _by_token(of_slot: Tensor, slots: Tensor, chunks: Chunks | None) -> Tensor:
    return of_slot[slots if chunks is None else torch.cat([slots, chunks.slots.long()])]


def _einsum(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, ends: tuple[int, ...], of_slot: Tensor, slots: Tensor, chunks: Chunks | None
) -> None:
    mine = _by_token(of_slot, slots, chunks)
    low = torch.einsum("ti,tpri->tpr", x, a[mine].unflatten(1, (len(ends), -1)))
    for part, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        y[:, begin:end] += torch.einsum("tr,tor->to", low[:, part], b[mine, begin:end])


def _bmm(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, ends: tuple[int, ...], of_slot: Tensor, slots: Tensor, chunks: Chunks | None
) -> None:
    mine = _by_token(of_slot, slots, chunks)
    low = torch.bmm(a[mine], x[:, :, None]).unflatten(1, (len(ends), -1))
    for part, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        y[:, begin:end] += torch.bmm(b[mine, begin:end], low[:, part])[:, :, 0]


BACKENDS: Mapping[str, Callable[..., None]] = {"einsum": _einsum, "bmm": _bmm}


def merge(shape: ModelShape, weights: Weights, adapter: Adapter, sign: float = 1.0) -> None:
    """Add an adapter into the weights in place (`sign` -1 takes it out again, up to rounding)."""
    _, outer = _widths(shape)
    sites = {
        module: (site, sum(outer[site][:part])) for site, modules in MODULES.items() for part, module in enumerate(modules)
    }
    for module, (a, b) in adapter.modules.items():
        _, _, layer, kind = module.split(".", 3)
        site, begin = sites[kind]
        linear = matrices(weights.layers[int(layer)])[site]
        if isinstance(linear, Quantised):
            raise InputError("adapter", "merge", module, "quantised weights cannot take it in: keep it in the adapters' bank")
        target = linear.weight[begin : begin + b.shape[0]]
        target += (sign * adapter.scale * (b.float() @ a.float())).to(target)


def matrices(layer: Layer) -> dict[str, Linear]:
    """A layer's matrices by site."""
    return {"qkv": layer.qkv, "o": layer.o, "up": layer.up, "down": layer.down}
