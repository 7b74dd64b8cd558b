# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Cross entropy of rows of logits, and the logits' gradient in their place.

    loss[t] = weight[t] * (log sum exp(logits[t]) - logits[t, target[t]])
    logits[t] <- weight[t] * (softmax(logits[t]) - onehot(target[t]))

    logits: [rows, vocab]; target: [rows] int64; weight, loss: [rows] float32. A weight of 0 leaves a row out, whatever its
    target.

Arithmetic is float32, whatever the logits' format. Bytes floor: 2 * rows * vocab * size (the second read comes mostly from
the L2 cache). One program per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from systems.common.torch_engine.kernels.triton_guard import jit, tl, triton


@jit
def _cross_entropy(logits, target, weight, loss, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * vocab
    share = tl.load(weight + row)
    wanted = tl.load(target + row)
    wanted = tl.where(share > 0, wanted, 0)
    at = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    chosen = tl.load(base + wanted).to(tl.float32)
    for begin in range(0, vocab, BLOCK):  # a running maximum and sum per lane, joined at the end
        value = tl.load(base + begin + at, mask=begin + at < vocab, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(best, value)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(best - finite) + tl.exp(value - finite)
        best = highest
    top = tl.max(best)
    log_sum = top + tl.log(tl.sum(total * tl.exp(best - top)))
    tl.store(loss + row, share * (log_sum - chosen))
    for begin in range(0, vocab, BLOCK):
        live = begin + at < vocab
        value = tl.load(base + begin + at, mask=live, other=0.0).to(tl.float32)
        grad = tl.exp(value - log_sum) - tl.where(begin + at == wanted, 1.0, 0.0)
        tl.store(base + begin + at, (share * grad).to(logits.dtype.element_ty), mask=live)


def cross_entropy_(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted loss of each row, float32; `logits` (contiguous) becomes its gradient."""
    rows, vocab = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(8192, triton.next_power_of_2(vocab))
    _cross_entropy[(rows,)](logits, target, weight, loss, vocab, BLOCK=block, num_warps=8 if block < 8192 else 16)
    return loss
