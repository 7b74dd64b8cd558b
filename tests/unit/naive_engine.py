"""A second, slow engine for tests: every sequence and every block by itself, one decode step at a time.

Written from the policies' definitions, sharing no code with the engine under test beyond the request type.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from systems.common.core import Request


@dataclass
class Naive:
    request: Request
    prompt: int
    kv: int = 0
    generated: int = 0
    decodes: bool = False
    times: list[float] = field(default_factory=list)
    scheduled_s: float | None = None
    preemptions: int = 0


class NaiveEngine:
    def __init__(self, config, price):
        self.config, self.price = config, price
        self.waiting, self.running, self.done = [], [], []

    def blocks(self, tokens):
        return -(-tokens // self.config.block_tokens)

    def used(self):
        return sum(self.blocks(s.kv) for s in self.running)

    def free(self):
        return self.config.num_gpu_blocks - self.used()

    def step_need(self):
        return sum(self.blocks(s.kv + 1) - self.blocks(s.kv) for s in self.running if s.decodes)

    def preempt(self):
        s = self.running.pop()
        s.prompt = s.request.input_tokens + s.generated
        s.kv, s.decodes, s.preemptions = 0, False, s.preemptions + 1
        self.waiting.insert(0, s)

    def form(self):
        return self.form_chunked() if self.config.policy == "chunked-prefill" else self.form_prefill_first()

    def form_prefill_first(self):
        chunks, budget = [], self.config.max_num_batched_tokens
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            s = self.waiting[0]
            if s.prompt > budget or self.blocks(s.prompt) > self.free() - self.config.watermark_blocks:
                break
            self.waiting.pop(0)
            self.running.append(s)
            s.kv = s.prompt
            budget -= s.prompt
            chunks.append((s, 0, s.prompt))
        if chunks:
            return chunks, []
        while self.step_need() > self.free():
            self.preempt()
        return [], [s for s in self.running if s.decodes]

    def form_chunked(self):
        preempted = False
        while self.step_need() > self.free():
            self.preempt()
            preempted = True
        chunks = []
        budget = self.config.max_num_batched_tokens - sum(s.decodes for s in self.running)
        for s in [s for s in self.running if not s.decodes]:
            tokens = min(budget, s.prompt - s.kv)
            if tokens == 0:
                continue
            if self.blocks(s.kv + tokens) - self.blocks(s.kv) > self.free() - self.step_need():
                assert s is self.running[-1]
                self.preempt()
                preempted, budget = True, 0
                continue
            chunks.append((s, s.kv, tokens))
            s.kv += tokens
            budget -= tokens
        while not preempted and budget and self.waiting and len(self.running) < self.config.max_num_seqs:
            s = self.waiting[0]
            tokens = min(budget, s.prompt)
            need = self.blocks(s.prompt if self.config.reserve_prompt else tokens)
            if need > self.free() - self.step_need() - self.config.watermark_blocks:
                break
            self.waiting.pop(0)
            self.running.append(s)
            s.kv = tokens
            chunks.append((s, 0, tokens))
            budget -= tokens
        return chunks, [s for s in self.running if s.decodes]

    def token(self, s, now):
        s.generated += 1
        s.times.append(now)
        if s.generated == s.request.output_tokens:
            self.running.remove(s)
            self.done.append(s)
        else:
            s.decodes = True

    def run(self, requests):
        now, pending = 0.0, list(requests)
        while pending or self.waiting or self.running:
            while pending and pending[0].arrival_s <= now:
                request = pending.pop(0)
                self.waiting.append(Naive(request, request.input_tokens))
            if not (self.waiting or self.running):
                now = pending[0].arrival_s
                continue
            chunks, decodes = self.form()
            for s, past, _ in chunks:
                if past == 0 and s.scheduled_s is None:
                    s.scheduled_s = now
            now += self.price([(past, tokens) for _, past, tokens in chunks], len(decodes), sum(s.kv for s in decodes))
            for s in decodes:
                s.kv += 1
                self.token(s, now)
            for s, past, tokens in chunks:
                if past + tokens == s.prompt:
                    self.token(s, now)
            assert self.free() >= 0
        return sorted(self.done, key=lambda s: s.request.index)
