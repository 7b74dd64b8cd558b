"""Planner, tasklets, latency source, modes, placement and baselines: the pure part of LLMStation."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from systems.common.core import Slo
from systems.common.errors import InputError
from systems.common.hardware.interference import Tenant
from systems.llmstation.baselines.chunked import Chunked
from systems.llmstation.baselines.fineinfer import POLL_S, FineInfer
from systems.llmstation.baselines.mps import Mps
from systems.llmstation.latency_source import LatencySource, LinearRegression, Situation
from systems.llmstation.modes import FeedbackMode, FixedMode, PlannerMode
from systems.llmstation.placement import placement
from systems.llmstation.planner import CoRunLatencies, most_that_fit, overlapped_s, plan_fused, plan_overlapped
from systems.llmstation.tasklets import Phase, TuningJob, TuningProgress

seconds = st.floats(1e-5, 1e-1)


@st.composite
def latencies(draw):
    alone = draw(seconds)
    return CoRunLatencies(alone, alone * draw(st.floats(1.001, 20)), draw(seconds))


class TestPlanner:
    @given(latencies(), st.integers(1, 80), st.floats(1e-4, 10), st.integers(1, 500))
    def test_the_plan_keeps_the_slo_and_one_more_would_not(self, known, layers, slo_s, remaining):
        plan = plan_overlapped(known, layers, slo_s, remaining)
        assert 0 <= plan <= min(remaining, most_that_fit(known, layers))
        if plan:
            assert overlapped_s(known, layers, plan) <= slo_s * (1 + 1e-9)
        if plan < min(remaining, most_that_fit(known, layers)):
            assert overlapped_s(known, layers, plan + 1) > slo_s * (1 - 1e-9)

    @given(latencies(), st.integers(1, 80), st.integers(0, 400))
    def test_the_overlap_formula_lies_between_alone_and_slowed(self, known, layers, tasklets):
        took = overlapped_s(known, layers, tasklets)
        assert layers * known.decode_alone_s * (1 - 1e-9) <= took <= layers * known.decode_s * (1 + 1e-9)

    @given(latencies(), st.integers(1, 80), st.integers(1, 100))
    def test_no_slack_no_tasklets(self, known, layers, remaining):
        assert plan_overlapped(known, layers, layers * known.decode_alone_s, remaining) == 0

    @given(seconds, seconds, st.integers(1, 80), st.integers(1, 1000))
    def test_without_interference_only_what_fits_counts(self, alone, tuning, layers, remaining):
        known = CoRunLatencies(alone, alone, tuning)
        assert plan_overlapped(known, layers, layers * alone * 1.5, remaining) == min(remaining, most_that_fit(known, layers))

    def test_the_papers_formula_by_hand(self):
        # (0.05 - 32 * 0.0003) * 0.0006 / ((0.0006 - 0.0003) * 0.004) = 20.2; the overlap allows 32 * 0.0006 / 0.004 = 4.8
        known = CoRunLatencies(0.0003, 0.0006, 0.004)
        assert plan_overlapped(known, 32, 0.05, 64) == 4
        assert plan_overlapped(known, 32, 0.0115, 64) == 0  # bound 0.95
        assert plan_overlapped(known, 32, 0.0136, 64) == 2
        assert plan_overlapped(known, 32, 0.0136, 1) == 1

    @given(seconds, st.floats(1, 10), st.integers(1, 80), st.floats(1e-4, 10), st.integers(1, 100))
    def test_fused_layers_keep_the_slo(self, alone, factor, layers, slo_s, remaining):
        fused = alone * factor
        plan = plan_fused(alone, fused, layers, slo_s, remaining)
        assert 0 <= plan <= min(layers, remaining)
        if plan:
            assert layers * alone + plan * (fused - alone) <= slo_s * (1 + 1e-9)


def job():
    load = Tenant(1.0, 0.1, 1e-4)
    return TuningJob((Phase("forward", 4, 0.25, load), Phase("backward", 4, 0.5, load), Phase("optimizer", 1, 1.0, load)), 500)


class TestTasklets:
    @given(st.lists(st.integers(0, 4), max_size=200))
    def test_tasklets_and_samples_are_conserved(self, wishes):
        progress, done_s = TuningProgress(job()), 0.0
        for wish in wishes:
            take = min(wish, progress.remaining)
            done_s += take * progress.phase.tasklet_s
            progress.advance(take)
        assert progress.samples == pytest.approx(done_s / progress.job.pass_s)

    @given(st.lists(st.floats(0, 50), max_size=30))
    def test_running_alone_takes_at_least_the_time_given_and_at_most_one_tasklet_more(self, spans):
        progress, total = TuningProgress(job()), 0.0
        for span in spans:
            took = progress.run_alone(span)
            assert span - 1e-9 <= took <= span + 1.0 + 1e-9
            total += took
        assert progress.samples == pytest.approx(total / progress.job.pass_s)

    def test_more_than_the_phase_holds_is_a_programming_error(self):
        with pytest.raises(AssertionError):
            TuningProgress(job()).advance(5)


class TestLatencySource:
    @staticmethod
    def truth(decodes, context):
        return CoRunLatencies(0.01 + 1e-4 * decodes + 1e-8 * context, 0.02 + 2e-4 * decodes + 3e-8 * context, 0.003)

    def profile(self):
        return {
            Situation(b, b * c, 500, phase): self.truth(b, b * c)
            for b in (1, 4, 16, 64)
            for c in (128, 1024)
            for phase in ("forward", "backward")
        }

    def test_record_then_profile_then_regression(self):
        source = LatencySource(self.profile())
        seen, unseen = Situation(4, 512, 500, "forward"), Situation(7, 999, 500, "forward")
        assert source.lookup(seen) == self.truth(4, 512)
        guess = source.lookup(unseen)
        assert guess.decode_s == pytest.approx(self.truth(7, 999).decode_s)  # the truth is linear, so the fit is exact
        measured = CoRunLatencies(1.0, 2.0, 3.0)
        source.record(unseen, measured)
        source.record(seen, measured)
        assert source.lookup(unseen) == measured == source.lookup(seen)
        assert source.answers == {"record": 2, "profile": 1, "regression": 1}

    def test_r_squared_is_one_on_its_own_line_and_lower_on_another_machine(self):
        fit = LinearRegression(self.profile())
        assert fit.r_squared(self.profile()) == pytest.approx(1.0)
        slower = {s: CoRunLatencies(v.decode_alone_s * 2, v.decode_s * 2, v.tuning_s) for s, v in self.profile().items()}
        assert fit.r_squared(slower) < 0.9

    def test_a_phase_that_was_never_profiled_is_an_error(self):
        with pytest.raises(KeyError):
            LatencySource(self.profile()).lookup(Situation(1, 128, 500, "nap"))


class TestModes:
    @pytest.mark.parametrize(
        "bad", [{"forward_tasklets": 0}, {"backward_tasklets": -1}, {"forward_wait_s": -0.1}, {"backward_wait_s": math.nan}]
    )
    def test_bad_waits_are_refused(self, bad):
        with pytest.raises(InputError, match=next(iter(bad))):
            FixedMode(**bad)

    @pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
    def test_bad_targets_are_refused(self, bad):
        with pytest.raises(InputError, match="decode_target_s"):
            PlannerMode(bad)

    @given(st.floats(0.001, 5), st.floats(0.001, 0.5), st.floats(0, 0.1))
    def test_feedback_moves_against_the_pressure(self, ttft_s, tpot_s, wait_s):
        mode = FeedbackMode(Slo(ttft_s=0.5, tpot_s=0.05), FixedMode(8, wait_s, 8, wait_s))
        then = mode.adjusted(ttft_s, tpot_s).waits.forward_wait_s
        load = max(ttft_s / 0.5, tpot_s / 0.05)
        assume(abs(load - 0.95) > 1e-6 and abs(load - 0.8) > 1e-6)
        if load > 0.95:
            assert then > wait_s and then >= 1e-3
        elif load < 0.8:
            assert then == pytest.approx(0.8 * wait_s)
        else:
            assert then == wait_s


class TestFineInfer:
    @given(st.floats(0, 100), st.floats(0, 20), st.floats(0.01, 2), st.floats(0, 1))
    def test_samples_are_whole_and_serving_waits_for_the_last(self, idle_s, gap_s, sample_s, defer_s):
        arrival_s = idle_s + gap_s
        samples, start_s = FineInfer(defer_s).window(idle_s, arrival_s, sample_s)
        assert samples == int(samples) >= 0
        assert start_s >= arrival_s + defer_s - 1e-9
        assert start_s >= idle_s + samples * sample_s - 1e-6
        # nothing is held back beyond the last sample and one poll
        assert start_s <= max(arrival_s + defer_s, idle_s + samples * sample_s) + POLL_S + 1e-6

    def test_a_sample_that_has_begun_is_never_interrupted(self):
        samples, start_s = FineInfer(0.0).window(0.0, 1.01, 1.0)
        assert samples == 2 and start_s == pytest.approx(2.0, abs=POLL_S)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Mps(0), "thread_percentage"),
        (lambda: Mps(101), "thread_percentage"),
        (lambda: Chunked(0), "chunk_tokens"),
        (lambda: FineInfer(-1), "defer_s"),
    ],
)
def test_knobs_out_of_range_are_refused(make, key):
    with pytest.raises(InputError, match=key):
        make()


def test_placements():
    whole = placement("tensor-parallel", 2)
    assert [g.tp for g in whole.groups] == [2] and whole.serving == whole.tuning
    split = placement("split", 8)
    assert [(g.tp, g.serves, g.tunes) for g in split.groups] == [(4, True, False), (4, True, True)]
    assert sorted(i for g in split.groups for i in g.gpus) == list(range(8))
    with pytest.raises(InputError, match="even"):
        placement("split", 3)
    with pytest.raises(InputError, match="tensor-parallel or split"):
        placement("ring", 2)
