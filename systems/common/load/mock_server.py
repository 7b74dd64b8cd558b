"""The mock server itself (`mock` is its command): HTTP as far as load generators use it, and answers by the clock."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass
from typing import Any, TextIO, cast

FAULTS = ("500", "refuse", "half", "stop", "garbage", "nonsense", "error", "silent", "slow")
MODEL = "mock"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the server does. Times in seconds; `every` counts answers, the first being number 1."""

    ttft_s: float = 0.05
    itl_s: float = 0.01
    models: tuple[str, ...] = (MODEL,)
    fault: str | None = None
    every: int = 1
    tokens_per_event: int = 1
    usage: bool = True
    keep_alive: bool = True

    def fault_of(self, number: int) -> str | None:
        """What goes wrong with answer `number`."""
        return self.fault if number % self.every == 0 else None


class Mock:
    """The server: counts answers and writes the log."""

    def __init__(self, behaviour: Behaviour, log: TextIO | None = None) -> None:
        """`log` is flushed after every line."""
        self.behaviour, self._log = behaviour, log
        self.answers = 0

    async def serve(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> asyncio.Server:
        """Listen; port 0 chooses a free one."""
        return await asyncio.get_running_loop().create_server(lambda: _Session(self), host, port, backlog=4096, ssl=tls)

    def note(self, **entry: object) -> None:
        """A line of the log."""
        if self._log is not None:
            self._log.write(json.dumps(entry) + "\n")
            self._log.flush()


class _Session(asyncio.Protocol):
    """One connection: reads requests, streams answers."""

    def __init__(self, mock: Mock) -> None:
        self.mock = mock
        self.buffer = b""
        self.transport: asyncio.Transport
        self.timer: asyncio.TimerHandle | None = None
        self.stream: _Stream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its type

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.stream is not None:
            self.stream.note("left")

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        start, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        self._handle(start, headers.get("x-request-id", ""), rest[:length], time.monotonic())

    def _handle(self, start: str, name: str, body: bytes, now_s: float) -> None:
        method, path, _ = start.split(" ")
        behaviour = self.mock.behaviour
        if path.endswith("/models"):
            self.whole(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in behaviour.models]})
            return
        if method != "POST" or not path.endswith("/completions"):
            self.whole(404, {"error": {"message": f"no such route: {path}"}})
            return
        asked = json.loads(body)
        if asked.get("model") not in behaviour.models:
            self.whole(404, {"error": {"message": f"no such model: {asked.get('model')}"}})
            return
        self.mock.answers += 1
        fault = behaviour.fault_of(self.mock.answers)
        self.stream = _Stream(self, name, asked, path.endswith("/chat/completions"), fault, now_s)
        self.stream.begin()

    def whole(self, status: int, content: dict[str, Any]) -> None:
        """A response in one piece."""
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} Mock\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


class _Stream:
    """One streamed answer."""

    def __init__(
        self, session: _Session, name: str, asked: dict[str, Any], chat: bool, fault: str | None, now_s: float
    ) -> None:
        self.session, self.name, self.asked, self.chat, self.fault = session, name, asked, chat, fault
        self.behaviour = session.mock.behaviour
        self.received_s = now_s
        self.total = int(asked.get("max_tokens", 16))
        self.sent = 0
        self.token_s: list[float] = []
        prompt = asked.get("prompt") or " ".join(part["content"] for part in asked.get("messages", []))
        self.prompt_tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        self.scale = 10.0 if fault == "slow" else 1.0
        self.loop = asyncio.get_running_loop()
        self.due_s = self.loop.time() + self.behaviour.ttft_s * self.scale
        # a token's event but for the number of tokens, made once: a server of many streams has no time for JSON
        usual = self._data({**self._said(self.behaviour.tokens_per_event), "finish_reason": None}, "@")
        self.before, _, self.after = usual.partition(b'"@"')

    def begin(self) -> None:
        """The head, or a fault in its place; then the first token's time is awaited."""
        write, abort = self.session.transport.write, self.session.transport.abort
        if self.fault == "500":
            self.session.whole(500, {"error": {"message": "out of memory\nor so"}})
            self._over("500")
        elif self.fault == "refuse":
            self._over("refuse")
            abort()
        elif self.fault == "nonsense":
            write(b"220 mail.example.org ESMTP\r\n")
            self._over("nonsense")
        else:
            close = "" if self.behaviour.keep_alive else "Connection: close\r\n"
            head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{close}Transfer-Encoding: chunked\r\n\r\n"
            write(head.encode())
            if self.chat:
                self._event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            self.session.timer = self.loop.call_at(self.due_s, self._token)

    def _token(self) -> None:
        if self.fault in ("half", "stop", "garbage", "error", "silent") and self.sent >= self.total // 2:
            self._break(self.fault)
            return
        new = min(self.behaviour.tokens_per_event, self.total - self.sent)
        self.sent += new
        last = self.sent == self.total
        self.token_s += [time.monotonic()] * new
        if last or new != self.behaviour.tokens_per_event:
            self._event({**self._said(new), "finish_reason": "length" if last else None})
        else:
            self._chunk(b"%b%d%b" % (self.before, self.sent, self.after) if self.after else self.before)
        if not last:
            self.due_s += self.behaviour.itl_s * self.scale * self.behaviour.tokens_per_event
            self.session.timer = self.loop.call_at(self.due_s, self._token)
            return
        if self.behaviour.usage:
            self._event(None)
        self._end()

    def _said(self, tokens: int) -> dict[str, Any]:
        text = " tok" * tokens
        return {"delta": {"content": text}} if self.chat else {"text": text}

    def _break(self, fault: str) -> None:
        if fault == "garbage":
            self._chunk(b"data: {this is no JSON\n\n")
        elif fault == "error":
            self._chunk(b'data: {"error": {"message": "the engine died", "code": 500}}\n\n')
        elif fault == "stop":
            self.session.transport.write(b"0\r\n\r\n")
        self._over(fault)
        if fault != "silent":
            self.session.transport.close()

    def _event(self, choice: dict[str, Any] | None) -> None:
        self._chunk(self._data(choice, self.sent))

    def _data(self, choice: dict[str, Any] | None, sent: int | str) -> bytes:
        event: dict[str, Any] = {"id": "cmpl-0", "object": "text_completion", "model": self.asked["model"]}
        event["choices"] = [] if choice is None else [{"index": 0, **choice}]
        if self.behaviour.usage:
            event["usage"] = {"prompt_tokens": self.prompt_tokens, "completion_tokens": sent}
        return b"data: " + json.dumps(event).encode() + b"\n\n"

    def _chunk(self, data: bytes) -> None:
        self.session.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _end(self) -> None:
        self.session.transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        self._over("")
        if not self.behaviour.keep_alive:
            self.session.transport.close()

    def _over(self, fault: str) -> None:
        self.session.stream = None
        self.note(fault)

    def note(self, fault: str) -> None:
        """This answer's line of the log."""
        prompt = self.asked.get("prompt")
        self.session.mock.note(
            name=self.name,
            fault=fault,
            model=self.asked["model"],
            prompt_tokens=self.prompt_tokens,
            prompt_head=prompt[:4] if isinstance(prompt, list) else None,
            max_tokens=self.total,
            ignore_eos=self.asked.get("ignore_eos", False),
            received_s=self.received_s,
            token_s=self.token_s,
        )
