"""SpotServe's cost model: how long a batch takes under a parallel layout, from the offline profile. Pure.

The paper writes l_exe(S_out | S_in) = t(S_in) + sum_i t(S_in + i), which is about t_prefill + S_out * t_decode since
the KV cache keeps a decode step nearly constant. This is the closed form that its artifact computes:

    f     = ceil(layers / P)
    t1    = init[M][B/m1] * f * (P + m1 - 1) / m1  +  pp_init_comm / m1 * (P - 1)      # prefill
    t2    = incr[M][B/m2] * f * (P + m2 - 1)       +  pp_incr_comm * (P - 1)           # each output token
    l_exe = k * (t1 + S_out * t2 + 2 * embed[B])
    phi   = D * B / l_exe
"""

from __future__ import annotations

from dataclasses import dataclass

from systems.spotserve.profiles import Profile


@dataclass(frozen=True, slots=True)
class Layout:
    """How one replica (the paper's pipeline) is spread and fed: stages P, tensor degree M, batch B, micro-batches.

    The batch is cut into `prefill_micro_batches` (m1) during prefill and `decode_micro_batches` (m2) during decode.
    """

    pipeline: int
    tensor: int
    batch: int = 1
    prefill_micro_batches: int = 1
    decode_micro_batches: int = 1

    def __post_init__(self) -> None:
        assert min(self.pipeline, self.tensor, self.batch, self.prefill_micro_batches, self.decode_micro_batches) >= 1, self
        assert self.batch % self.prefill_micro_batches == self.batch % self.decode_micro_batches == 0, self

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.pipeline * self.tensor


def layers_per_stage(profile: Profile, layout: Layout) -> int:
    """Layers of the fullest stage. Padded layers are skipped at run time, so they cost nothing."""
    return -(-profile.layers // layout.pipeline)


def prefill_s(profile: Profile, layout: Layout) -> float:
    """t1: prefill of 512 input tokens per sequence, before the correction k."""
    parts = layout.prefill_micro_batches
    layer_s = profile.layer_times[layout.tensor, layout.batch // parts].prefill_s
    # divided by m1 although the time is already a micro-batch's, and t2 is not: the artifact's formula, kept as it is
    layers_s = layer_s * layers_per_stage(profile, layout) * (layout.pipeline + parts - 1) / parts
    return layers_s + profile.stage_prefill_s / parts * (layout.pipeline - 1)


def decode_step_s(profile: Profile, layout: Layout) -> float:
    """t2: one output token of every sequence, before the correction k."""
    parts = layout.decode_micro_batches
    layer_s = profile.layer_times[layout.tensor, layout.batch // parts].decode_s
    layers_s = layer_s * layers_per_stage(profile, layout) * (layout.pipeline + parts - 1)
    return layers_s + profile.stage_decode_s * (layout.pipeline - 1)


def request_latency_s(profile: Profile, layout: Layout, output_tokens: int) -> float:
    """l_exe: one batch from its start to its last token, queueing left out."""
    assert output_tokens >= 1, output_tokens
    model_s = prefill_s(profile, layout) + output_tokens * decode_step_s(profile, layout)
    return profile.correction * (model_s + 2 * profile.embedding_s[layout.batch])


def throughput_rps(profile: Profile, layout: Layout, output_tokens: int, replicas: int = 1) -> float:
    """phi: requests per second of `replicas` (the paper's D) that are never idle."""
    return replicas * layout.batch / request_latency_s(profile, layout, output_tokens)
