"""What a user sets: on the command line, or the same keys in a YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from systems.common.engine.config import POLICIES
from systems.common.errors import InputError
from systems.common.models import model

Count = Annotated[int, Field(ge=1)]
Counts = Annotated[
    tuple[Count, ...], Field(min_length=1), BeforeValidator(lambda given: given.split(",") if isinstance(given, str) else given)
]
"""Whole numbers above 0: a list in a file, with commas between them on the command line."""


class ServeConfig(BaseModel):
    """One server. The command line has the same names with `-` for `_`; `docs/serving.md` explains them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        None, description="shape by name (llama-3.1-8b, tiny, ...); not needed with a config.json or GGUF"
    )
    weights: Path | None = Field(None, description="folder with *.safetensors, Hugging Face names")
    random_weights: bool = Field(False, description="random weights instead")
    gguf: Path | None = Field(None, description="a GGUF file: shape, weights and tokenizer")
    tokenizer: Path | None = Field(None, description="folder with the tokenizer (default: the weights' folder, if it has one)")
    served_model_name: str | None = Field(None, description="name in requests (default: the model's)")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where it runs")
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="number format (auto: the shape's; fp32 on a CPU)"
    )
    quantization: Literal["int8", "int4"] | None = Field(None, description="weight-only, of the layers' matrices")
    kv_dtype: Literal["auto", "int8"] = Field("auto", description="keys and values in the model's format, or int8 with scales")
    attention_backend: Literal["auto", "triton", "flashinfer", "sdpa"] = Field("auto", description="what computes attention")
    quantized_backend: Literal["auto", "triton", "torchao"] = Field(
        "auto", description="what computes products with quantised weights"
    )
    tensor_parallel_size: Count = Field(1, description="GPUs that share every layer")
    pipeline_parallel_size: Count = Field(1, description="groups of such GPUs, one after another")
    pipeline_layers: Counts | None = Field(
        None, description="decoder layers of each group, as 20,12 (default: as even as they go)"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="port; 0: a free one, printed")
    max_num_seqs: Count = Field(256, description="most sequences that run at once")
    max_num_batched_tokens: Count = Field(8192, description="token budget of one iteration")
    max_model_len: Count | None = Field(
        None, description="longest prompt and answer, tokens (default: the model's, at most 8192)"
    )
    kv_blocks: Count | None = Field(None, description="KV blocks of 16 tokens (default: what fits)")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(0.9, description="share of the GPU's memory to use")
    policy: str = Field("chunked-prefill", description=f"one of {', '.join(POLICIES)}")
    adapter: dict[str, Path] = Field(default_factory=dict, description="NAME=DIR, a peft adapter; may be repeated")
    max_adapters: Count = Field(8, description="most adapters at once")
    max_lora_rank: Annotated[int, Field(ge=0)] = Field(
        0, description="highest rank of adapters loaded later (0: none can be, unless --adapter gives some)"
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = Field(0, description="of random weights, and of sampling without a seed")
    drain_s: Annotated[float, Field(ge=0)] = Field(
        30.0, description="how long running requests may take to end after SIGTERM, s"
    )

    @property
    def ranks(self) -> int:
        """GPUs (or, on a CPU, processes) that hold the model."""
        return self.tensor_parallel_size * self.stages

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return len(self.pipeline_layers) if self.pipeline_layers is not None else self.pipeline_parallel_size

    @property
    def name(self) -> str:
        """The model's name in requests."""
        folder = self.weights.resolve().name if self.weights is not None else ""
        return self.served_model_name or self.model or (self.gguf.stem if self.gguf is not None else folder)


def parse(arguments: Sequence[str] | None = None) -> ServeConfig:
    """The settings of a command line. Raises InputError; exits for `--help` and for what argparse refuses (code 2)."""
    parser = argparse.ArgumentParser(prog="python -m systems.common.serve", description="An OpenAI-compatible server.")
    parser.add_argument("--config", type=Path, help="YAML file with the same keys; options override it")
    for name, field in ServeConfig.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=field.description)
        elif name == "adapter":
            parser.add_argument(flag, action="append", metavar="NAME=DIR", default=argparse.SUPPRESS, help=field.description)
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, help=field.description)
    given = vars(parser.parse_args(arguments))
    file: Path | None = given.pop("config")
    if "adapter" in given:
        given["adapter"] = dict(_named(text) for text in given["adapter"])
    values = {**(_read(file) if file is not None else {}), **given}
    try:
        config = ServeConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        where = str(file) if file is not None and key.partition(".")[0] not in given else "serve"
        raise InputError(where, key, first["input"], first["msg"]) from error
    _check(config)
    return config


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise InputError("serve", "adapter", text, "write NAME=DIR")
    return name, folder


def _read(file: Path) -> dict[str, object]:
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise InputError(file, "config", error.strerror or str(error), "name a YAML file that can be read") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(file, "config", str(error), "is no YAML: mend it") from error
    if not isinstance(values, dict):
        raise InputError(file, "config", values, "write keys and values, for example model: tiny")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _check(config: ServeConfig) -> None:
    sources = [config.weights is not None, config.random_weights, config.gguf is not None]
    if sum(sources) != 1:
        given = ", ".join(n for n, s in zip(("weights", "random_weights", "gguf"), sources, strict=True) if s)
        raise InputError("serve", "weights", given or None, "give exactly one of --weights DIR, --gguf FILE, --random-weights")
    if config.random_weights and config.model is None:
        raise InputError("serve", "model", None, "random weights need a shape: give --model")
    if config.model is not None and config.gguf is None:
        model(config.model, "serve")
    for key in ("weights", "gguf", "tokenizer"):
        if (path := getattr(config, key)) is not None and not path.exists():
            raise InputError("serve", key, str(path), "there is no such file or folder")
    if config.weights is not None and config.model is None and not (config.weights / "config.json").is_file():
        raise InputError("serve", "weights", str(config.weights), "the folder holds no config.json: give --model as well")
    for name, folder in config.adapter.items():
        if not (folder / "adapter_config.json").is_file():
            raise InputError(
                "serve", f"adapter {name}", str(folder), "holds no adapter_config.json: name a peft adapter's folder"
            )
    if config.pipeline_layers is not None and config.pipeline_parallel_size not in (1, config.stages):
        mend = f"pipeline_layers names {config.stages} groups: leave one of the two out"
        raise InputError("serve", "pipeline_parallel_size", config.pipeline_parallel_size, mend)
    if config.gguf is not None and config.ranks > 1:
        raise InputError("serve", "gguf", str(config.gguf), "several GPUs read safetensors only: use one, or --weights")
    if config.policy not in POLICIES:
        raise InputError("serve", "policy", config.policy, f"use one of {', '.join(POLICIES)}")
    if config.name in config.adapter:
        raise InputError("serve", "adapter", config.name, "the base model is called so: choose another name")
    if len(config.adapter) > config.max_adapters:
        raise InputError("serve", "max_adapters", config.max_adapters, f"{len(config.adapter)} adapters are given: raise it")
