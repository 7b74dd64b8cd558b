"""The transformer against Hugging Face transformers on the same random weights; its paged cache against itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from systems.common.errors import InputError  # noqa: E402
from systems.common.models import ModelShape  # noqa: E402
from systems.common.torch_engine import attention, weights  # noqa: E402
from systems.common.torch_engine.attention import Chunks  # noqa: E402
from systems.common.torch_engine.cache import BlockTables, KVCache  # noqa: E402
from systems.common.torch_engine.model import Transformer  # noqa: E402
from systems.common.torch_engine.numerics import Llama3Scaling, Numerics, rope_table  # noqa: E402

LLAMA = ModelShape("test-llama", 2, 64, 4, 2, 16, 96, 128, dtype="fp32")
SHAPES = {
    "llama": (LLAMA, Numerics(theta=500_000.0, scaling=Llama3Scaling(original_positions=32))),
    "llama-2": (replace(LLAMA, kv_heads=4), Numerics()),
    "qwen2": (replace(LLAMA, heads=7, kv_heads=1, hidden=112, tied=True, qkv_biases=True), Numerics(eps=1e-6, theta=1e6)),
    "opt": (replace(LLAMA, kv_heads=4, gated=False, tied=True, biases=True, positions=130), Numerics(position_offset=2)),
}


def engine(shape: ModelShape, given: Numerics, seed: int = 0, slots: int = 4):
    """A model whose slot i holds blocks for 128 tokens, in shuffled order."""
    cache, tables = KVCache(shape, slots, 9 * slots, 8), BlockTables(slots, 9 * slots, 8)
    order = torch.randperm(9 * slots, generator=torch.Generator().manual_seed(1)) + 1
    cache.tables[:slots] = order[: 8 * slots].view(slots, 8)
    assert tables.tables.shape == cache.tables.shape
    rope = None if shape.positions else rope_table(shape.head_dim, 128, given)
    return Transformer(shape, weights.random_weights(shape, seed), attention.choose("auto", shape, cache, rope), given), cache


def prefill(model, tokens, past=0, slot=0):
    """Logits of every token of one chunk."""
    chunks = Chunks.of([past], [len(tokens)], [slot])
    return model.forward(tokens, chunks.positions.long(), torch.empty(0, dtype=torch.int64), chunks, None)


def hugging_face(name: str, shape: ModelShape, given: Numerics):
    """The same model there, holding the same weights under its own names."""
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "tie_word_embeddings": shape.tied, "max_position_embeddings": 128,
    }  # fmt: skip
    if name == "opt":
        config = transformers.OPTConfig(**common, ffn_dim=shape.mlp, word_embed_proj_dim=shape.hidden)
        model = transformers.OPTForCausalLM(config)
    else:
        rope = {"rope_type": "default", "rope_theta": given.theta}
        if given.scaling:
            s = given.scaling
            rope |= {
                "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_factor, "high_freq_factor": s.high_factor,
                "original_max_position_embeddings": s.original_positions,
            }  # fmt: skip
        gated = {
            "intermediate_size": shape.mlp,
            "num_key_value_heads": shape.kv_heads,
            "rms_norm_eps": given.eps,
            "rope_parameters": rope,
        }
        family = "Qwen2" if name == "qwen2" else "Llama"
        extra = {} if name == "qwen2" else {"head_dim": shape.head_dim}
        config = getattr(transformers, family + "Config")(**common, **gated, **extra)
        model = getattr(transformers, family + "ForCausalLM")(config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that none can be forgotten
            parameter.normal_(0, 0.2).add_(1.0 if parameter.dim() == 1 else 0.0)
    return model.eval()


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers(name: str) -> None:
    shape, given = SHAPES[name]
    other = hugging_face(name, shape, given)
    model, _ = engine(shape, given)
    model.weights = weights.load(shape, other.state_dict())
    tokens = torch.randint(0, shape.vocab, (60,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = other(tokens[None]).logits[0]
        torch.testing.assert_close(prefill(model, tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cuts", [[16], [1, 2, 3], [31, 47], [59]])
def test_chunked_and_decoded_equal_whole(name: str, cuts: list[int]) -> None:
    shape, given = SHAPES[name]
    model, cache = engine(shape, given)
    tokens = torch.randint(0, shape.vocab, (60,), generator=torch.Generator().manual_seed(2))
    whole = prefill(model, tokens, slot=0)
    edges = [0, *cuts, 60]
    parts = [prefill(model, tokens[a:b], past=a, slot=1) for a, b in pairwise(edges)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=2e-5, rtol=1e-5)
    for i in range(40, 60):  # the same positions once more, as decode steps beside another sequence's prompt
        cache.lengths[1] = i
        chunks = Chunks.of([0], [3], [2])
        slots = torch.tensor([1])
        batch = torch.cat([tokens[i : i + 1], tokens[:3]])
        positions = torch.cat([torch.tensor([i]), chunks.positions.long()])
        logits = model.forward(batch, positions, slots, chunks, None)
        torch.testing.assert_close(logits[0], whole[i], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(logits[1:], whole[:3], atol=2e-5, rtol=1e-5)


def test_paged_equals_contiguous() -> None:
    """Attention without any cache: one causal product over contiguous keys and values."""
    shape, given = SHAPES["llama"]
    model, cache = engine(shape, given)
    qkv = torch.randn(60, shape.q_width + 2 * shape.kv_width)
    rope = rope_table(shape.head_dim, 128, given)
    q, k, v = qkv.view(60, -1, shape.head_dim).split([4, 2, 2], 1)
    q, k = attention.rotate(q, rope[:60]), attention.rotate(k, rope[:60])
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = model.attention.prefill(qkv, 1, Chunks.of([0], [60], [3]))
    torch.testing.assert_close(out, expected.transpose(0, 1).reshape(60, -1), atol=1e-5, rtol=1e-5)
    blocks = cache.tables[3, :4].long()
    assert torch.equal(cache.v[1][blocks].transpose(0, 1).flatten(1, 2)[:, :60], v)


def test_safetensors_round_trip(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    shape, given = SHAPES["qwen2"]
    other = hugging_face("qwen2", shape, given)
    other.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded = weights.load_safetensors(shape, tmp_path)
    assert torch.equal(
        loaded.layers[1].qkv.weight[shape.q_width :][: shape.kv_width], other.model.layers[1].self_attn.k_proj.weight
    )
    with pytest.raises(InputError, match="wrong shape"):
        weights.load_safetensors(replace(shape, mlp=64), tmp_path)
    with pytest.raises(InputError, match="missing"):
        weights.load_safetensors(replace(shape, layers=3), tmp_path)
    safetensors.save_file({"x": torch.ones(1)}, tmp_path / "broken.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(InputError, match=r"broken.safetensors"):
        weights.load_safetensors(shape, tmp_path)
    with pytest.raises(InputError, match="no such file"):
        weights.load_safetensors(shape, tmp_path / "nowhere")


def test_unknown_attention_backend() -> None:
    with pytest.raises(InputError, match="sdpa"):
        attention.choose("flashy", LLAMA, KVCache(LLAMA, 1, 1, 1), None)
    with pytest.raises(InputError, match="needs Triton, a GPU"):
        attention.choose("triton", LLAMA, KVCache(LLAMA, 1, 1, 1), None)
