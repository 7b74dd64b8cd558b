"""Speed and exactness of LoRA tuning on one GPU, against its floor in FLOPs and against Hugging Face in the same run.

    python -m benchmarks.training [--model llama-3.1-8b] [--out FILE] [--parts correct,step,...] [--layers N]

Random weights of the model's shape, random tokens, adapters of rank 8. Parts, in order (one that fails says so and the next
goes on; the file is written after each):

* `kernels`: the kernel tests of tests/integration, on this GPU.
* `correct`: two layers in bf16: loss and gradients against transformers in float32, beside what peft in bf16 is off by; graphs,
  recomputation, chunks and fused forward layers against the plain run.
* `step`: one training step (q, k, v, o; 4 x 512 tokens, and others), by tasklets, graphs, with recomputation, with other
  sizes of loss tasklets and other attention kernels: GPU time, host time to launch, phases, peak memory, share of the floor.
  Tasklets of single sequences also go to `tuning.csv` beside the file, a part of a calibration (llmstation/tuning_table.py).
* `profile`: GPU time of that step by kernel.
* `hf`: the same step by peft on transformers, eager.
* `pauses`: Figure 12: one sample of 512 and of 1,024 tokens with 0 to 64 pauses in its backward pass.
* `curves`: 200 steps, suspended at every boundary beside other work, and not.
* `fused`: decode steps with a sample's forward layers in them, and both apart.
* `chunks`: Figure 4: precise chunked training by chunk size.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from harness.atomic import write_atomically
from systems.common.models import ModelShape, model
from systems.common.torch_engine.weights import Weights, random_weights
from systems.llmstation.training.adapters import TARGETS, LoraConfig
from systems.llmstation.training.chunked import ChunkedTrainer
from systems.llmstation.training.fused import decode_with
from systems.llmstation.training.fused_graphs import FusedTrainer
from systems.llmstation.training.graphs import GraphedTrainer
from systems.llmstation.training.trainer import Batch, Options, Trainer
from systems.llmstation.tuning_table import NEEDED, rows_of, table_of

PARTS = ("kernels", "correct", "step", "profile", "hf", "pauses", "curves", "fused", "chunks")
RUNS = 20
GPU = torch.cuda.is_available()  # without one the tiny model runs, so that the script itself can be tried
DEVICE = "cuda" if GPU else "cpu"
QKVO = LoraConfig(targets=("q", "k", "v", "o"))


# ---- measuring


def spread(ms: list[float]) -> dict[str, float]:
    """Median and quartiles, milliseconds."""
    low, middle, high = statistics.quantiles(ms, n=4)
    return {"ms": middle, "low_ms": low, "high_ms": high, "runs": len(ms)}


class Mark:
    """A moment: on the GPU's current stream, or now where there is none."""

    def __init__(self) -> None:
        self.at = torch.cuda.Event(True) if GPU else time.perf_counter()
        if GPU:
            self.at.record()

    def ms_to(self, later: Mark) -> float:
        """Milliseconds from here to `later`; both must have passed."""
        return self.at.elapsed_time(later.at) if GPU else 1e3 * (later.at - self.at)


def settle() -> None:
    """Wait for the GPU."""
    if GPU:
        torch.cuda.synchronize()


def settle_stream() -> None:
    """Wait for the current stream."""
    if GPU:
        torch.cuda.current_stream().synchronize()


def allocated(most: bool = False) -> int:
    """Bytes of tensors on the GPU, now or at most since the last reset."""
    return 0 if not GPU else torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()


def timed(work: Callable[[], object], runs: int = RUNS, warm: int = 3) -> dict[str, float]:
    """GPU time of `work`, the host's time to launch it, and the peak of memory during it over what it found."""
    for _ in range(warm):
        work()
    settle()
    before = allocated()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    gpu, host = [], []
    for _ in range(runs):
        settle()
        began, start = time.perf_counter(), Mark()
        work()
        end = Mark()
        host.append(1e3 * (time.perf_counter() - began))
        settle()
        gpu.append(start.ms_to(end))
    return spread(gpu) | {"host_ms": statistics.median(host), "peak_gb": (allocated(True) - before) / 1e9}


def ceilings() -> dict[str, float]:
    """Copy bandwidth (read plus written) and rate of a bf16 product, on random data."""
    size, side = (2**32, 8192) if GPU else (2**24, 256)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source))
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: a @ b)
    return {"copy_bytes_per_s": 2 * size / copy["ms"] * 1e3, "matmul_flops": 2 * side**3 / product["ms"] * 1e3}


def step_flops(shape: ModelShape, batch: int, length: int) -> float:
    """All products of a step: forward and input gradients (frozen weights have no others), the head both ways, attention.

    Attention counts its causal half: forward 2 products, backward 5 (FlashAttention-2, section 3.2). Adapters are left out.
    """
    tokens = batch * length
    products = 2 * tokens * (shape.layers * shape.layer_flops_per_token + 2 * shape.vocab * shape.hidden)
    first_layer = 2 * tokens * shape.hidden * (shape.q_width + 2 * shape.kv_width)  # nothing needs its input's gradient
    return products - first_layer + 3.5 * batch * shape.layers * shape.layer_attention_flops(length)


def random_batch(shape: ModelShape, batch: int, length: int, seed: int = 0) -> Batch:
    """Tokens to train on."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return Batch(torch.randint(0, shape.vocab, (batch, length), device=DEVICE, generator=generator))


def off(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative distance; NaN where there is one."""
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


def run(trainer, batch: Batch) -> None:
    """One whole step."""
    for _ in trainer.steps(batch):
        pass


@contextmanager
def clean() -> Iterator[None]:
    """Give memory back afterwards."""
    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()


class Bench:
    """One model's weights on the GPU; `report` is what was found."""

    def __init__(self, shape: ModelShape, file: Path | None) -> None:
        self.shape, self.file = shape, file
        self.weights = random_weights(shape, 0, DEVICE)
        self.report: dict[str, object] = {
            "model": shape.name,
            "layers": shape.layers,
            "gpu": torch.cuda.get_device_name() if GPU else "none",
        }
        self.report |= {"torch": torch.__version__, "weights_gb": allocated() / 1e9}
        with clean():
            self.peak = self.report["ceilings"] = ceilings()

    def few(self, layers: int) -> tuple[ModelShape, Weights]:
        """The first layers of the model; the same tensors."""
        layers = min(layers, self.shape.layers)
        return replace(self.shape, layers=layers), replace(self.weights, layers=self.weights.layers[:layers])

    def do(self, parts: list[str]) -> None:
        """Run parts; the file holds what there is after each."""
        for part in parts:
            began = time.perf_counter()
            try:
                with clean():
                    found = getattr(self, part)()
            except Exception as error:  # the other parts are still worth the GPU's time
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            self.report[part] = found
            self.report[f"{part} s"] = round(time.perf_counter() - began, 1)
            print(f"--- {part} ({self.report[f'{part} s']} s)\n{json.dumps(found, indent=1)}", flush=True)
            if self.file is not None:
                write_atomically(self.file, json.dumps(self.report, indent=1) + "\n")
                self.tabulate()

    def tabulate(self) -> None:
        """`tuning.csv` beside the file, which the simulator reads from a calibration's folder."""
        rows = list(rows_of(self.report.get("step", {})))
        if self.file is not None and {phase for phase, *_ in rows} >= set(NEEDED):
            write_atomically(self.file.with_name("tuning.csv"), table_of(rows))

    # ---- parts

    def kernels(self) -> dict[str, object]:
        """The kernel tests, on this machine."""
        file = "tests/integration/test_llmstation_training_kernels.py"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file], capture_output=True, text=True, timeout=150
        )
        return {"rc": done.returncode, "tail": done.stdout[-1500:].splitlines()[-12:]}

    def correct(self) -> dict[str, object]:
        """Exactness in bf16 at two layers."""
        shape, weights = self.few(2)
        batch, found = random_batch(shape, 2, 256), {}
        options = Options(lora=LoraConfig(targets=TARGETS))

        def made(kind=Trainer, given: Options = options, **more):
            trainer = kind(shape, weights, options=given, **more)
            generator = torch.Generator(DEVICE).manual_seed(2)
            with torch.no_grad():
                trainer.adapters.flat += 0.02 * torch.randn(len(trainer.adapters.flat), device=DEVICE, generator=generator)
            trainer.adapters.publish()
            return trainer

        plain = made()
        found["attention"] = plain.blocks.attention.name
        run(plain, batch)
        loss, grad = plain.losses[-1], plain.adapters.gradient().clone()
        again = made()
        run(again, batch)
        found["same run again"] = {"bits": bool(torch.equal(again.adapters.gradient(), grad))}
        variants = {
            "recompute": lambda: made(given=replace(options, recompute=True)),
            "blocks": lambda: made(given=replace(options, segments="block")),
            "flash": lambda: made(given=replace(options, attention="flash")),
            "chunks of 96": lambda: made(ChunkedTrainer, chunk=96),
            "graphs": lambda: GraphedTrainer(made()),
        }
        for name, build in variants.items():
            try:
                other = build()
                run(other, batch)
                adapters = getattr(other, "trainer", other).adapters
                found[name] = {
                    "loss": float(other.losses[-1] - loss),
                    "gradient": off(adapters.gradient(), grad),
                    "bits": bool(torch.equal(adapters.gradient(), grad)),
                }
                if name == "graphs":  # a second step, on other tokens, by replay and by hand
                    second = random_batch(shape, 2, 256, seed=1)
                    run(other, second)
                    run(plain, second)
                    found["graphs, second step"] = {
                        "loss": float(other.losses[-1] - plain.losses[-1]),
                        "parameters": off(adapters.flat.detach(), plain.adapters.flat.detach()),
                    }
            except Exception as error:
                traceback.print_exc()
                found[name] = {"error": str(error)}
        found["against float32"] = self.against_transformers(shape, weights, made(), batch, loss, grad)
        return found

    def against_transformers(self, shape, weights, trainer, batch, loss, grad) -> dict[str, float]:
        """Ours and peft's in bf16, both against peft's in float32, from the same adapters."""
        found: dict[str, float] = {}
        exact = None
        for dtype in (torch.float32, torch.bfloat16):
            other = peft_model(shape, weights, trainer.options.lora, dtype)
            mine = [(m, trainer.adapters.pair(m)) for m in trainer.adapters.modules]
            named = dict(other.named_parameters())
            pairs = []
            for module, (a, b) in mine:
                prefix = f"base_model.model.model.layers.{module.layer}.{module.name}"
                for letter, value in (("A", a), ("B", b)):
                    parameter = named[f"{prefix}.lora_{letter}.default.weight"]
                    parameter.data.copy_(value)
                    pairs.append(parameter)
            theirs = other(batch.tokens, labels=batch.tokens).loss
            theirs.backward()
            theirs = theirs.detach()
            grads = torch.cat([p.grad.float().flatten() for p in pairs])
            if exact is None:
                exact = grads
                found |= {"loss float32": float(theirs), "ours: loss": float(loss - theirs), "ours: gradient": off(grad, exact)}
                reference = float(theirs)
            else:
                found |= {"peft bf16: loss": float(theirs) - reference, "peft bf16: gradient": off(grads, exact)}
            del other, named, pairs, theirs, grads
            gc.collect()
            torch.cuda.empty_cache()
        return found

    def step(self) -> dict[str, object]:
        """Times of one training step, by variant."""
        found: dict[str, object] = {}
        cases = {
            "4 x 512 eager": (4, 512, Options(lora=QKVO), False),
            "4 x 512 graphs": (4, 512, Options(lora=QKVO), True),
            "4 x 512 eager, loss by 1024": (4, 512, Options(lora=QKVO, loss_tokens=1024), False),
            "4 x 512 eager, loss by 2048": (4, 512, Options(lora=QKVO, loss_tokens=2048), False),
            "4 x 512 eager, blocks": (4, 512, Options(lora=QKVO, segments="block"), False),
            "4 x 512 eager, flash": (4, 512, Options(lora=QKVO, attention="flash"), False),
            "4 x 512 eager, recompute": (4, 512, Options(lora=QKVO, recompute=True), False),
            "4 x 512 eager, q k v": (4, 512, Options(), False),
            "4 x 512 eager, all sites": (4, 512, Options(lora=LoraConfig(targets=TARGETS)), False),
            "1 x 512 eager": (1, 512, Options(), False),
            "1 x 512 graphs": (1, 512, Options(), True),
            "1 x 1024 eager": (1, 1024, Options(), False),
            "1 x 1024 graphs": (1, 1024, Options(), True),
            "1 x 512 eager, recompute": (1, 512, Options(recompute=True), False),
            "1 x 256 graphs": (1, 256, Options(), True),
            "1 x 128 graphs": (1, 128, Options(), True),
        }  # fmt: skip
        for name, (sequences, length, options, graphed) in cases.items():
            try:
                with clean():
                    found[name] = self.one_step(sequences, length, options, graphed)
            except Exception as error:
                traceback.print_exc()
                found[name] = {"error": str(error)}
            print(name, json.dumps(found[name]), flush=True)
        return found

    def one_step(self, sequences: int, length: int, options: Options, graphed: bool) -> dict[str, object]:
        """One variant."""
        trainer = Trainer(self.shape, self.weights, options)
        batch = random_batch(self.shape, sequences, length)
        floor_ms = 1e3 * step_flops(self.shape, sequences, length) / self.peak["matmul_flops"]
        before, reserved = allocated(), torch.cuda.memory_reserved() if GPU else 0
        began = time.perf_counter()
        stepper = GraphedTrainer(trainer) if graphed else trainer
        run(stepper, batch)
        settle()
        first_s = time.perf_counter() - began
        held = allocated() - before
        found = timed(lambda: run(stepper, batch)) | {"floor_ms": floor_ms, "first_s": first_s, "held_gb": held / 1e9}
        found["reserved_gb"] = ((torch.cuda.memory_reserved() if GPU else 0) - reserved) / 1e9  # graphs' pools count here alone
        return found | {
            "of_floor": found["ms"] / floor_ms,
            "phases_ms": self.phases(stepper, batch),
            "tasklets": len(stepper.plan(sequences, length)),
            "attention": trainer.blocks.attention.name,
            "finite": bool(torch.isfinite(trainer.losses[-1])),
        }

    def phases(self, trainer, batch: Batch) -> dict[str, float]:
        """GPU time of the phases of one step, and the median tasklet of each."""
        rows = []
        for _ in range(5):
            marks, names = [Mark()], []
            for tasklet in trainer.steps(batch):
                marks.append(Mark())
                names.append(tasklet.phase)
            settle()
            rows.append([a.ms_to(b) for a, b in pairwise(marks)])
        each = [statistics.median(column) for column in zip(*rows, strict=True)]
        found = {}
        for phase in dict.fromkeys(names):
            mine = [ms for ms, name in zip(each, names, strict=True) if name == phase]
            found |= {phase: sum(mine), f"{phase} tasklet": statistics.median(mine)}
        return found

    def profile(self) -> dict[str, object]:
        """GPU time by kernel."""
        from torch.profiler import ProfilerActivity, profile

        trainer, batch = Trainer(self.shape, self.weights, Options(lora=QKVO)), random_batch(self.shape, 4, 512)
        for _ in range(2):
            run(trainer, batch)
        settle()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run(trainer, batch)
            settle()
        rows = [
            (row.key[:90], row.count, row.self_device_time_total / 1e3)
            for row in seen.key_averages()
            if row.self_device_time_total > 0
        ]
        rows.sort(key=lambda row: -row[2])
        return {"kernels": [list(row) for row in rows[:40]], "total_ms": sum(row[2] for row in rows)}

    def hf(self) -> dict[str, object]:
        """The same step by peft."""
        found: dict[str, object] = {}
        for sequences, length, runs in ((4, 512, RUNS), (1, 512, RUNS)):
            other = peft_model(self.shape, self.weights, QKVO, torch.bfloat16)
            parameters = [p for p in other.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=3e-4, fused=True)
            batch = random_batch(self.shape, sequences, length)

            def step(other=other, optimizer=optimizer, batch=batch) -> None:
                other(batch.tokens, labels=batch.tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            with clean():
                found[f"{sequences} x {length}"] = timed(step, runs) | {"adapters": str(parameters[0].dtype)}
            del other, parameters, optimizer, step
            gc.collect()
        return found

    def pauses(self) -> dict[str, object]:
        """A pause ends what is on the GPU and gives control back, as a suspension for serving does."""
        found: dict[str, object] = {}
        for length in (512, 1024):
            for graphed in (False, True):
                with clean():
                    trainer = Trainer(self.shape, self.weights, Options(segments="block"))
                    stepper = GraphedTrainer(trainer) if graphed else trainer
                    batch = random_batch(self.shape, 1, length)
                    backward = [i for i, t in enumerate(stepper.plan(1, length)) if t.phase in ("loss", "backward")]
                    rows = {}
                    for pauses in (0, 8, 16, 32, 40, 64, 0):  # no pauses again at the end: what drift there is
                        count = min(pauses, len(backward))
                        at = {backward[i * len(backward) // count] for i in range(count)}

                        def step(at=at, stepper=stepper, batch=batch) -> None:
                            for i, _ in enumerate(stepper.steps(batch)):
                                if i in at:
                                    settle_stream()

                        rows[f"{pauses} again" if f"{pauses}" in rows else f"{pauses}"] = timed(step)
                    base = rows["0"]["ms"]
                    extra = {pauses: row["ms"] / base - 1 for pauses, row in rows.items()}
                    found[f"{length} {'graphs' if graphed else 'eager'}"] = {"rows": rows, "extra": extra}
        return found

    def curves(self) -> dict[str, object]:
        """Loss by step, suspended and not."""
        shape, weights = self.few(4)
        batches = [random_batch(shape, 1, 256, seed) for seed in range(8)]
        side = torch.cuda.Stream() if GPU else None
        other = torch.randn(2048 if GPU else 64, 2048 if GPU else 64, device=DEVICE, dtype=torch.bfloat16)

        def curve(suspended: bool) -> torch.Tensor:
            trainer = Trainer(shape, weights, Options(lora=replace(QKVO, lr=1e-3)))
            for i in range(200):
                for _ in trainer.steps(batches[i % len(batches)]):
                    if suspended:
                        with torch.cuda.stream(side) if side is not None else nullcontext():
                            torch.mm(other, other)
                        settle_stream()
            return torch.stack(trainer.losses)

        plain, again, cut = curve(False), curve(False), curve(True)
        return {
            "first": float(plain[0]),
            "last": float(plain[-1]),
            "largest difference, suspended": float((cut - plain).abs().max()),
            "largest difference, same run again": float((again - plain).abs().max()),
            "same bits, suspended": bool(torch.equal(cut, plain)),
            "curve": plain[::10].tolist(),
            "suspended": cut[::10].tolist(),
        }

    def fused(self) -> dict[str, object]:
        """Decode steps with forward layers in them."""
        from systems.common.torch_engine import attention
        from systems.common.torch_engine.cache import KVCache
        from systems.common.torch_engine.graphs import Steps
        from systems.common.torch_engine.model import Transformer
        from systems.common.torch_engine.numerics import numerics, rope_table

        shape, found = self.shape, {}
        context, slots = 512, 64
        width = 1024 // 16
        cache = KVCache(shape, slots, slots * width, width, 16, DEVICE)
        cache.k.normal_()
        cache.v.normal_()
        order = torch.randperm(slots * width, device=DEVICE).to(torch.int32) + 1
        cache.tables[:slots] = order.view(slots, width)
        cache.lengths[:slots] = context
        rope = rope_table(shape.head_dim, 1024, numerics(shape), DEVICE)
        serving = Transformer(shape, self.weights, attention.choose("auto", shape, cache, rope))
        trainer = Trainer(shape, self.weights, Options())
        for rows, length in ((1, 512), (32, 512), (64, 512), (32, 1024)):
            mine = torch.arange(rows, device=DEVICE)
            newest = torch.randint(0, shape.vocab, (rows,), device=DEVICE)
            batch = random_batch(shape, 1, length)
            kept: list[object] = []

            def forward(batch=batch, kept=kept) -> None:
                kept.clear()
                sample = trainer.steps(batch)
                while sample.upcoming.phase == "forward":
                    next(sample)
                kept.append(sample)

            def joined(batch=batch, newest=newest, mine=mine, kept=kept) -> None:
                kept.clear()
                sample = trainer.steps(batch)
                kept.append(decode_with(serving, newest, mine, sample, shape.layers))
                kept.append(sample)

            def decode(newest=newest, mine=mine) -> None:
                with torch.inference_mode():
                    serving.decode(newest, cache.lengths, mine)

            row: dict[str, object] = {"forward": timed(forward), "decode eager": timed(decode), "fused": timed(joined)}
            joined()
            logits = kept[0].float()
            with torch.inference_mode():
                row["logits off"] = off(logits, serving.decode(newest, cache.lengths, mine))
            try:
                row |= self.fused_graphs(trainer, Steps(serving, cache, slots, True), batch, rows)
            except Exception as error:
                traceback.print_exc()
                row["graphs"] = {"error": str(error)}
            cache.lengths[:slots] = context
            found[f"{rows} rows, {length} tokens"] = row
        return found

    def fused_graphs(self, trainer: Trainer, steps, batch: Batch, rows: int) -> dict[str, object]:
        """The same by graphs: decode step, forward phase, and both as one."""
        steps.slots[:rows] = torch.arange(rows, device=DEVICE)
        graphed, fused = GraphedTrainer(trainer), FusedTrainer(trainer, steps)

        def forward() -> None:
            sample = graphed.steps(batch)
            while sample.upcoming.phase == "forward":
                next(sample)

        found: dict[str, object] = {"decode graph": timed(lambda: steps.decode(rows, False)), "forward graphs": timed(forward)}
        found["fused graph"] = timed(lambda: next(fused.steps(batch, rows)))
        found["of both apart"] = found["fused graph"]["ms"] / (found["forward graphs"]["ms"] + found["decode graph"]["ms"])
        return found

    def chunks(self) -> dict[str, object]:
        """Precise chunked training by chunk."""
        found: dict[str, object] = {}
        for length, sizes in ((512, (64, 128, 256, 512)), (1024, (128, 256, 512, 1024))):
            batch = random_batch(self.shape, 1, length)
            with clean():
                whole = Trainer(self.shape, self.weights, Options())
                found[f"{length} whole"] = timed(lambda whole=whole, batch=batch: run(whole, batch), 10, 2)
            for chunk in sizes:
                with clean():
                    parts = ChunkedTrainer(self.shape, self.weights, chunk)
                    found[f"{length} by {chunk}"] = timed(lambda parts=parts, batch=batch: run(parts, batch), 10, 2)
        return found


def peft_model(shape: ModelShape, weights: Weights, lora: LoraConfig, dtype: torch.dtype):
    """Transformers' model over our weights (shared in bf16) with peft's adapters, which peft keeps in float32."""
    import peft

    from benchmarks.engine import hugging_face

    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=[names.get(target, f"{target}_proj") for target in lora.targets],
        lora_dropout=0.0,
    )
    made = peft.get_peft_model(hugging_face(shape, weights, dtype), config)
    made.config.use_cache = False
    return made.train()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b" if GPU else "tiny")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a first try")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    shape = model(options.model)
    if options.layers:
        shape = replace(shape, layers=options.layers)
    Bench(shape, options.out).do(parts)


if __name__ == "__main__":
    main()
