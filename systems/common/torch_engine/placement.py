"""Which part of a model a rank holds: layers by pipeline stage, heads and columns by tensor-parallel rank.

Rank r is tensor-parallel rank r % tp of stage r // tp. The split is Megatron's (Shoeybi et al. 2019, section 3): q, k, v, gate
and up by output, o and down by input, embedding and head by vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from systems.common.errors import InputError
from systems.common.models import ModelShape


@dataclass(frozen=True, slots=True)
class Span:
    """A range of rows or columns."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in `layout`.

    Attributes:
        q, kv, mlp, vocab: its outputs of each projection, MLP columns and vocabulary; `vocab` may pass the end (padding).
        layers: its decoder layers.
    """

    layout: Layout
    stage: int
    tp_rank: int
    layers: Span
    q: Span
    kv: Span
    mlp: Span
    vocab: Span

    @property
    def rank(self) -> int:
        """Its number among all ranks."""
        return self.stage * self.layout.tp + self.tp_rank

    @property
    def first(self) -> bool:
        """Whether it embeds tokens."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether it gives logits."""
        return self.stage == self.layout.stages - 1

    def local(self, shape: ModelShape) -> ModelShape:
        """What this rank computes, as a shape of its own; hidden width and vocabulary stay whole."""
        heads, kv_heads = self.q.size // shape.head_dim, self.kv.size // shape.head_dim
        return replace(shape, layers=self.layers.size, heads=heads, kv_heads=kv_heads, mlp=self.mlp.size)


@dataclass(frozen=True, slots=True)
class Layout:
    """`tp` tensor-parallel ranks in each stage; `pp_map` says how many decoder layers each stage holds."""

    tp: int
    pp_map: tuple[int, ...]

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return len(self.pp_map)

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.tp * self.stages

    def place(self, shape: ModelShape, rank: int, unit: int = 1) -> Place:
        """Where `rank` stands; MLP columns are dealt out in multiples of `unit`: a rank may get one unit more than another."""
        stage, r = divmod(rank, self.tp)
        first = sum(self.pp_map[:stage])
        q, kv_heads = shape.q_width // self.tp, max(1, shape.kv_heads // self.tp)
        kv = r * shape.kv_heads // self.tp * shape.head_dim  # ranks that outnumber the kv heads share one
        units, vocab = shape.mlp // unit, -(-shape.vocab // self.tp)
        return Place(
            self,
            stage,
            r,
            Span(first, first + self.pp_map[stage]),
            Span(r * q, (r + 1) * q),
            Span(kv, kv + kv_heads * shape.head_dim),
            Span(units * r // self.tp * unit, units * (r + 1) // self.tp * unit),
            Span(r * vocab, (r + 1) * vocab),
        )


def layout(shape: ModelShape, tp: int = 1, pp: int = 1, pp_map: list[int] | tuple[int, ...] | None = None) -> Layout:
    """The layout of `tp` by `pp` ranks, or of the stages in `pp_map`; layers are dealt out evenly, the first stages one more.

    Raises:
        InputError: the model cannot be split so.
    """
    if not isinstance(tp, int) or tp < 1 or shape.heads % tp or (shape.kv_heads % tp and tp % shape.kv_heads):
        divisors = [n for n in range(1, shape.heads + 1) if _divides(shape, n)]
        mend = f"{shape.name} has {shape.heads} heads and {shape.kv_heads} kv heads: use one of {', '.join(map(str, divisors))}"
        raise InputError("parallel", "tp", tp, mend)
    if pp_map is None:
        if not isinstance(pp, int) or not 1 <= pp <= shape.layers:
            raise InputError("parallel", "pp", pp, f"{shape.name} has {shape.layers} layers: give 1 to {shape.layers} stages")
        pp_map = [shape.layers // pp + (i < shape.layers % pp) for i in range(pp)]
    if not pp_map or min(pp_map) < 1 or sum(pp_map) != shape.layers:
        raise InputError("parallel", "pp_map", list(pp_map), f"give layers per stage, each at least 1, {shape.layers} in all")
    return Layout(tp, tuple(pp_map))


def _divides(shape: ModelShape, tp: int) -> bool:
    return shape.heads % tp == 0 and (shape.kv_heads % tp == 0 or tp % shape.kv_heads == 0)


def mlp_unit(shape: ModelShape, tp: int, group: int = 1) -> int:
    """The unit of `Layout.place`: `group` inputs that share a scale; steps of 16 where columns cannot be dealt out evenly.

    Raises:
        InputError: some rank would get no column, or the columns are no multiple of the unit.
    """
    unit = group if shape.mlp % (tp * group) == 0 else max(group, 16)
    if shape.mlp % unit or shape.mlp // unit < tp:
        raise InputError("parallel", "tp", tp, f"{shape.name}'s {shape.mlp} MLP columns do not go to {tp} ranks: use fewer")
    return unit
