"""dLoRA's servers from one YAML file, in place of the nine arguments of the artifact's start_server.sh (sheet, 4).

    python -m systems.dlora.server FILE.yaml

Starts `replicas` servers (`systems.common.serve`), each with some of the adapters, and a front (`serving`) that sends every
request to one of them. The front prints two JSON lines as each server does: where it listens, then that it serves.

| start_server.sh | here |
| --- | --- |
| 1 machines, 5 master_ip | `machines` (this one only so far), `host`, `port` |
| 2 tp | `tensor_parallel_size` |
| 3 num_groups | `replicas` |
| 4 num_models | `adapters`: names and PEFT folders |
| 6 model | `model`, and `weights` or `random_weights` |
| 7 exec_type | `exec_type`: `lora` only so far |
| 8 migration_type | `migration_type`: `dispatch` only so far |
| 9 policy | `policy`: `fcfs` (unmerged) only so far |
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from systems.common.errors import InputError
from systems.common.models import model
from systems.dlora.cluster.placement import fill

Count = Annotated[int, Field(ge=1)]
LOCAL = ("localhost", "127.0.0.1")


class ServerFile(BaseModel):
    """The YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    weights: Path | None = None
    random_weights: bool = False
    machines: list[str] = ["localhost"]
    replicas: Count = 1
    tensor_parallel_size: Count = 1
    adapters: dict[str, Path] = Field(min_length=1)
    slots: Count = 8
    """Adapters that a replica hosts."""
    exec_type: Literal["lora"] = "lora"
    migration_type: Literal["dispatch"] = "dispatch"
    policy: Literal["fcfs"] = "fcfs"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_num_seqs: Count = 16
    max_num_batched_tokens: Count = 4096
    max_model_len: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    drain_s: Annotated[float, Field(ge=0)] = 30.0

    @property
    def names(self) -> list[str]:
        """Adapters in the file's order, which numbers them."""
        return list(self.adapters)

    def hosts(self) -> list[set[int]]:
        """Adapters of each replica, by dLoRA's greedy placement for equal shares (sheet, 2.8)."""
        count = len(self.adapters)
        return fill([set()] * self.replicas, [1.0] * self.replicas, [1.0] * count, 0.0, [self.slots] * self.replicas)

    def replica_options(self, hosted: set[int]) -> list[str]:
        """Command line of one replica's server."""
        source = ["--random-weights"] if self.random_weights else ["--weights", str(self.weights)]
        adapters = [f"--adapter={name}={folder}" for i, (name, folder) in enumerate(self.adapters.items()) if i in hosted]
        longest = [] if self.max_model_len is None else ["--max-model-len", str(self.max_model_len)]
        values: dict[str, Any] = {
            "model": self.model, "tensor-parallel-size": self.tensor_parallel_size, "device": self.device,
            "max-num-seqs": self.max_num_seqs, "max-num-batched-tokens": self.max_num_batched_tokens,
            "max-adapters": self.slots, "seed": self.seed, "drain-s": self.drain_s, "port": 0,
        }  # fmt: skip
        return [*source, *adapters, *longest, *(word for key, value in values.items() for word in (f"--{key}", str(value)))]

    def devices(self, replica: int) -> list[int]:
        """GPUs of one replica; none where it runs on a CPU."""
        first = replica * self.tensor_parallel_size
        return [] if self.device == "cpu" else list(range(first, first + self.tensor_parallel_size))


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
        key = ".".join(str(part) for part in first["loc"])
        served = " (only this is served so far)" if key in ("exec_type", "migration_type", "policy") else ""
        raise InputError(file, key, first["input"], first["msg"] + served) from error
    return _checked(given, file)


def _checked(given: ServerFile, file: Path) -> ServerFile:
    base = file.resolve().parent
    model(given.model, str(file))
    if given.random_weights == (given.weights is not None):
        raise InputError(file, "weights", given.weights, "give either weights: FOLDER or random_weights: true")
    if far := [machine for machine in given.machines if machine not in LOCAL]:
        raise InputError(file, "machines", far[0], "servers start on this machine only so far: write localhost")
    if given.model in given.adapters:
        raise InputError(file, "adapters", given.model, "the base model is called so: choose another name")
    folders = {name: base / folder for name, folder in given.adapters.items()}
    for name, folder in folders.items():
        if not (folder / "adapter_config.json").is_file():
            raise InputError(
                file, f"adapters.{name}", str(folder), "holds no adapter_config.json: name a PEFT adapter's folder"
            )
    if given.replicas * given.slots < len(folders):
        mend = f"{len(folders)} adapters need more than {given.replicas} x {given.slots} slots: raise slots or replicas"
        raise InputError(file, "slots", given.slots, mend)
    weights = base / given.weights if given.weights is not None else None
    if weights is not None and not weights.is_dir():
        raise InputError(file, "weights", str(weights), "there is no such folder")
    return given.model_copy(update={"adapters": folders, "weights": weights})


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; 0 then, 1 when no replica is left, 2 for bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1 or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    try:
        given = read(Path(words[0]))
        try:
            from systems.dlora.serving.life import serve  # uvicorn: not needed for --help
        except ModuleNotFoundError as error:
            raise InputError("serve", "import", error.name, "not installed: run `make torch`") from error
        return serve(given)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
