"""A model's config.json, well-formed and not: a shape, or one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from systems.common.errors import InputError
from systems.common.serve.loading import shape_of

GOOD = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 256, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip
SCALING = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def test_a_config_that_is_whole() -> None:
    shape, numbers, longest = shape_of({**GOOD, "rope_scaling": {"rope_type": "llama3", **SCALING}}, Path("c"), "it")
    assert (shape.name, shape.layers, shape.kv_heads, shape.head_dim, longest) == ("it", 2, 2, 16, 512)
    assert numbers.theta == 10_000.0 and numbers.scaling is not None and numbers.scaling.original_positions == 8192
    assert shape_of({**GOOD, "num_key_value_heads": None, "rope_theta": 5e5}, Path("c"), "it")[0].kv_heads == 4


NEEDED = [key for key in GOOD if key not in ("model_type", "num_key_value_heads")]
WRONG = [
    *(
        (key, wrong)
        for key in GOOD
        if key not in ("model_type", "num_key_value_heads")
        for wrong in (None, "x", 0, -1, True, [])
    ),
    ("num_hidden_layers", 1.5),
    ("num_attention_heads", float("inf")),
    ("num_attention_heads", 1000),
    ("num_key_value_heads", 3),
    ("head_dim", 15),
    ("rope_theta", "x"),
    ("rope_theta", float("nan")),
    ("rope_scaling", [1]),
    ("rope_scaling", "x"),
    ("rope_scaling", {"rope_type": "yarn"}),
    *(("rope_scaling", {"rope_type": "llama3", **SCALING, key: wrong}) for key in SCALING for wrong in (None, "x", 0)),
]


@pytest.mark.parametrize(("key", "wrong"), WRONG)
def test_a_config_that_is_not(key: str, wrong: object) -> None:
    with pytest.raises(InputError) as refused:
        shape_of({**GOOD, key: wrong}, Path("config.json"), "it")
    assert str(refused.value).startswith("config.json: ") and "\n" not in str(refused.value)
