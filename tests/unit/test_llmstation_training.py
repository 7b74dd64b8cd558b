"""LoRA tuning in tasklets: gradients against autograd in float64; suspension, segments and recomputation change no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from systems.common.errors import InputError  # noqa: E402
from systems.common.models import ModelShape  # noqa: E402
from systems.common.torch_engine.numerics import DTYPES, Numerics  # noqa: E402
from systems.common.torch_engine.weights import random_weights  # noqa: E402
from systems.llmstation.training import Tasklet  # noqa: E402
from systems.llmstation.training.adapters import TARGETS, LoraConfig  # noqa: E402
from systems.llmstation.training.chunked import ChunkedTrainer, lossy  # noqa: E402
from systems.llmstation.training.graphs import GraphedTrainer  # noqa: E402
from systems.llmstation.training.run_ahead import RunAhead  # noqa: E402
from systems.llmstation.training.trainer import DEFAULTS, IGNORED, Batch, Options, Trainer  # noqa: E402
from tests.unit.llmstation_training_recorder import Recorder  # noqa: E402

SHAPE = ModelShape("test-llama", 3, 32, 4, 2, 8, 48, 61, dtype="fp32")
QWEN = replace(SHAPE, tied=True, qkv_biases=True)
EVERYTHING = LoraConfig(rank=4, alpha=6.0, targets=TARGETS)


def batch(sequences: int = 2, length: int = 11, seed: int = 5, ignored: bool = True) -> Batch:
    """Random tokens; some labels ignored, a different number in each sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SHAPE.vocab, (sequences, length), generator=generator)
    labels = tokens.clone()
    for i in range(sequences if ignored else 0):
        labels[i, : 2 + i] = IGNORED
    return Batch(tokens, labels)


def trainer(options: Options = DEFAULTS, shape: ModelShape = SHAPE, kind=Trainer, **more):
    """A trainer whose B are not zero, as after some steps."""
    made = kind(shape, random_weights(shape, 1), options=options, **more)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        made.adapters.flat += 0.05 * torch.randn(made.adapters.flat.shape, generator=generator)
    made.adapters.publish()
    return made


def gradients(made, given_batch: Batch):
    """Loss and gradient of a step, without its optimiser."""
    sample = made.steps(given_batch)
    while sample.upcoming.phase != "step":
        next(sample)
    losses = sample._losses.sum()
    return losses, made.adapters.gradient().clone()


def autograd(made, given_batch: Batch):
    """The same by autograd in float64 from a model written down anew."""
    shape, weights, rope = made.shape, made.blocks.weights, made.blocks.rope.double()
    flat = made.adapters.flat.detach().double().requires_grad_()
    rank, scale = made.options.lora.rank, made.adapters.scale
    pairs = {(m.layer, m.name): (flat[m.a].view(rank, -1), flat[m.b].view(-1, rank)) for m in made.adapters.modules}

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double()

    def linear(i, names, base, x):
        y = x @ base.weight.double().T + (0 if base.bias is None else base.bias.double())
        widths = {"self_attn.q_proj": shape.q_width, "self_attn.k_proj": shape.kv_width, "self_attn.v_proj": shape.kv_width}
        widths |= {"mlp.gate_proj": shape.mlp, "mlp.up_proj": shape.mlp}
        added = []
        for n in names:
            low, high = pairs.get((i, n), (x.new_zeros(1, x.shape[-1]), x.new_zeros(widths.get(n, shape.hidden), 1)))
            added.append(scale * x @ low.T @ high.T)
        return y + torch.cat(added, -1)

    def turn(x):
        cos, sin = (part[: x.shape[1], None] for part in rope.chunk(2, -1))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights.embedding.double()[given_batch.tokens]
    for i, layer in enumerate(weights.layers):
        names = [f"self_attn.{n}_proj" for n in "qkv"]
        heads = linear(i, names, layer.qkv, norm(x, layer.norm1.gain)).unflatten(-1, (-1, shape.head_dim))
        q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 2)
        q, k, v = (t.transpose(1, 2) for t in (turn(q), turn(k), v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear(i, ["self_attn.o_proj"], layer.o, out.transpose(1, 2).flatten(2))
        gate, up = linear(i, ["mlp.gate_proj", "mlp.up_proj"], layer.up, norm(x, layer.norm2.gain)).chunk(2, -1)
        x = x + linear(i, ["mlp.down_proj"], layer.down, torch.nn.functional.silu(gate) * up)
    logits = norm(x, weights.norm.gain) @ weights.head.double().T
    labels = given_batch.tokens if given_batch.labels is None else given_batch.labels
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    loss.backward()
    return loss.detach(), flat.grad


def off(mine, theirs) -> float:
    return float((mine.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("shape", [SHAPE, QWEN], ids=["llama", "qwen2"])
@pytest.mark.parametrize("targets", [("q", "k", "v"), ("v",), ("o", "down"), ("q", "up"), TARGETS], ids="".join)
def test_gradients_equal_autograd(shape: ModelShape, targets: tuple[str, ...]) -> None:
    made = trainer(Options(lora=LoraConfig(rank=4, alpha=6.0, targets=targets)), shape)
    loss, grad = gradients(made, batch())
    expected, expected_grad = autograd(made, batch())
    assert abs(float(loss) - float(expected)) < 1e-5
    assert off(grad, expected_grad) < 1e-5


def test_every_parameter_has_a_place() -> None:
    made = trainer(Options(lora=EVERYTHING))
    _, grad = gradients(made, batch())
    assert len(made.adapters.modules) == SHAPE.layers * len(TARGETS)
    assert (grad != 0).float().mean() > 0.99
    assert made.adapters.flat.numel() == sum(a.numel() + b.numel() for a, b in made.adapters.export().modules.values())


@pytest.mark.parametrize("length", [2, 3, 11])
def test_pieces_of_the_loss_do_not_matter(length: int) -> None:
    whole = gradients(trainer(), batch(length=length, ignored=False))
    pieces = gradients(trainer(Options(loss_tokens=3)), batch(length=length, ignored=False))
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-5)


def test_nothing_to_predict_is_no_gradient() -> None:
    tokens = batch().tokens
    loss, grad = gradients(trainer(), Batch(tokens, torch.full_like(tokens, IGNORED)))
    assert float(loss) == 0
    assert not grad.any()


# ---- suspension


def run(made, batches: list[Batch], between=lambda: None):
    """Everything that training left behind: losses, parameters, optimiser state."""
    for given_batch in batches:
        for _ in made.steps(given_batch):
            between()
    return [*made.losses, *made.adapters.state().values()]


def equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


BATCHES = [batch(seed=seed) for seed in (5, 6)]
UNSUSPENDED = run(trainer(Options(lora=EVERYTHING)), BATCHES)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_suspension_changes_no_bit(data) -> None:
    """Random other work between tasklets, another tuning job on the same weights among it, and a random grain."""
    options = Options(
        lora=EVERYTHING, segments=data.draw(st.sampled_from(["layer", "block"])), recompute=data.draw(st.booleans())
    )
    made = trainer(options)
    other = Trainer(SHAPE, made.blocks.weights, Options(lora=LoraConfig(seed=9)))
    samples = [other.steps(batch(3, 7, seed=8))]

    def between() -> None:
        kind = data.draw(st.integers(0, 3))
        if kind == 1:
            torch.randn(40, 40) @ torch.randn(40, 40)
        elif kind == 2 and samples[-1].upcoming is not None:
            next(samples[-1])
        elif kind == 3:
            with torch.inference_mode():
                made.blocks.weights.embedding @ made.blocks.weights.embedding.T

    assert equal(run(made, BATCHES, between), UNSUSPENDED)


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_curves_are_equal(recompute: bool) -> None:
    """200 steps, suspended at every boundary in one run and never in the other."""
    shape = replace(SHAPE, layers=1)
    batches = [batch(1, 6, seed=i % 4) for i in range(200)]
    config = LoraConfig(rank=4, lr=2e-2)
    plain, cut = (
        trainer(Options(lora=config, segments=s, recompute=r), shape) for s, r in (("layer", False), ("block", recompute))
    )
    noise = torch.Generator().manual_seed(0)
    curve, other = run(plain, batches), run(cut, batches, lambda: torch.randn(8, 8, generator=noise) @ torch.randn(8, 8))
    assert equal(curve, other)
    assert sum(curve[196:200]) < 0.7 * sum(curve[:4])  # it learns


def test_an_abandoned_step_leaves_nothing() -> None:
    made = trainer(Options(lora=EVERYTHING))
    half = made.steps(batch(seed=7))
    for _ in range(half.remaining - 1):
        next(half)
    del half
    assert equal(run(made, BATCHES), UNSUSPENDED)


def test_tuning_works_inside_inference_mode() -> None:
    made = trainer(Options(lora=EVERYTHING))
    with torch.inference_mode():
        run(made, BATCHES[:1])
    assert equal(run(made, BATCHES[1:]), UNSUSPENDED)


def test_a_step_ends_when_the_next_begins() -> None:
    made = trainer()
    old = made.steps(batch())
    next(old)
    new = made.steps(batch())
    with pytest.raises(AssertionError, match="one at a time"):
        next(old)
    assert len(list(new)) == len(made.plan(2, 11))


def test_restore_takes_back_a_step() -> None:
    made = trainer(Options(lora=EVERYTHING))
    state = made.adapters.state()
    run(made, [batch(seed=7)])
    made.adapters.restore(state)
    made.losses.clear()
    assert equal(run(made, BATCHES), UNSUSPENDED)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["layer", "block"]), st.integers(1, 3), st.integers(2, 9), st.integers(1, 12), st.integers(0, 4))
def test_samples_keep_to_their_plan(segments: str, sequences: int, length: int, loss_tokens: int, chunk: int) -> None:
    options = Options(segments=segments, loss_tokens=loss_tokens)
    made = trainer(options, kind=ChunkedTrainer, chunk=chunk) if chunk else trainer(options)
    plan = made.plan(sequences, length)
    sample = made.steps(batch(sequences, length, ignored=False))
    for i, tasklet in enumerate(plan):
        assert (sample.upcoming, sample.remaining) == (tasklet, len(plan) - i)
        assert not made.losses
        assert next(sample) == tasklet
    assert sample.upcoming is None
    assert sample.remaining == 0
    assert list(sample) == []
    assert len(made.losses) == 1
    assert plan[-1] == Tasklet("step", 0, "adamw")


class NoAnswers(TorchDispatchMode):
    """Fails when the host asks for a value, or for a size that depends on one: on a GPU it would wait for both."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Trainer, ChunkedTrainer])
def test_no_tasklet_waits_for_the_gpu(kind) -> None:
    made = trainer(Options(lora=EVERYTHING), kind=kind, **({"chunk": 4} if kind is ChunkedTrainer else {}))
    with NoAnswers():
        for _ in made.steps(batch()):
            pass
        with pytest.raises(AssertionError):
            float(made.losses[-1])


# ---- graphs


@pytest.mark.parametrize(("segments", "recompute"), [("layer", False), ("block", True)])
def test_graphs_change_no_bit(segments: str, recompute: bool) -> None:
    """Captured before and between steps, for two shapes of batch; what the host decided at capture may not go stale."""
    options = Options(lora=EVERYTHING, segments=segments, recompute=recompute, loss_tokens=8)
    plain, eager = trainer(options), trainer(options)
    graphed = GraphedTrainer(eager, Recorder())
    batches = [*BATCHES, batch(3, 5, seed=7), batch(seed=8, ignored=False), batch(3, 5, seed=9)]
    expected = run(plain, batches)
    for given_batch in batches:
        assert [*graphed.steps(given_batch)] == [*plain.plan(*given_batch.tokens.shape)]
    assert equal([*graphed.losses, *eager.adapters.state().values()], expected)


def test_capturing_takes_its_step_back() -> None:
    eager = trainer(Options(lora=EVERYTHING))
    graphed = GraphedTrainer(eager, Recorder())
    graphed.warm(2, 11)
    assert not graphed.losses
    assert equal(run(eager, BATCHES), UNSUSPENDED)
    with pytest.raises(AssertionError, match="GPU"):
        GraphedTrainer(eager)


# ---- chunks


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 20])
def test_precise_chunks_equal_the_whole(chunk: int, recompute: bool) -> None:
    options = Options(lora=EVERYTHING, recompute=recompute)
    whole, parts = gradients(trainer(options), batch()), gradients(trainer(options, kind=ChunkedTrainer, chunk=chunk), batch())
    torch.testing.assert_close(parts, whole, atol=2e-7, rtol=1e-4)


def test_precise_chunks_take_the_same_steps() -> None:
    mine = run(trainer(Options(lora=EVERYTHING), kind=ChunkedTrainer, chunk=4), BATCHES)
    torch.testing.assert_close(mine[:2], UNSUSPENDED[:2], atol=1e-5, rtol=1e-5)


def test_lossy_chunks_are_sequences_of_their_own() -> None:
    whole = batch()
    pieces = lossy(whole, 4)
    assert [p.tokens.shape[1] for p in pieces] == [4, 4, 3]
    assert torch.equal(torch.cat([p.tokens for p in pieces], 1), whole.tokens)
    assert [p.tokens.shape[1] for p in lossy(Batch(whole.tokens), 5)] == [5, 5]
    made = trainer()
    alone = gradients(made, Batch(whole.tokens[:, 4:8].clone(), whole.labels[:, 4:8].clone()))
    torch.testing.assert_close(gradients(made, pieces[1]), alone)


# ---- the edges


def test_bad_input_is_told_in_one_line() -> None:
    weights = random_weights(SHAPE)
    opt = ModelShape("opt", 1, 32, 4, 4, 8, 48, 61, gated=False, biases=True, tied=True, positions=64, dtype="fp32")
    cases = [
        (lambda: LoraConfig(rank=0), "rank"),
        (lambda: LoraConfig(targets=("q", "w")), "targets"),
        (lambda: LoraConfig(targets=("q", "q")), "targets"),
        (lambda: LoraConfig(targets=()), "targets"),
        (lambda: Options(segments="operator"), "segments"),
        (lambda: Options(loss_tokens=0), "loss_tokens"),
        (lambda: Trainer(SHAPE, weights, Options(attention="fast")), "attention"),
        (lambda: Trainer(SHAPE, weights, Options(attention="flash")), "attention"),
        (lambda: Trainer(opt, random_weights(opt)), "model"),
        (lambda: Trainer(replace(SHAPE, dtype="fp16"), random_weights(replace(SHAPE, dtype="fp16"))), "model"),
        (lambda: Trainer(replace(SHAPE, layers=2), weights), "weights"),
        (lambda: Trainer(SHAPE, random_weights(SHAPE, dtype="int8")), "weights"),
        (lambda: ChunkedTrainer(SHAPE, weights, 0), "chunk"),
        (lambda: lossy(batch(), 1), "chunk"),
        (lambda: Batch(torch.zeros(4, dtype=torch.int64)), "tokens"),
        (lambda: Batch(torch.zeros(2, 1, dtype=torch.int64)), "tokens"),
        (lambda: Batch(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)), "labels"),
        (lambda: Trainer(SHAPE, weights, Options(positions=8)).steps(batch()), "length"),
    ]
    for bad, key in cases:
        with pytest.raises(InputError) as caught:
            bad()
        assert key in str(caught.value)
        assert "\n" not in str(caught.value)


def test_bf16_weights_train() -> None:
    shape = replace(SHAPE, dtype="bf16")
    made = trainer(Options(lora=EVERYTHING), shape)
    assert made.adapters.flat.dtype == torch.float32
    assert made.adapters.sites[0]["qkv"].a.dtype == DTYPES["bf16"]
    loss, grad = gradients(made, batch())
    expected, expected_grad = autograd(made, batch())
    assert abs(float(loss) - float(expected)) < 0.03
    assert off(grad, expected_grad) < 0.1


def test_run_ahead_is_nothing_on_a_cpu() -> None:
    ahead = RunAhead(1, "cpu")
    for _ in range(3):
        ahead.launched()
        assert not ahead.full
        ahead.admit()
    ahead.drain()
    assert ahead.in_flight == 0


def test_numerics_reach_the_blocks() -> None:
    made = Trainer(SHAPE, random_weights(SHAPE), given=Numerics(eps=0.5, theta=100.0))
    assert made.blocks.eps == 0.5
    assert not torch.equal(made.blocks.rope, trainer().blocks.rope)
