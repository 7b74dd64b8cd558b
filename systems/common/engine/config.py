"""The limits of one engine."""

from __future__ import annotations

from dataclasses import dataclass

from systems.common.errors import InputError

POLICIES = ("chunked-prefill", "prefill-first")
KV_DTYPES = ("auto", "int8")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What bounds a batch. Names follow vLLM's flags where one exists.

    Attributes:
        num_gpu_blocks: KV blocks in the pool, as the real engine resolved them (never memory times utilisation).
        policy: `chunked-prefill` (vLLM v1, Sarathi-Serve) or `prefill-first` (vLLM 0.6.3).
        block_tokens: tokens per KV block.
        max_num_batched_tokens: token budget of one iteration.
        max_num_seqs: most sequences that run at once.
        watermark: share of the blocks that admission leaves free, so that a new prompt does not preempt at once
            (0.01 in vLLM 0.6.3; vLLM v1 has none).
        reserve_prompt: admit a prompt only when its blocks fit whole, even if its first chunk alone would.
        kv_dtype: what a measured engine keeps keys and values in: the model's own format (`auto`), or `int8` with scales.
            Simulated engines price the model's own format.
    """

    num_gpu_blocks: int
    policy: str = "chunked-prefill"
    block_tokens: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    watermark: float = 0.0
    reserve_prompt: bool = True
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        """Raises InputError for a limit that no engine could run with."""
        for key in ("num_gpu_blocks", "block_tokens", "max_num_batched_tokens", "max_num_seqs"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise InputError("engine", key, value, "give a whole number of at least 1")
        if self.policy not in POLICIES:
            raise InputError("engine", "policy", self.policy, f"use one of {', '.join(POLICIES)}")
        if self.kv_dtype not in KV_DTYPES:
            raise InputError("engine", "kv_dtype", self.kv_dtype, f"use one of {', '.join(KV_DTYPES)}")
        if not 0 <= self.watermark < 1:
            raise InputError("engine", "watermark", self.watermark, "give a share from 0 up to, not including, 1")
        if self.policy == "chunked-prefill" and self.max_num_batched_tokens < self.max_num_seqs:
            raise InputError(
                "engine",
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"give at least max_num_seqs ({self.max_num_seqs}): every decoding sequence takes one token of the budget",
            )

    @property
    def watermark_blocks(self) -> int:
        """Blocks that admission leaves free."""
        return int(self.watermark * self.num_gpu_blocks)

    def blocks(self, tokens: int) -> int:
        """KV blocks that `tokens` tokens of one sequence occupy."""
        return -(-tokens // self.block_tokens)

    def check(self, input_tokens: int, output_tokens: int) -> None:
        """Raises InputError for a request that could never finish, however empty the engine."""
        kept = input_tokens + output_tokens - 1  # the last token's keys and values are never stored
        usable = self.num_gpu_blocks - self.watermark_blocks
        if self.blocks(kept) > usable:
            raise InputError(
                "request",
                "input_tokens + output_tokens",
                input_tokens + output_tokens,
                f"longer than the KV cache ({usable * self.block_tokens} usable tokens): shorten it or raise num_gpu_blocks",
            )
        if self.policy == "prefill-first" and kept > self.max_num_batched_tokens:
            raise InputError(
                "request",
                "input_tokens + output_tokens",
                input_tokens + output_tokens,
                f"longer than max_num_batched_tokens ({self.max_num_batched_tokens}), and prefill-first never splits a prompt: "
                "shorten it, raise the limit or use chunked-prefill",
            )
