"""dLoRA's servers from one YAML file, in place of the nine arguments of the artifact's start_server.sh (sheet, 4).

    python -m systems.dlora.server FILE.yaml

An OpenAI-compatible server (docs/serving.md) whose engine is a manager with one process per replica; `model` in a request
selects the adapter. It prints two JSON lines: where it listens, then that it serves, with each replica's process and adapters.

| start_server.sh | here |
| --- | --- |
| 1 machines, 5 master_ip | `machines` (this one only), `host`, `port` |
| 2 tp | `tensor_parallel_size` |
| 3 num_groups | `replicas` |
| 4 num_models | `adapters`: names and PEFT folders, or `random_adapters`: how many |
| 6 model | `model`, and `weights` or `random_weights` |
| 7 exec_type | `exec_type`: `lora` (3), `peft` (2); not `vllm` (1) |
| 8 migration_type | `migration_type`: `round_robin` (1), `proactive` (2), `dlora` (3), `none` |
| 9 policy | `policy`: `fcfs`, `merge`, `credit` |
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from systems.common.errors import InputError
from systems.dlora.serving.file import read


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; 0 then, 1 when no replica is left, 2 for bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1 or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    try:
        given = read(Path(words[0]))
        try:
            from systems.common.serve.server import serve  # uvicorn: not needed for --help
        except ModuleNotFoundError as error:
            raise InputError("serve", "import", error.name, "not installed: run `make torch`") from error
        from systems.common.serve.process import EngineProcess
        from systems.dlora.serving.run import run

        return serve(given.for_model(), lambda: EngineProcess(given, run))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
