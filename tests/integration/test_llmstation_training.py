"""Tuning against peft on transformers, and beside serving: adapters handed over, decode steps fused with forward layers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from systems.common.models import ModelShape  # noqa: E402
from systems.common.torch_engine import attention, weights  # noqa: E402
from systems.common.torch_engine.attention import Chunks  # noqa: E402
from systems.common.torch_engine.cache import KVCache  # noqa: E402
from systems.common.torch_engine.graphs import Steps  # noqa: E402
from systems.common.torch_engine.lora import AdapterBank, random_adapter  # noqa: E402
from systems.common.torch_engine.model import Transformer  # noqa: E402
from systems.common.torch_engine.numerics import Llama3Scaling, Numerics, rope_table  # noqa: E402
from systems.llmstation.training.adapters import TARGETS, LoraConfig  # noqa: E402
from systems.llmstation.training.fused import decode_with, fusable  # noqa: E402
from systems.llmstation.training.fused_graphs import FusedTrainer  # noqa: E402
from systems.llmstation.training.trainer import Batch, Options, Trainer  # noqa: E402
from tests.unit.llmstation_training_recorder import Recorder  # noqa: E402

SHAPE = ModelShape("test-llama", 3, 32, 4, 2, 8, 48, 61, dtype="fp32")
GIVEN = Numerics(theta=500_000.0, scaling=Llama3Scaling(original_positions=32))


def tokens(sequences: int, length: int, seed: int = 0):
    return torch.randint(0, SHAPE.vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))


# ---- peft


@pytest.mark.parametrize("targets", [("q", "k", "v"), TARGETS], ids="".join)
def test_steps_equal_peft(targets: tuple[str, ...]) -> None:
    """Three steps of AdamW on transformers' model with peft's layers, from the same start: losses and adapters."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    s = GIVEN.scaling
    config = transformers.LlamaConfig(
        vocab_size=SHAPE.vocab, hidden_size=SHAPE.hidden, num_hidden_layers=SHAPE.layers, num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, intermediate_size=SHAPE.mlp, max_position_embeddings=128,
        rms_norm_eps=GIVEN.eps, tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": GIVEN.theta, "factor": s.factor, "low_freq_factor": s.low_factor,
            "high_freq_factor": s.high_factor, "original_max_position_embeddings": s.original_positions,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    made = Trainer(
        SHAPE,
        weights.load(SHAPE, base.state_dict()),
        Options(lora=LoraConfig(rank=4, alpha=6.0, targets=targets, lr=1e-2)),
        GIVEN,
    )
    names = [f"{t}_proj" for t in targets]
    other = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=names, lora_dropout=0.0))
    state = other.state_dict()
    for module in made.adapters.modules:
        a, _ = made.adapters.pair(module)
        prefix = f"base_model.model.model.layers.{module.layer}.{module.name}"
        with torch.no_grad():
            state[f"{prefix}.lora_A.default.weight"].copy_(a)
        assert not state[f"{prefix}.lora_B.default.weight"].any()  # both start from B = 0
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    for i in range(3):
        x = tokens(2, 12, i)
        for _ in made.steps(Batch(x)):
            pass
        loss = other(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(made.losses[i], loss.detach(), atol=1e-5, rtol=1e-5)
    for module in made.adapters.modules:
        prefix = f"base_model.model.model.layers.{module.layer}.{module.name}"
        for mine, letter in zip(made.adapters.pair(module), "AB", strict=True):
            torch.testing.assert_close(mine, state[f"{prefix}.lora_{letter}.default.weight"], atol=2e-5, rtol=1e-3)


# ---- serving


def serving(adapters: bool = False, seed: int = 0):
    """A model of 4 slots with room for 32 tokens each, some cached already."""
    cache = KVCache(SHAPE, 4, 16, 4, 8)
    cache.tables[:4] = (torch.randperm(16, generator=torch.Generator().manual_seed(seed)) + 1).view(4, 4)
    bank = None
    if adapters:
        bank = AdapterBank(SHAPE, 2, 8, 4, sites=("qkv", "o", "up", "down"))
        for i in range(2):
            bank.load(f"adapter-{i}", random_adapter(SHAPE, 8, i, ("qkv", "o", "up", "down")))
        bank.of_slot[:4] = torch.tensor([1, 0, 2, 1])
    held = weights.random_weights(SHAPE, 1)
    rope = rope_table(SHAPE.head_dim, 64, GIVEN)
    model = Transformer(SHAPE, held, attention.choose("auto", SHAPE, cache, rope), GIVEN, bank)
    model.adapted = adapters
    for slot, cached in enumerate((5, 9, 1, 16)):
        chunks = Chunks.of([0], [cached], [slot])
        model.forward(tokens(1, cached, slot)[0], None, torch.empty(0, dtype=torch.int64), chunks, None)
        cache.lengths[slot] = cached
    return model, cache


def train(model, options: Options) -> Trainer:
    made = Trainer(SHAPE, model.weights, options, GIVEN)
    with torch.no_grad():
        made.adapters.flat += 0.05 * torch.randn(made.adapters.flat.shape, generator=torch.Generator().manual_seed(2))
    made.adapters.publish()
    return made


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_fused_equals_apart(data) -> None:
    """Decode steps take along random numbers of forward layers: the rows' logits, cache and tuning's result stay the same."""
    adapters, rows = data.draw(st.booleans()), data.draw(st.integers(1, 4))
    options = Options(
        lora=LoraConfig(rank=4, targets=data.draw(st.sampled_from([("q", "k", "v"), TARGETS]))),
        segments=data.draw(st.sampled_from(["layer", "block"])),
        recompute=data.draw(st.booleans()),
    )
    (mine, cache), (other, other_cache) = serving(adapters), serving(adapters)
    fused, apart = train(mine, options), train(other, options)
    slots = torch.tensor(data.draw(st.permutations(range(4)))[:rows])
    x = tokens(2, 7, 9)
    sample = fused.steps(Batch(x))
    while sample.upcoming is not None:
        if data.draw(st.booleans()) and sample.upcoming.part != "mlp":
            newest, limit = tokens(1, rows, data.draw(st.integers(0, 99)))[0], data.draw(st.integers(0, 3))
            before, could = sample.remaining, fusable(sample)
            logits = decode_with(mine, newest, slots, sample, limit)
            with torch.no_grad():
                expected = other.decode(newest, other_cache.lengths, slots)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(cache.k, other_cache.k, atol=1e-5, rtol=1e-5)
            assert before - sample.remaining == min(could, limit * len(options.parts))
        else:
            next(sample)
    for _ in apart.steps(Batch(x)):
        pass
    torch.testing.assert_close(fused.losses, apart.losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.adapters.gradient(), apart.adapters.gradient(), atol=1e-6, rtol=1e-3)


def test_fusing_only_moves_forward_tasklets() -> None:
    model, _ = serving()
    sample = train(model, Options(segments="block")).steps(Batch(tokens(1, 5)))
    assert fusable(sample) == 2 * SHAPE.layers
    next(sample)
    assert sample.upcoming.part == "mlp"
    assert fusable(sample) == 0
    while sample.upcoming.phase == "forward":
        next(sample)
    before = sample.remaining
    decode_with(model, tokens(1, 2)[0], torch.tensor([0, 2]), sample, 3)
    assert sample.remaining == before


class Masked(attention.SdpaAttention):
    """Decode attention that asks the host nothing, as a graph's must: all of a slot's room, masked by its length."""

    def decode(self, qkv, layer, slots):
        shape, cache, rows = self.shape, self.cache, len(qkv)
        past = cache.lengths[slots].long()
        q, k, v = qkv.view(rows, -1, shape.head_dim).split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        q, k = (attention.rotate(x, self.rope[past]) for x in (q, k))
        tables = cache.tables[slots].long()
        block = tables.gather(1, past[:, None] // cache.block_tokens)[:, 0]
        for cached, new in ((cache.k[layer], k), (cache.v[layer], v)):
            cached[block, :, past % cache.block_tokens] = new
        keys, values = (x[layer][tables].transpose(1, 2).flatten(2, 3) for x in (cache.k, cache.v))
        seen = torch.arange(keys.shape[2]) <= past[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], keys, values, seen[:, None, None], enable_gqa=True
        )
        return out.reshape(rows, -1)


@pytest.mark.parametrize("adapters", [False, True])
def test_fused_graphs_decode_and_train(adapters: bool) -> None:
    """Decode steps of two sizes, fused and not in turn: tokens, lengths and losses as the engine's and the trainer's own."""
    engines = [serving(adapters) for _ in range(2)]
    for model, cache in engines:
        model.attention = Masked(SHAPE, cache, model.attention.rope)
        cache.last_token[:4] = tokens(1, 4, 5)[0]
    (model, cache), (other, other_cache) = engines
    mine, own = Steps(model, cache, 4, False), Steps(other, other_cache, 4, False)
    options = Options(lora=LoraConfig(rank=4, targets=TARGETS, lr=1e-2))
    trainer, apart = train(model, options), train(other, options)
    fused = FusedTrainer(trainer, mine, Recorder())
    for i, rows in enumerate((2, 3, 2, 4)):
        slots = torch.tensor([(i + j) % 4 for j in range(rows)] + [4] * (4 - rows))
        mine.slots.copy_(slots)
        own.slots.copy_(slots)
        x = tokens(2, 6, i)
        sample = fused.steps(Batch(x), rows)
        assert sample.remaining == len(fused.plan(2, 6))
        assert next(sample).part == "fused"
        expected = own.decode(rows)
        torch.testing.assert_close(sample.decoded.logits[:rows], expected.logits[:rows], atol=1e-5, rtol=1e-5)
        assert torch.equal(cache.last_token[:4], other_cache.last_token[:4])
        assert torch.equal(cache.lengths, other_cache.lengths)
        if i % 2:
            for _ in sample:  # the other steps stop here: a step may be left
                pass
            for _ in apart.steps(Batch(x)):
                pass
        mine.decode(rows)  # not fused
        own.decode(rows)
    torch.testing.assert_close(trainer.losses, apart.losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trainer.adapters.flat, apart.adapters.flat, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("targets", [("q", "k", "v", "o"), TARGETS], ids="".join)
def test_what_was_tuned_can_be_served(targets: tuple[str, ...]) -> None:
    """The loss after some steps is the one of serving's own forward with the exported adapter loaded."""
    model, _ = serving()
    made = train(model, Options(lora=LoraConfig(rank=4, targets=targets, lr=1e-2)))
    x = tokens(1, 12, 3)
    for _ in range(3):
        for _ in made.steps(Batch(x)):
            pass
    bank = AdapterBank(SHAPE, 1, 4, 4, sites=("qkv", "o", "up", "down"))
    bank.load("tuned", made.adapters.export())
    bank.of_slot[3] = 1
    served = Transformer(SHAPE, model.weights, model.attention, GIVEN, bank)
    served.adapted = True
    chunks = Chunks.of([0], [12], [3])
    logits = served.forward(x[0], None, torch.empty(0, dtype=torch.int64), chunks, None)
    for _ in made.steps(Batch(x)):
        pass
    expected = torch.nn.functional.cross_entropy(logits[:-1], x[0, 1:])
    torch.testing.assert_close(made.losses[-1], expected, atol=1e-5, rtol=1e-5)
    assert made.losses[-1] < made.losses[0]


def test_training_shares_the_weights_that_serve() -> None:
    """No copy: what training allocates is the adapters and their state."""
    model, _ = serving()
    made = train(model, Options())
    assert made.blocks.weights is model.weights
    before = {id(t): t.clone() for t in (model.weights.embedding, model.weights.head, model.weights.layers[1].qkv.weight)}
    for _ in made.steps(Batch(tokens(2, 8))):
        pass
    for t in (model.weights.embedding, model.weights.head, model.weights.layers[1].qkv.weight):
        assert torch.equal(before[id(t)], t)
        assert not t.requires_grad
