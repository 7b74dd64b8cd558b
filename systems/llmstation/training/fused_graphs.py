"""Fused decode steps as CUDA graphs: the whole forward phase of a training step beside one decode step (sheet 2.3).

The eager `decode_with` takes any number of layers along but is launched kernel by kernel. Here all layers go along, as in the
artifact, and the step is one graph, followed by those of the loss, the backward pass and the optimiser. Each size of decode
batch has its own graphs, and with them its own room for activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from systems.common.torch_engine.graphs import DecodeStep, Steps
from systems.llmstation.training import Tasklet
from systems.llmstation.training.fused import decode_with
from systems.llmstation.training.graphs import FUSED, Captured, CudaRecorder, GraphedSample, Recorder, capture
from systems.llmstation.training.trainer import Batch, Trainer, TrainingSample

Key = tuple[int, int, int, bool]


@dataclass(slots=True)
class Fused:
    """The graphs for one shape of batch and size of decode step, and where the decode step's results are."""

    captured: Captured
    decoded: DecodeStep


class FusedTrainer:
    """Training steps that begin with a greedy decode step of an engine over the same weights.

    It takes the engine's `Steps`: rows are the first of its `slots`, chosen tokens are committed to its cache, and the result
    is what its own `decode` would give.

    Attributes:
        trainer: the eager trainer underneath; its adapters and losses are shared with a `GraphedTrainer` of it.
    """

    def __init__(self, trainer: Trainer, serving: Steps, recorder: Recorder | None = None) -> None:
        assert recorder is not None or trainer.device.type == "cuda", "CUDA graphs need a GPU"
        self.trainer, self.serving = trainer, serving
        self._recorder = recorder or CudaRecorder()
        self._made: dict[Key, Fused] = {}

    def plan(self, batch: int, length: int) -> tuple[Tasklet, ...]:
        """The tasklets of a step: one for the forward phase, then as the trainer's."""
        return (FUSED, *(tasklet for tasklet in self.trainer.plan(batch, length) if tasklet.phase != "forward"))

    def warm(self, batch: int, length: int, rows: int) -> None:
        """Capture for these sizes, unless done (see `GraphedTrainer.warm`). No sequence and no adapter changes."""
        key = (batch, length, self.serving.size(rows), self.serving.model.adapted)
        if key not in self._made:
            self._made[key] = self._capture(*key[:3])

    def steps(self, batch: Batch, rows: int) -> FusedSample:
        """A step whose first tasklet is also the decode step of the first `rows` slots; runs nothing yet."""
        self.trainer.check(batch)
        sequences, length = batch.tokens.shape
        self.warm(sequences, length, rows)
        made = self._made[sequences, length, self.serving.size(rows), self.serving.model.adapted]
        return FusedSample(self.trainer, made, batch)

    def _capture(self, sequences: int, length: int, size: int) -> Fused:
        serving = self.serving
        slots, results = serving.slots[:size], []

        def first(sample: TrainingSample) -> None:
            newest = serving.cache.last_token[slots]
            logits = decode_with(serving.model, newest, slots, sample, serving.model.shape.layers)
            tokens = logits.argmax(-1)
            serving.commit(slots, tokens)
            results.append(DecodeStep(slots, logits, tokens))

        kept = serving.slots.clone()
        serving.slots.fill_(serving.cache.pad_slot)  # what runs before and during the capture must touch no sequence
        captured = capture(self._recorder, self.trainer, sequences, length, first)
        serving.slots.copy_(kept)
        return Fused(captured, results[-1])


class FusedSample(GraphedSample):
    """One step under way (see `Sample`). `decoded` holds from its first tasklet until the next step of these sizes begins."""

    def __init__(self, trainer: Trainer, made: Fused, batch: Batch) -> None:
        super().__init__(trainer, made.captured, batch)
        self.decoded = made.decoded
