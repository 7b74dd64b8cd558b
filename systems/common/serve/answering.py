"""From a request for an answer to jobs for the engine: checked whole before anything is queued."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

import numpy as np

from systems.common.errors import InputError
from systems.common.serve.answers import Style
from systems.common.serve.delivery import Part, pieces, whole
from systems.common.serve.http import Exchange, HttpError
from systems.common.serve.messages import Job
from systems.common.serve.protocol import Chat, Common, Completion, brief, read
from systems.common.serve.served import Model
from systems.common.serve.streams import Stream, Streams
from systems.common.serve.text import Answer, Detokenizer

LONG_TEXT = 20_000
"""Characters from which a prompt is tokenised in another thread, so that streams do not wait for it."""
LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken: logits divided by less are no float32 any more."""
LEAST_TOP_P = 1e-6
"""The device computes in float32, where a smaller share could be none at all."""
DEFAULT_TOKENS = 16
"""Length of a completion that asks for none, as OpenAI's API has it."""


class Answering:
    """See the module. `must_serve` raises while no new work can be taken."""

    def __init__(self, model: Model, streams: Streams, must_serve: Callable[[], None]) -> None:
        self._model, self._streams, self._must_serve = model, streams, must_serve

    async def completions(self, exchange: Exchange) -> None:
        """Answer `/v1/completions`. Raises HttpError and what `delivery` raises."""
        wanted = read(await exchange.body(), Completion)
        adapter = self._adapter(wanted.model)
        prompts = [await self._encode(prompt) if isinstance(prompt, str) else prompt for prompt in wanted.prompts]
        await self._answer(exchange, wanted, prompts, wanted.max_tokens or DEFAULT_TOKENS, adapter, chat=False)

    async def chat(self, exchange: Exchange) -> None:
        """Answer `/v1/chat/completions`. Raises as `completions` does."""
        wanted = read(await exchange.body(), Chat)
        adapter = self._adapter(wanted.model)
        messages = [message.plain for message in wanted.messages]
        write = self._model.tokenizer.chat
        try:
            long = sum(len(message["content"]) for message in messages) > LONG_TEXT
            prompt = await asyncio.to_thread(write, messages) if long else write(messages)
        except ValueError as error:
            raise HttpError(400, str(error), "messages") from error
        most = wanted.max_completion_tokens or wanted.max_tokens or max(1, self._room(len(prompt)))
        await self._answer(exchange, wanted, [prompt], most, adapter, chat=True)

    def _room(self, prompt_tokens: int) -> int:
        """Most tokens that can follow a prompt."""
        assert self._streams.ready is not None
        config = self._streams.ready.config
        most = min(self._streams.ready.max_tokens, (config.num_gpu_blocks - config.watermark_blocks) * config.block_tokens)
        if config.policy == "prefill-first":
            most = min(most, config.max_num_batched_tokens)
        return most - prompt_tokens

    def _adapter(self, model: str) -> str | None:
        """The adapter that a request's model name means; None for the base model."""
        if model == self._model.name:
            return None
        if model not in self._model.adapters.names:
            known = ", ".join([self._model.name, *self._model.adapters.names])
            raise HttpError(404, f"the model {brief(model)} does not exist here: there are {known}", "model", "model_not_found")
        return model

    async def _encode(self, text: str) -> list[int]:
        encode = self._model.tokenizer.encode
        tokens = await asyncio.to_thread(encode, text) if len(text) > LONG_TEXT else encode(text)
        if not tokens:
            raise HttpError(400, "prompt: has no tokens", "prompt")
        return tokens

    def _check(self, prompts: list[list[int]], most: int, wanted: Common) -> None:
        assert self._streams.ready is not None
        vocab = self._streams.ready.vocab
        for prompt in prompts:
            if (top := max(prompt)) >= vocab:
                raise HttpError(400, f"prompt: token {brief(top)} is none of the model's {vocab}", "prompt")
            try:
                self._streams.check(len(prompt), most)
            except InputError as error:
                field = "prompt" if self._room(len(prompt)) < 1 else "max_tokens"
                raise HttpError(
                    400, f"{field}: prompt of {len(prompt)} tokens, max_tokens {brief(most)}: {error}", field
                ) from error
        if wanted.min_tokens > most:
            raise HttpError(400, f"min_tokens: {wanted.min_tokens} is more than max_tokens ({most})", "min_tokens")
        if "" in wanted.stops:
            raise HttpError(400, "stop: an empty string would stop everything", "stop")
        if wanted.stream_options is not None and not wanted.stream:
            raise HttpError(400, "stream_options: only with stream", "stream_options")

    async def _answer(
        self, exchange: Exchange, wanted: Common, prompts: list[list[int]], most: int, adapter: str | None, chat: bool
    ) -> None:
        self._check(prompts, most, wanted)
        self._must_serve()  # it may have begun to end while the body came
        stops = frozenset(wanted.stop_token_ids or ())
        if not wanted.ignore_eos:
            stops |= self._model.tokenizer.stop_tokens

        temperature, top_p = _or(wanted.temperature, 1.0), max(_or(wanted.top_p, 1.0), LEAST_TOP_P)
        temperature = temperature if temperature >= LEAST_TEMPERATURE else 0.0
        seed = (wanted.seed or 0, wanted.seed is not None)

        def submit(prompt: list[int]) -> Stream:
            tokens = np.asarray(prompt, np.int64)
            job = Job(0, tokens, most, temperature, top_p, seed[0], stops, wanted.min_tokens, adapter)
            return self._streams.submit(job, seed[1], wake)

        wake = asyncio.Event()
        style = Style(f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", wanted.model, chat, bool(wanted.return_token_ids))
        parts: list[Part] = []
        with exchange.watched(wake) as gone, self._model.adapters.using(adapter):
            try:
                for index, prompt in enumerate(prompts):
                    text = Answer(Detokenizer(self._model.tokenizer.decode, prompt), wanted.stops, wanted.min_tokens)
                    parts.append(Part(index, submit(prompt), text))
                if wanted.stream:
                    await exchange.events(pieces(self._streams, parts, wanted, style, wake, gone))
                else:
                    await whole(self._streams, exchange, parts, style, wake, gone)
            finally:
                for part in parts:
                    self._streams.abort(part.stream)  # those that ended are left alone


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
