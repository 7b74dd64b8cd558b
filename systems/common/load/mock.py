"""A server with known latencies, to test clients with: `python -m systems.common.load.mock --ttft 0.05 --itl 0.01`.

It speaks as much of OpenAI's API as a load generator uses, and computes nothing: the first token comes `--ttft` seconds after
the request, every further one `--itl` later. `--log FILE` gets one JSON line per answer with the times, on this machine's
monotonic clock, at which the request came in and every token went out, so that what a client measured can be checked
against what was sent.

`--fault KIND --every N` makes every N-th answer go wrong:

| fault | what the client sees |
| --- | --- |
| `500` | an HTTP error |
| `refuse`, `half` | a connection closed before, or in the middle of, an answer |
| `stop` | a stream that ends in due form, but too early |
| `garbage`, `nonsense` | an event that is no JSON, an answer that is no HTTP |
| `error` | an error reported inside the stream |
| `silent` | nothing more after half of the tokens |
| `slow` | all times ten times longer |
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import ssl
import sys
from collections.abc import Sequence

from systems.common.errors import InputError
from systems.common.load import loops
from systems.common.load.mock_server import FAULTS, MODEL, Behaviour, Mock


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="python -m systems.common.load.mock", description="A server with known latencies, to test clients with."
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    made.add_argument(
        "--port", type=int, default=0, help="0 (the default) chooses a free one; the first line printed is the URL"
    )
    made.add_argument("--ttft", type=float, default=0.05, help="seconds to the first token (%(default)s)")
    made.add_argument("--itl", type=float, default=0.01, help="seconds between tokens (%(default)s)")
    made.add_argument("--model", action="append", help=f"a model's name (default: {MODEL}); may be repeated")
    made.add_argument("--tokens-per-event", type=int, default=1, help="tokens that come together (%(default)s)")
    made.add_argument("--no-usage", action="store_true", help="don't say how many tokens there were")
    made.add_argument("--no-keep-alive", action="store_true", help="close the connection after every answer")
    made.add_argument("--certificate", metavar="FILE", help="speak TLS, with the certificate and the key in this PEM file")
    made.add_argument("--fault", choices=FAULTS, help="what goes wrong")
    made.add_argument("--every", type=int, default=1, help="with every so-manieth answer (%(default)s)")
    made.add_argument("--log", type=argparse.FileType("a", encoding="utf-8"), metavar="FILE", help="a JSON line per answer")
    return made


async def _serve(options: argparse.Namespace) -> None:
    behaviour = Behaviour(
        ttft_s=options.ttft,
        itl_s=options.itl,
        models=tuple(options.model or (MODEL,)),
        fault=options.fault,
        every=options.every,
        tokens_per_event=options.tokens_per_event,
        usage=not options.no_usage,
        keep_alive=not options.no_keep_alive,
    )
    tls = None
    if options.certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            tls.load_cert_chain(options.certificate)
        except OSError as error:
            raise InputError("mock", "--certificate", options.certificate, f"give a PEM file with both ({error})") from error
    try:
        server = await Mock(behaviour, options.log).serve(options.host, options.port, tls)
    except OSError as error:
        raise InputError("mock", "--port", options.port, f"can't listen ({error.strerror}): choose another") from error
    port = server.sockets[0].getsockname()[1]
    print(f"http{'s' if tls else ''}://{options.host}:{port}/v1", flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    server.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; serves until SIGINT or SIGTERM. 2 for bad input."""
    made = parser()
    options = made.parse_args(arguments)
    if not (options.ttft >= 0 and options.itl >= 0 and options.every >= 1 and options.tokens_per_event >= 1):
        made.error("times are 0 or more seconds; --every and --tokens-per-event at least 1")
    try:
        loops.run(_serve(options))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
