"""An engine that answers at once, for tests of MaverIQ's controller: the same words on stdout and over HTTP as the real one.

What it does depends on the prompt: `die` ends the process in the middle of a request, `die once FILE` only while FILE is not
there (it makes it), `rank FILE` likewise but says first that a rank has died, as the real one does, `wait FILE` answers once
FILE is there, `refuse` is an error, anything else comes back in capitals. Called with a model named in FAKE_ENGINE_BROKEN it
ends before it is ready.
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = sys.argv[-1]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_args: object) -> None:
        return

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        words = body["prompt"].split()
        if words == ["die"]:
            os._exit(9)
        if words[:2] == ["die", "once"] and not Path(words[2]).exists():
            Path(words[2]).touch()
            os._exit(9)
        while words[0] == "wait" and not Path(words[1]).exists():
            time.sleep(0.005)
        if words[0] == "rank" and not Path(words[1]).exists():
            if Path(words[1]).parent.is_dir():
                Path(words[1]).touch()  # before the answer: the controller ends this process at once
            self.answer(500, {"error": {"message": "rank 1 of 2 died (killed by SIGKILL)", "code": "engine_died"}})
            return
        if words == ["refuse"]:
            self.answer(400, {"error": {"message": "no such thing"}})
        else:
            told = {"prompt": body["prompt"].upper(), "tokens": body["max_tokens"], "model": MODEL, "pid": os.getpid()}
            self.answer(200, {"choices": [{"text": json.dumps(told)}]})

    def answer(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if MODEL in os.environ.get("FAKE_ENGINE_BROKEN", "").split():
    sys.exit("no such weights")
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(json.dumps({"port": server.server_address[1], "model": MODEL}), flush=True)
print(json.dumps({"ready": True}), flush=True)
server.serve_forever()
