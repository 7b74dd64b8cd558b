"""A training step as tasklets: forward layers, loss by pieces, backward layers in reverse, the optimiser's step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from systems.common.errors import InputError
from systems.common.models import ModelShape
from systems.common.torch_engine.numerics import Numerics
from systems.common.torch_engine.weights import Weights
from systems.llmstation.training import Tasklet
from systems.llmstation.training.adapters import Adapters, LoraConfig
from systems.llmstation.training.attention import choose
from systems.llmstation.training.blocks import Blocks, Kept, Span, Stream, number_format
from systems.llmstation.training.samples import EagerSample, Turn

PARTS = {"layer": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}
IGNORED = -100
"""Label of a token that nothing must predict, as transformers has it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one length; [batch, length] int64 both, on the weights' device.

    Attributes:
        tokens: what the model reads. Pad on the right: causal attention never looks there.
        labels: the same tokens, or `IGNORED` where a token must not be predicted (prompt, padding); None for `tokens` itself.
        The
            shift by one position happens inside.
    """

    tokens: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.tokens.shape[1] < 2:
            raise InputError("training", "tokens", tuple(self.tokens.shape), "needs [batch, length] with 2 tokens or more")
        if self.labels is not None and self.labels.shape != self.tokens.shape:
            raise InputError(
                "training", "labels", tuple(self.labels.shape), f"needs the tokens' shape {tuple(self.tokens.shape)}"
            )


DEFAULT_LORA = LoraConfig()


@dataclass(frozen=True, slots=True)
class Options:
    """How a step is cut and what it keeps.

    Attributes:
        lora: what is trained.
        segments: tasklets of a whole decoder `layer`, or of an attention or MLP `block` each.
        recompute: keep each block's input alone and run it forward again in the backward pass.
        loss_tokens: tokens of one loss tasklet; their logits are the largest tensor of a step.
        positions: longest sequence.
        attention: backend, `auto` for the best that works here.
    """

    lora: LoraConfig = DEFAULT_LORA
    segments: str = "layer"
    recompute: bool = False
    loss_tokens: int = 512
    positions: int = 2048
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.segments not in ("layer", "block"):
            raise InputError("training", "segments", self.segments, "use layer or block")
        if self.loss_tokens < 1:
            raise InputError("training", "loss_tokens", self.loss_tokens, "use at least 1")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a layer that are tasklets of their own."""
        return ("layer",) if self.segments == "layer" else ("attention", "mlp")


DEFAULTS = Options()


class Trainer:
    """LoRA tuning of one model over weights that serve at the same time.

    Attributes:
        blocks, adapters: the model forward and backward; the trained part.
        losses: mean loss of each finished step, scalars on the device.
        turn: which step's gradients are being made.
    """

    def __init__(
        self, shape: ModelShape, weights: Weights, options: Options = DEFAULTS, given: Numerics | None = None
    ) -> None:  # fmt: skip
        self.shape, self.options, self.device = shape, options, weights.embedding.device
        self.adapters = Adapters(shape, options.lora, self.device)
        backend = choose(options.attention, shape, self.device, number_format(shape))
        self.blocks = Blocks(shape, weights, self.adapters, backend, options.positions, given, options.recompute)
        self.losses: list[Tensor] = []
        self.turn = Turn()

    def plan(self, batch: int, length: int) -> tuple[Tasklet, ...]:
        """See `Trains`."""
        layers, parts = range(self.shape.layers), self.options.parts
        pieces = -(-batch * length // self.options.loss_tokens)
        return (
            *(Tasklet("forward", layer, part) for layer in layers for part in parts),
            *(Tasklet("loss", piece, "head") for piece in range(pieces)),
            *(Tasklet("backward", layer, part) for layer in reversed(layers) for part in reversed(parts)),
            Tasklet("step", 0, "adamw"),
        )

    def steps(self, batch: Batch) -> TrainingSample:
        """See `Trains`."""
        self.check(batch)
        return TrainingSample(self, batch)

    def check(self, batch: Batch) -> None:
        """Raises InputError for a sequence that is longer than the trainer's positions, or lies on another device."""
        if batch.tokens.shape[1] > self.blocks.positions:
            mend = f"longer than the trainer's {self.blocks.positions} positions: shorten it or raise positions"
            raise InputError("training", "length", batch.tokens.shape[1], mend)
        if batch.tokens.device != self.device:
            raise InputError("training", "tokens", str(batch.tokens.device), f"must be on the weights' device, {self.device}")


def targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """What each row must predict and its share of the mean loss (0: nothing); [batch * length] both."""
    labels = batch.tokens if batch.labels is None else batch.labels
    target = torch.full_like(labels, IGNORED)
    target[:, :-1] = labels[:, 1:]
    counted = (target != IGNORED).flatten().float()
    return target.flatten(), counted / counted.sum().clamp(min=1)


class TrainingSample(EagerSample):
    """One step of a trainer under way (see `Sample`). Holds the activations; dropping it frees them.

    Attributes:
        stream: residual stream after the last forward tasklet. `span`: which tokens it is of.
    """

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        super().__init__(trainer.plan(*batch.tokens.shape), trainer.turn)
        self.trainer, self.batch = trainer, batch
        self.span = Span(*batch.tokens.shape)
        self.stream: Stream | None = None
        self._kept: dict[tuple[int, str], Kept] = {}
        self._grad: Tensor | None = None

    def entered(self) -> Stream:
        """The residual stream that the next forward tasklet starts from."""
        if self.stream is None:
            self.stream = self.trainer.blocks.embed(self.batch.tokens)
        return self.stream

    def advance(self, stream: Stream, kept: dict[tuple[int, str], Kept]) -> None:
        """Take over a forward tasklet that somebody else ran (fused with serving)."""
        assert self.upcoming is not None and self.upcoming.phase == "forward", self.upcoming
        self._turn.check(self._step_number)
        self.stream = stream
        self._kept |= kept
        self._at += 1

    def _forward(self, tasklet: Tasklet) -> None:
        stream = self.entered()
        for part in PARTS[tasklet.part]:
            stream, self._kept[tasklet.layer, part] = self.trainer.blocks.forward(tasklet.layer, part, stream, self.span)
        self.stream = stream

    def _loss(self, tasklet: Tasklet) -> None:
        assert self.stream is not None
        if tasklet.layer == 0:
            self._target, self._weight = targets(self.batch)
            self._losses = torch.empty_like(self._weight)
            self._grad = torch.empty_like(self.stream.x)
        assert self._grad is not None
        size = self.trainer.options.loss_tokens
        rows = slice(tasklet.layer * size, (tasklet.layer + 1) * size)
        self.trainer.blocks.loss(self.stream, rows, self._target, self._weight, self._losses, self._grad)
        if rows.stop >= len(self._losses):
            self.stream = None

    def _backward(self, tasklet: Tasklet) -> None:
        assert self._grad is not None
        for part in reversed(PARTS[tasklet.part]):
            kept = self._kept.pop((tasklet.layer, part))
            self._grad = self.trainer.blocks.backward(tasklet.layer, part, self._grad, kept, self.span)

    def _step(self, tasklet: Tasklet) -> None:
        self._grad = None
        self.trainer.adapters.step()
        self.trainer.losses.append(self._losses.sum())
