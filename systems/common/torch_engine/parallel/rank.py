"""One rank that is not rank 0:  `python -m systems.common.torch_engine.parallel.rank --leader HOST:PORT --rank N`.

It connects to rank 0 twice: one connection brings the plans, the other is a leash that only ever ends. Whatever ends rank 0, or
makes it let go, ends this process at once, even one that hangs in a collective. The environment's FIVEFOLD_RANK_KEY must be
rank 0's. Exit codes: 0 told to end, 1 crashed or rank 0 gone, 2 bad input.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import threading
import traceback

from systems.common.errors import InputError
from systems.common.torch_engine.parallel.wire import ADAPTER, JSON, Wire

KEY = "FIVEFOLD_RANK_KEY"


def _leash(wire: Wire) -> None:
    """End with the connection."""
    try:
        wire.receive()
    except (EOFError, OSError):
        pass
    finally:
        os._exit(1)


def serve(wire: Wire, rank: int) -> None:
    """Build this rank's part and do as rank 0 says, until it says to end."""
    import numpy as np
    import torch  # after the leash is on: importing torch takes seconds

    from systems.common.engine.config import EngineConfig
    from systems.common.torch_engine.device import Device
    from systems.common.torch_engine.parallel import plan, spec
    from systems.common.torch_engine.parallel.adapters import unpack

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    given = spec.Spec.from_json(wire.receive_json()["spec"])
    weights = given.weights(rank)
    wire.send_json(**spec.room(given, rank, weights))
    go = wire.receive_json()
    links = spec.links(given, rank, *go["store"])
    config, place = EngineConfig(**go["config"]), given.place(rank)
    device = Device(given.shape, weights, config, given=given.given, place=place, links=links, **go["options"])
    wire.send_json(ready=True)
    with torch.inference_mode():
        while True:
            kind, payload = wire.receive()
            if kind == ADAPTER:
                assert device.adapters is not None
                device.adapters.load(*unpack(payload, place))
            elif kind == JSON:
                message = json.loads(bytes(payload))
                if "unload" not in message:
                    break
                assert device.adapters is not None
                device.adapters.unload(message["unload"])
            else:
                for name, arguments in plan.decode(np.frombuffer(payload, np.int64)):
                    plan.perform(device, name, arguments)
                    if name == "warm":
                        gc.collect()
                        gc.freeze()  # as rank 0 does: no pause while serving
    device.close()


def main(argv: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="one rank of an engine on several; started by rank 0")
    parser.add_argument("--leader", required=True, help="host:port where rank 0 listens")
    parser.add_argument("--rank", type=int, required=True)
    options = parser.parse_args(argv)
    host, _, port = options.leader.rpartition(":")
    try:
        for purpose in ("leash", "plans"):
            wire = Wire.connect(host, int(port))
            wire.send_json(rank=options.rank, key=os.environ.get(KEY, ""), purpose=purpose)
            if purpose == "leash":
                threading.Thread(target=_leash, args=(wire,), daemon=True).start()
        serve(wire, options.rank)
    except InputError as error:
        value = error.value if isinstance(error.value, (str, int, float, tuple, list)) else str(error.value)
        wire.send_json(error=[error.where, error.key, value, error.mend])
        print(error, file=sys.stderr)
        return 2
    except (EOFError, ConnectionError) as error:
        print(f"rank 0 is gone: {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # no teardown that could wait for another rank
