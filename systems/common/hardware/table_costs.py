"""`OperatorCosts` from tables that somebody measured.

Contents:

* `TableCosts`: every operator from a folder of kernel times; only communication, which such folders lack, from the roofline.
* `PublishedLinearCosts`: token-wise operators from a table of linear operators, everything else from the roofline.

Attention of a mixed batch. The tables hold one chunk beside n decodes of one length. A batch with several chunks costs
what further chunks were measured to add to the first (`prompts.csv` of a calibration). Where they were not: the sum of its
chunks' own times, less the fixed time (the table's shortest prefill) for each chunk after the first, because it is one
kernel. The decodes cost what the table says they add to the largest of the chunks: beside a prefill
they are dearer than alone, since the kernel that packs the query heads of a group is used for pure decode batches only.
A chunk longer than the table's longest is priced as consecutive chunks of that length, which keeps its quadratic growth.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from systems.common.hardware.cost import Affine, Chunk
from systems.common.hardware.curve import Curve, mix, neighbours
from systems.common.hardware.roofline import RooflineCosts
from systems.common.hardware.tables import (
    PER_ITERATION,
    PER_LAYER,
    VIDUR_LAYER,
    AttentionPoint,
    KernelTables,
    LinearTable,
    PromptsPoint,
)

LISTED_TOKENS = 4096  # token counts up to this are answered from a list


class Listed:
    """A sum of curves: a list for small integers, computed beyond it. 0 at 0."""

    __slots__ = ("_curve", "_values")

    def __init__(self, curve: Curve, length: int = LISTED_TOKENS) -> None:
        self._curve = curve
        self._values = [0.0] + [curve.at(x) for x in range(1, length + 1)]

    def __call__(self, tokens: int) -> float:
        """Seconds for `tokens` tokens (or sequences)."""
        return self._values[tokens] if tokens < len(self._values) else self._curve.at(tokens)


@dataclass(frozen=True, slots=True)
class Surface:
    """Seconds over decodes (one curve each) and context per decode."""

    decodes: tuple[int, ...]
    curves: tuple[Curve, ...]

    def curve(self, decodes: int) -> Curve:
        """Seconds over context per decode, for a number of decodes between the measured ones."""
        curve = mix([(weight, self.curves[i]) for i, weight in neighbours(self.decodes, decodes)])
        if decodes <= self.decodes[-1]:
            return curve
        least = self.curves[-1]  # noise must not make more decodes cheaper than the most that were measured
        return Curve(curve.xs, tuple(max(y, least.at(x)) for x, y in zip(curve.xs, curve.ys, strict=True)))

    def at(self, decodes: int, context: float) -> float:
        """Seconds for `decodes` sequences of `context` tokens each."""
        seconds = sum(weight * self.curves[i].at(context) for i, weight in neighbours(self.decodes, decodes))
        return max(seconds, self.curves[-1].at(context)) if decodes > self.decodes[-1] else seconds


class FurtherPrompts:
    """What each whole prompt after the first adds to a layer's attention, by its tokens and the prompts in the step."""

    def __init__(self, points: Mapping[PromptsPoint, float]) -> None:
        """`points`: seconds by (prompts, tokens of each, decodes, context per decode); those of one prompt are the base."""
        found: dict[int, dict[int, float]] = {}
        for (prompts, tokens, n, c), seconds in points.items():
            if prompts > 1 and (base := points.get((1, tokens, n, c))) is not None:
                found.setdefault(tokens, {})[prompts] = max(0.0, seconds - base) / (prompts - 1)
        self._tokens = tuple(sorted(found))
        self._curves = [Curve.of(found[tokens].items()) for tokens in self._tokens]

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def at(self, tokens: int, prompts: int) -> float:
        """Seconds of a further prompt of `tokens` in a step of `prompts`; as in steps of the most that were measured beyond."""
        most = [min(prompts, curve.xs[-1]) for curve in self._curves]
        return max(0.0, sum(w * self._curves[i].at(most[i]) for i, w in neighbours(self._tokens, tokens)))


class AttentionTable:
    """One layer's attention over a grid of (chunk, past, decodes, context per decode)."""

    def __init__(self, points: Mapping[AttentionPoint, float], several: Mapping[PromptsPoint, float] | None = None) -> None:
        """Sort `points` into curves; there must be some for decodes alone and some for a chunk alone.

        `several`: as `FurtherPrompts` takes them, where they were measured.
        """
        self.further = FurtherPrompts(several or {})
        self.decode = _surface({(n, c): s for (chunk, _, n, c), s in points.items() if not chunk and n})
        grouped: dict[int, dict[int, dict[tuple[int, int], float]]] = {}
        for (chunk, past, n, c), seconds in points.items():
            if chunk:
                grouped.setdefault(chunk, {}).setdefault(past, {})[n, c] = seconds
        alone = {chunk: {past: t[0, 0] for past, t in pasts.items() if (0, 0) in t} for chunk, pasts in grouped.items()}
        self._chunks = tuple(sorted(chunk for chunk, pasts in alone.items() if pasts))
        self._alone = [Curve.of(alone[chunk].items()) for chunk in self._chunks]
        self._mixed = [_mixed(grouped[chunk], alone[chunk]) for chunk in self._chunks]
        self.fixed_s = min(min(curve.ys) for curve in self._alone)
        self._decode_pieces: dict[int, tuple[list[float], list[Affine]]] = {}

    def decode_line(self, decodes: int, total_context: int) -> Affine:
        """Seconds of `decodes` sequences alone, as a line in their total context that holds at `total_context`."""
        if not decodes:
            return Affine(0.0, 0.0)
        found = self._decode_pieces.get(decodes)
        if found is None:
            found = self._decode_pieces[decodes] = _by_total(self.decode.curve(decodes), decodes)
        ends, pieces = found
        return pieces[bisect_right(ends, total_context)]

    def batch_s(self, chunks: Sequence[Chunk], decodes: int, decode_context: int) -> float:
        """Seconds of a batch; see the module's docstring for several chunks and for decodes beside them."""
        if not chunks:
            return self.decode_line(decodes, decode_context).at(decode_context)
        largest = max(range(len(chunks)), key=lambda i: (chunks[i].tokens, chunks[i].past))
        alone = [self.chunk_s(chunk.tokens, chunk.past) for chunk in chunks]
        if self.further and len(chunks) > 1:
            others = (self._further_s(chunk, len(chunks)) for i, chunk in enumerate(chunks) if i != largest)
            seconds = alone[largest] + sum(others)
        else:
            seconds = alone[0] + sum(max(0.0, other - self.fixed_s) for other in alone[1:])
        return seconds + self.added_s(chunks[largest], decodes, decode_context / decodes) if decodes else seconds

    def _further_s(self, chunk: Chunk, prompts: int) -> float:
        """What `chunk` adds as one of `prompts`: a whole prompt's share, and what its past costs more."""
        past_s = self.chunk_s(chunk.tokens, chunk.past) - self.chunk_s(chunk.tokens, 0) if chunk.past else 0.0
        return self.further.at(chunk.tokens, prompts) + max(0.0, past_s)

    def chunk_s(self, tokens: int, past: int) -> float:
        """Seconds of one prefill chunk alone."""
        whole = self._chunks[-1]
        seconds = 0.0
        while tokens > whole:
            seconds += self._alone[-1].at(past)
            tokens, past = tokens - whole, past + whole
        return seconds + sum(weight * self._alone[i].at(past) for i, weight in neighbours(self._chunks, tokens))

    def added_s(self, beside: Chunk, decodes: int, context: float) -> float:
        """Seconds that `decodes` sequences of `context` tokens each add to the chunk `beside`, in one kernel with it."""
        tokens = min(beside.tokens, self._chunks[-1])
        past = beside.past + beside.tokens - tokens
        added = 0.0
        for i, weight in neighbours(self._chunks, tokens):
            pasts, surfaces = self._mixed[i]
            if not pasts:
                return max(0.0, self.decode.at(decodes, context) - self.fixed_s)
            added += weight * sum(w * surfaces[j].at(decodes, context) for j, w in neighbours(pasts, min(past, pasts[-1])))
        return max(0.0, added)


def _surface(points: Mapping[tuple[int, int], float]) -> Surface:
    decodes = tuple(sorted({n for n, _ in points}))
    return Surface(decodes, tuple(Curve.of((c, s) for (m, c), s in points.items() if m == n) for n in decodes))


def _mixed(
    pasts: Mapping[int, Mapping[tuple[int, int], float]], alone: Mapping[int, float]
) -> tuple[tuple[int, ...], list[Surface]]:
    """For each past of one chunk, what decodes add to the chunk; nothing at 0 decodes."""
    measured = {
        past: {key: s - alone[past] for key, s in times.items() if key[0]} for past, times in pasts.items() if past in alone
    }
    useful = {past: added for past, added in measured.items() if added}
    zero = {past: {(0, min(c for _, c in added)): 0.0} for past, added in useful.items()}
    order = tuple(sorted(useful))
    return order, [_surface({**zero[past], **useful[past]}) for past in order]


def _by_total(curve: Curve, decodes: int) -> tuple[list[float], list[Affine]]:
    """A curve over context per sequence as pieces over total context, with the ends to look them up by."""
    pieces = [Affine(piece.base_s, piece.slope_s / decodes, piece.end * decodes) for piece in curve.pieces()]
    return [piece.end for piece in pieces[:-1]], pieces


class TableCosts:
    """`OperatorCosts` from a folder of kernel times; see the module's docstring for attention in mixed batches."""

    def __init__(self, tables: KernelTables, rest: RooflineCosts) -> None:
        """Take every operator from `tables` and communication from `rest`."""
        self._name, self._rest = tables.folder.name, rest
        layer = [(float(times), tables.dense[name]) for name, times in PER_LAYER.items() if name in tables.dense]
        self.layer_linear_s = Listed(mix(layer))
        self.embedding_s = Listed(mix([(1.0, tables.dense[name]) for name in PER_ITERATION]))
        self._head = Listed(mix([(1.0, curve) for curve in tables.per_sequence.values()]), 1024)
        self._attention = AttentionTable(tables.attention)

    @property
    def source(self) -> str:
        """For a figure's footer."""
        return f"published {self._name}" + (f", communication: {self._rest.source}" if self._rest.tp > 1 else "")

    def head_s(self, sequences: int) -> float:
        """See `OperatorCosts`."""
        return self._head(sequences) + (self._rest.gather_s(sequences) if self._rest.tp > 1 else 0.0)

    def attention_s(self, chunks: Sequence[Chunk], decodes: int, decode_context: int) -> float:
        """See `OperatorCosts`, and the module's docstring."""
        return self._attention.batch_s(chunks, decodes, decode_context)

    def decode_attention(self, decodes: int, decode_context: int) -> Affine:
        """See `OperatorCosts`: a new piece begins where the context per sequence passes a measured one."""
        return self._attention.decode_line(decodes, decode_context)

    def all_reduce_s(self, size_bytes: int) -> float:
        """See `OperatorCosts`."""
        return self._rest.all_reduce_s(size_bytes)


class PublishedLinearCosts:
    """`OperatorCosts` whose token-wise operators come from a table and everything else from the roofline."""

    def __init__(self, table: LinearTable, rest: RooflineCosts) -> None:
        """Take linear operators from `table`, the others from `rest`."""
        self._name, self._rest = table.path.stem, rest
        self.layer_linear_s = Listed(mix([(1.0, table.operators[name]) for name in VIDUR_LAYER]))
        self.embedding_s = Listed(mix([(1.0, table.operators[name]) for name in ("emb", "input_layernorm")]))

    @property
    def source(self) -> str:
        """For a figure's footer."""
        return f"published {self._name} (linear operators), rest: {self._rest.source}"

    def head_s(self, sequences: int) -> float:
        """See `OperatorCosts`."""
        return self._rest.head_s(sequences)

    def attention_s(self, chunks: Sequence[Chunk], decodes: int, decode_context: int) -> float:
        """See `OperatorCosts`."""
        return self._rest.attention_s(chunks, decodes, decode_context)

    def decode_attention(self, decodes: int, decode_context: int) -> Affine:
        """See `OperatorCosts`."""
        return self._rest.decode_attention(decodes, decode_context)

    def all_reduce_s(self, size_bytes: int) -> float:
        """See `OperatorCosts`."""
        return self._rest.all_reduce_s(size_bytes)
