"""The YAML file that describes dLoRA's servers, checked; `systems.dlora.server` has the table of its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from systems.common.errors import InputError
from systems.common.models import model
from systems.common.serve.config import ServeConfig
from systems.dlora.cluster.migration import MigrationRules
from systems.dlora.cluster.placement import Hosts, fill

Count = Annotated[int, Field(ge=1)]
LOCAL = ("localhost", "127.0.0.1")
Above0 = Annotated[float, Field(gt=0)]


class Migration(BaseModel):
    """When requests and adapters move (`MigrationRules`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    interval_s: Above0 = 10.0
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9
    load_excess: Above0 = 16.0
    limit_s: Above0 = 10.0
    scope: Literal["pair", "cluster"] = "pair"

    @property
    def rules(self) -> MigrationRules:
        """What decides; KV cache is computed again where a request goes on."""
        return MigrationRules(self.interval_s, self.memory_share, self.load_excess, self.limit_s, self.scope)


class ServerFile(BaseModel):
    """The YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    weights: Path | None = None
    random_weights: bool = False
    tokenizer: Path | None = None
    machines: list[str] = ["localhost"]
    replicas: Count = 1
    tensor_parallel_size: Count = 1
    base_model: str | None = None
    """Its name where adapters were trained; those that name another one are refused. None: shapes alone must fit."""
    adapters: dict[Annotated[str, Field(pattern=r"^[^\x00]+$")], Path] = {}
    random_adapters: Annotated[int, Field(ge=0)] = 0
    slots: Count = 8
    """Adapters that a GPU holds, and so adapters that a replica hosts."""
    exec_type: Literal["lora", "peft", "vllm"] = "lora"
    migration_type: Literal["round_robin", "proactive", "dlora", "none"] | None = None
    policy: Literal["fcfs", "merge", "credit"] | None = None
    credit_scale: Above0 = 1e4
    migration: Migration = Migration()
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    max_num_seqs: Count = 16
    """Largest batch."""
    max_num_batched_tokens: Count = 4096
    max_model_len: Count | None = None
    kv_blocks: Count | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_lora_rank: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    drain_s: Annotated[float, Field(ge=0)] = 30.0

    @property
    def names(self) -> list[str]:
        """Adapters in the file's order, which numbers them."""
        return [*self.adapters, *(f"adapter-{i}" for i in range(self.random_adapters))]

    @property
    def migration_kind(self) -> str:
        """One of `migration.TYPES`: dLoRA's own where nothing is said; the artifact's baselines never migrate."""
        return self.migration_type or ("dlora" if self.exec_type == "lora" and self.tensor_parallel_size == 1 else "none")

    @property
    def migrates(self) -> bool:
        """Whether requests ever move."""
        return self.migration_kind == "dlora" and self.replicas > 1

    def hosts(self) -> Hosts:
        """Adapters of each replica, by dLoRA's greedy placement for equal shares (sheet, 2.8)."""
        count = len(self.names)
        return fill([set()] * self.replicas, [1.0] * self.replicas, [1.0] * count, 0.0, [self.slots] * self.replicas)

    def devices(self, replica: int, visible: str | None) -> list[str]:
        """GPUs of one replica, of those that are `visible` (CUDA_VISIBLE_DEVICES, None: all); none where it has no GPU.

        Raises:
            InputError: there are not so many.
        """
        first, count = replica * self.tensor_parallel_size, self.tensor_parallel_size
        if self.device == "cpu" or (visible == "" and self.device == "auto"):
            return []
        if visible is None:
            return [str(place) for place in range(first, first + count)]
        known = visible.split(",")
        if len(known) < first + count:
            mend = f"{self.replicas} replicas of {count} GPUs need {self.replicas * count}: start fewer, or show more GPUs"
            raise InputError("serve", "CUDA_VISIBLE_DEVICES", visible, mend)
        return known[first : first + count]

    def for_model(self) -> ServeConfig:
        """What the HTTP process, and a replica that loads the model, want to know."""
        same = (
            "model", "weights", "random_weights", "tokenizer", "device", "dtype", "host", "port", "max_num_seqs",
            "max_num_batched_tokens", "max_model_len", "kv_blocks", "gpu_memory_utilization", "seed", "drain_s",
        )  # fmt: skip
        return ServeConfig.model_validate({key: getattr(self, key) for key in same})

    def for_common_engine(self) -> ServeConfig:
        """A replica of the common engine, which has every adapter on the GPU."""
        room = {"max_adapters": max(self.slots, len(self.adapters)), "max_lora_rank": self.max_lora_rank}
        changes: dict[str, Any] = {"tensor_parallel_size": self.tensor_parallel_size, "adapter": self.adapters, **room}
        return self.for_model().model_copy(update=changes)


def read(file: Path) -> ServerFile:
    """The checked file; folders in it count from its own. Raises InputError."""
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise InputError(file, "file", error.strerror or str(error), "name a YAML file that can be read") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(file, "file", str(error), "is no YAML: mend it") from error
    if not isinstance(values, dict):
        raise InputError(file, "file", values, "write keys and values, for example model: llama-2-7b")
    try:
        given = ServerFile.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(file, ".".join(str(part) for part in first["loc"]), first["input"], first["msg"]) from error
    _check(given, file)
    return _resolved(given, file)


def _check(given: ServerFile, file: Path) -> None:
    model(given.model, str(file))
    if given.random_weights == (given.weights is not None):
        raise InputError(file, "weights", given.weights, "give either weights: FOLDER or random_weights: true")
    if far := [machine for machine in given.machines if machine not in LOCAL]:
        raise InputError(file, "machines", far[0], "replicas start on this machine only: write localhost")
    if not given.names:
        raise InputError(file, "adapters", None, "give at least one, or random_adapters: NUMBER")
    if len({given.model, *given.names}) <= len(given.names):
        raise InputError(
            file, "adapters", list(given.adapters), "one is called as the base model or a random one: choose another name"
        )
    if given.replicas * given.slots < (count := len(given.names)):
        mend = f"{count} adapters need more than {given.replicas} x {given.slots} slots: raise slots or replicas"
        raise InputError(file, "slots", given.slots, mend)
    if given.max_model_len is not None and given.max_model_len > given.max_num_batched_tokens:
        mend = f"prompts run whole, in max_num_batched_tokens ({given.max_num_batched_tokens}): lower it, or raise that"
        raise InputError(file, "max_model_len", given.max_model_len, mend)
    if given.max_num_batched_tokens < given.max_num_seqs:
        mend = f"every request of a batch takes one: give at least max_num_seqs ({given.max_num_seqs})"
        raise InputError(file, "max_num_batched_tokens", given.max_num_batched_tokens, mend)
    _check_kind(given, file)


def _check_kind(given: ServerFile, file: Path) -> None:
    """What goes with which `exec_type`, and with several GPUs per replica."""
    if given.exec_type == "vllm":
        mend = "a whole model per adapter is a baseline of the simulator only: serve lora or peft"
        raise InputError(file, "exec_type", "vllm", mend)
    if given.exec_type == "peft":
        for key, value in (("policy", given.policy), ("migration_type", given.migration_type)):
            if value not in (None, "none"):
                raise InputError(file, key, value, "is of exec_type lora: peft serves one adapter at a time, and moves nothing")
        if given.tensor_parallel_size > 1:
            raise InputError(file, "tensor_parallel_size", given.tensor_parallel_size, "peft is served on one GPU: write 1")
    elif given.tensor_parallel_size > 1:
        mend = "dLoRA's engine has one GPU; with several, the common engine serves policy fcfs without migration: say so"
        if given.random_adapters:
            raise InputError(file, "random_adapters", given.random_adapters, "are for one GPU per replica: name folders")
        if given.policy != "fcfs":
            raise InputError(file, "policy", given.policy, mend)
        if given.migration_kind == "dlora":
            raise InputError(file, "migration_type", given.migration_type, mend)


def _resolved(given: ServerFile, file: Path) -> ServerFile:
    """With whole paths, all of which are there."""
    base = file.resolve().parent
    folders = {name: base / folder for name, folder in given.adapters.items()}
    for name, folder in folders.items():
        if not (folder / "adapter_config.json").is_file():
            raise InputError(
                file, f"adapters.{name}", str(folder), "holds no adapter_config.json: name a PEFT adapter's folder"
            )
    found: dict[str, Any] = {"adapters": folders}
    for key in ("weights", "tokenizer"):
        if (path := getattr(given, key)) is not None:
            found[key] = base / path
            if not found[key].is_dir():
                raise InputError(file, key, str(found[key]), "there is no such folder")
    return given.model_copy(update=found)
