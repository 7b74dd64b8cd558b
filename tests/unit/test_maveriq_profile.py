"""The profiler's pure parts: jobs, tables, memory readings, the judge of estimators, and what its command refuses."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.claims.data import read_table
from harness.claims.evaluate import Status, evaluate
from harness.figure_file import load_figure
from systems.common.errors import InputError
from systems.common.models import model
from systems.maveriq.configuration import known_models
from systems.maveriq.fingerprint import Fingerprints, Point, Setting, read_fingerprints
from systems.maveriq.profile import __main__ as command
from systems.maveriq.profile import judge, memory, tables
from systems.maveriq.profile import run as profiling
from systems.maveriq.profile.crew import Done
from systems.maveriq.profile.jobs import Job, even_map, fingerprint_jobs, map_jobs, whole_jobs

BASE = Job("llama-2-7b", 1, (1,))


def done(job, latency_s=0.1, host_share=0.2):
    """What a worker would have said of `job`."""
    rows = [
        {"output_length": length, "latency_s": latency_s * length, "low_s": 0.09 * length, "high_s": 0.11 * length,
         "served_s": 0.2 * length, "launched_s": 0.1 * length, "host_share": host_share, "loaded_gib": 1.5, "memory_gib": 2.25,
         "ran_s": 3.0}
        for length in job.output_lengths
    ]  # fmt: skip
    return Done(job, rows, import_s=2.0, built_s=4.0, wall_s=12.0, facts={"device": "cpu", "memory": "made up", "torch": "2"})


class TestJobs:
    @given(st.integers(1, 200), st.integers(1, 16))
    def test_an_even_map_is_even_and_whole(self, layers, stages):
        if stages > layers:
            with pytest.raises(InputError):
                even_map(layers, stages)
            return
        found = even_map(layers, stages)
        assert sum(found) == layers
        assert len(found) == stages
        assert max(found) - min(found) <= 1

    def test_the_papers_grid_is_24_points_a_precision(self):
        found = fingerprint_jobs(BASE, [(1, 1), (1, 2), (2, 1)], ["float16", "int8"], batches=(1, 2))
        assert len(found) == 24
        assert sum(len(job.output_lengths) for job in found) == 48
        assert {(job.tp, len(job.pp_map), job.layers) for job in found} == {
            (1, 1, 1), (1, 1, 2), (1, 2, 2), (1, 2, 3), (2, 1, 1), (2, 1, 2),
        }  # fmt: skip
        assert {job.clock for job in found} == {"launched"}

    def test_whole_models_and_maps_go_through_the_engine(self):
        (whole,) = whole_jobs(BASE, [(2, 2)], ["int4"], batches=(8,))
        assert (whole.pp_map, whole.gpus, whole.clock, whole.table) == ((16, 16), 4, "served", "whole")
        (uneven,) = map_jobs(BASE, [(20, 12)])
        assert (uneven.layers, uneven.clock, uneven.table) == (32, "served", "uneven")

    def test_a_job_survives_json(self):
        job = replace(BASE, pp_map=(20, 12), output_lengths=(10, 100))
        assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job

    @pytest.mark.parametrize(
        ("key", "value"),
        [("pp_map", (33,)), ("pp_map", (1, 0)), ("dtype", "fp4"), ("batch", 0), ("output_lengths", ()), ("compute", "fp8"),
         ("clock", "wall"), ("table", "other"), ("repeats", 0), ("model", "llama-9")],
    )  # fmt: skip
    def test_an_impossible_job_is_refused(self, key, value):
        BASE.check()
        with pytest.raises(InputError) as error:
            replace(BASE, **{key: value}).check()
        assert "\n" not in str(error.value)


class TestTables:
    def test_rows_are_what_estimators_read(self, tmp_path):
        jobs = [done(job) for job in fingerprint_jobs(BASE, [(1, 1), (1, 2)], ["float16"])]
        file = tmp_path / "prints.csv"
        tables.put(file, tables.as_csv(row for one in jobs for row in tables.rows_of(one)))
        points = read_fingerprints(file).points
        assert len(points) == 8
        point = points[Setting("llama-2-7b", 1, 2, "float16", False, 3, 20, 1)]
        assert (point.latency_s, point.loaded_gib, point.memory_gib) == (2.0, 1.5, 2.25)

    def test_profiling_time_adds_up_to_what_it_took(self):
        rows = tables.rows_of(done(replace(BASE, output_lengths=(10, 20, 100))))
        assert sum(row["Time-Prof"] for row in rows) == pytest.approx(2 + 4 + 3 * 3)

    def test_what_the_host_set_the_pace_of_is_counted(self):
        bound = [row for share in (0.2, 0.95, None) for row in tables.rows_of(done(BASE, host_share=share))]
        assert tables.host_bound(bound) == 2  # one job of two output lengths

    def test_provenance_names_what_failed_and_what_was_left_out(self):
        import datetime

        lost = Done(replace(BASE, tp=2), error="RankError: rank 1 died", wall_s=3.0)
        told = tables.provenance([done(BASE), lost], ["later"], datetime.datetime.now(datetime.UTC), "abc")
        assert told["failed"] == {lost.job.name: "RankError: rank 1 died"}
        assert (told["skipped"], told["commit"], told["gpu_seconds"]) == (["later"], "abc", 12 + 2 * 3)
        json.dumps(told)

    def test_a_folder_that_cannot_be_made_is_one_line(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError):
            tables.put(tmp_path / "file" / "table.csv", "")


class TestMemory:
    def test_growth_is_summed_over_the_gpus_that_count(self):
        before, now = {"a": 1 << 30, "b": 0, "c": 5 << 30}, {"a": 3 << 30, "b": 1 << 30, "c": 9 << 30}
        assert memory.grown_gib(before, now) == 7
        assert memory.grown_gib(before, now, ["a", "b"]) == 3
        assert memory.grown_gib({}, {"1": 1 << 29}) == 0.5

    def test_this_process_has_resident_memory(self):
        assert memory.resident()[str(os.getpid())] > 1 << 20

    def test_without_nvidia_it_says_so(self, monkeypatch):
        def absent(*_args, **_kwargs):
            raise OSError("libnvidia-ml.so.1: cannot open shared object file")

        monkeypatch.setattr(memory.ctypes, "CDLL", absent)
        monkeypatch.setenv("PATH", "")
        with pytest.raises(InputError) as error:
            memory.gpus_used()
        assert "NVML" in str(error.value)


def straight(model_name, layout, dtype, layers, length, batch):
    """A machine whose latency and memory are straight in everything: seconds and GiB."""
    tp, pp = layout
    latency_s = (0.01 + 0.002 * layers / tp + length * (0.001 + 0.0005 * layers / tp)) * (0.9 + 0.1 * batch)
    return Point(latency_s, 1.0, 0.5 * tp * pp + 0.4 * layers + 0.1 * batch)


def measured(names, layouts, depths, lengths, batches=(1,)):
    points = {
        Setting(name, *layout, "float16", False, layers, length, batch): straight(
            name, layout, "float16", layers, length, batch
        )
        for name in names
        for layout in layouts
        for layers in depths(name, layout)
        for length in lengths
        for batch in batches
    }
    return Fingerprints("made up", points)


class TestJudge:
    def prints(self, layouts=((1, 1),), batches=(1,)):
        return measured(["llama-2-7b"], layouts, lambda _name, layout: (layout[1], layout[1] + 1), (10, 20), batches)

    def whole(self, layouts=((1, 1),), batches=(1,)):
        return measured(["llama-2-7b"], layouts, lambda *_: (32,), (10, 100), batches)

    def test_on_one_gpu_the_paper_is_two_lines_and_exact_where_all_is_straight(self):
        found, silent = judge.judge(self.prints(batches=(1, 2)), self.whole(batches=(1, 8)))
        paper = [one for one in found if one.mode == "paper"]
        assert len(paper) == 4
        assert max(abs(one.latency_error) for one in paper) < 1e-9
        assert max(abs(one.memory_error) for one in paper) < 1e-9
        assert not silent

    def test_other_layouts_are_the_papers_own_estimator(self):
        from systems.maveriq.configuration import Configuration
        from systems.maveriq.estimator_paper import PaperEstimator

        layouts = ((1, 1), (1, 2), (2, 1))
        prints = self.prints(layouts)
        found, _ = judge.judge(prints, self.whole(layouts))
        estimator = PaperEstimator(prints, known_models())
        for one in found:
            if one.mode == "paper":
                c = Configuration(one.setting.tp, one.setting.pp)
                same = estimator.estimate("llama-2-7b", c, output_length=one.setting.output_length)
                assert one.latency_s == pytest.approx(same.latency_s)
                assert one.memory_gib == pytest.approx(same.memory_gib)
        assert {one.setting.layout for one in found if one.mode == "paper"} == set(layouts)

    def test_what_a_mode_cannot_speak_of_is_told(self):
        found, silent = judge.judge(self.prints(), self.whole(((1, 1), (2, 1))))
        assert {one.setting.layout for one in found if one.mode == "paper"} == {(1, 1)}
        assert {one.setting.layout for one in found if one.mode == "improved"} == {(1, 1), (2, 1)}
        assert silent
        assert all(line.startswith("paper: ") for line in silent)

    def test_fingerprints_are_no_truth(self):
        assert judge.judge(self.prints(), self.prints()) == ([], [])

    def test_the_table_and_the_summary_agree(self):
        found, _ = judge.judge(self.prints(), self.whole())
        rows = list(csv.DictReader(io.StringIO(judge.as_csv(found))))
        assert len(rows) == len(found)
        assert all(float(row["true_s"]) > 0 for row in rows)
        summed = {(row["model"], row["mode"]): row for row in judge.summary(found)}
        assert summed["all", "paper"]["configurations"] == 2
        errors = sorted(abs(float(row["latency_error_percent"])) for row in rows if row["mode"] == "improved")
        assert summed["all", "improved"]["latency_median_percent"] == pytest.approx(sum(errors) / 2, rel=1e-4)
        assert judge.shown(judge.summary(found)).count("\n") == 5

    def test_the_first_file_wins(self, tmp_path):
        for name, latency_s in (("a", 0.1), ("b", 0.7)):
            rows = tables.rows_of(done(BASE, latency_s))
            tables.put(tmp_path / f"{name}.csv", tables.as_csv(rows))
        points = judge.together([tmp_path / "a.csv", tmp_path / "b.csv"]).points
        assert {point.latency_s for point in points.values()} == {1.0, 2.0}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--model", "llama-9"], "llama-9"),
        (["--layouts", "2"], "--layouts"),
        (["--layouts", "0x1"], "--layouts"),
        (["--dtypes", "fp4"], "fp4"),
        (["--batches", "0"], "--batches"),
        (["--output-lengths", "ten"], "--output-lengths"),
        (["--maps", "1 2"], "layers"),
        (["--repeats", "0"], "repeats"),
        (["--budget-s", "0"], "limits"),
        (["--dtypes", ""], "jobs"),
        (["--speed", "1"], "--speed"),
        (["--model", "llama-2-7b", "--device", "auto"], "no GPU"),
    ],
)
def test_bad_options_end_in_one_line(monkeypatch, capsys, tmp_path, options, names):
    monkeypatch.setattr(command, "_gpus", lambda: 0)
    given_ = ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path / "x.csv"), *options]
    assert command.main(given_) == 2
    told = capsys.readouterr().err
    assert names in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_refused_before_anything_runs(capsys, tmp_path):
    assert command.main(["--model", "tiny", "--device", "cpu", "--out", str(tmp_path / "no" / "x.csv")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_benchmark_measures_what_its_gpus_allow():
    from benchmarks import maveriq_gpu

    for gpus in (1, 2, 4):
        jobs = maveriq_gpu.jobs(gpus, ["llama-2-7b", "llama-2-13b"], BASE)
        assert len(set(jobs)) == len(jobs)
        assert max(job.gpus for job in jobs) == gpus
        assert {job.model for job in jobs if job.table == "whole"} == {"llama-2-7b", "llama-2-13b"}
        for job in jobs:
            job.check()
    maps = {job.pp_map for job in maveriq_gpu.jobs(2, ["llama-2-7b"], BASE) if job.table == "uneven"}
    assert maps == {(16, 16), (20, 12), (24, 8), (28, 4)}
    whole = [job for job in maveriq_gpu.jobs(1, ["llama-2-7b"], BASE) if job.table == "whole"]
    assert {job.batch for job in whole} == {1, 2, 8, 32}
    assert model("llama-2-7b").layers == 32


def test_two_gpus_begin_with_what_one_has_not_and_with_what_tells_most():
    from benchmarks import maveriq_gpu

    names = ["llama-2-7b", "llama-2-13b"]
    alone, beside = (maveriq_gpu.jobs(2, names, BASE, with_one) for with_one in (False, True))
    assert set(beside) < set(alone)
    assert {job.gpus for job in beside} == {2}
    first = beside[:18]
    assert {job.dtype for job in first} == {"float16"}
    assert {(job.model, job.tp, job.table) for job in first} >= {(name, tp, "whole") for name in names for tp in (1, 2)}
    assert {job.pp_map for job in first if job.table == "uneven"} == {(16, 16), (20, 12), (24, 8), (28, 4)}


def test_a_second_run_measures_what_the_first_left_out(tmp_path, capsys):
    from benchmarks import maveriq_gpu

    argv = ["--out", str(tmp_path / "out"), "--gpus", "1", "--models", "tiny", "--device", "cpu", "--dry-run"]
    assert maveriq_gpu.main(argv) == 0
    everything = capsys.readouterr().out.splitlines()
    first = Job("tiny", 1, (1,), device="cpu")
    partly = replace(first, dtype="int8", output_lengths=(10,))
    rows = [row for job in (first, partly) for row in tables.rows_of(done(job))]
    tables.put(tmp_path / "before" / "fingerprints.csv", tables.as_csv(rows))
    assert maveriq_gpu.main([*argv, "--skip", str(tmp_path / "before")]) == 0
    left = capsys.readouterr().out.splitlines()
    assert set(everything) - set(left) == {"fingerprints: tiny TP 1 layers [1] float16 batch 1, [10, 20] tokens"}
    assert maveriq_gpu.main([*argv, "--skip", str(tmp_path)]) == 2
    assert "holds none of" in capsys.readouterr().err


def test_a_job_that_began_in_time_does_not_outlive_the_budget_for_long(tmp_path, monkeypatch):
    limits = []

    def do(self, job, limit_s, more):
        limits.append(limit_s)
        return done(job)

    monkeypatch.setattr(profiling.Crew, "do", do)
    files = {"fingerprints": tmp_path / "prints.csv"}
    profiling.profile([BASE, replace(BASE, batch=2)], files, tmp_path / "provenance.json", budget_s=30.0)
    assert len(limits) == 2
    assert max(limits) <= 30.0 + profiling.OVER_S


def test_the_benchmark_sums_up(tmp_path):
    from benchmarks import maveriq_gpu

    def kept(name, jobs):
        rows = [row for job, latency_s in jobs for row in tables.rows_of(done(job, latency_s))]
        tables.put(tmp_path / f"{name}.csv", tables.as_csv(rows))

    kept("uneven", [(job, latency_s) for job, latency_s in zip(map_jobs(BASE, [(16, 16), (24, 8)]), (0.1, 0.102), strict=True)])
    kept(
        "whole",
        [
            (replace(job, output_lengths=(100,)), s)
            for job, s in zip(whole_jobs(BASE, [(1, 1)], ["float16", "int8"]), (0.3, 0.2), strict=True)
        ],
    )
    found = maveriq_gpu.sums_up(tmp_path, [], 923)
    assert [row["over_even"] for row in found["uneven"]] == pytest.approx([1, 1, 1.02, 1.02])
    (gain,) = found["gains"]
    assert (gain["dtype"], gain["faster"], gain["memory_share"]) == ("int8", pytest.approx(1.5), 1.0)
    assert "error" in found["errors"]  # no fingerprints: said, and the rest is there


def number(cell):
    """A cell as a number, where it is one."""
    try:
        return float(cell)
    except ValueError:
        return cell


class TestRecorded:
    """Figures of H200 measurements: from what benchmarks wrote, and refused in one line where that is not there."""

    @pytest.fixture
    def reference(self, tmp_path, monkeypatch):
        from systems.maveriq import experiments_recorded

        monkeypatch.setattr(experiments_recorded, "REFERENCE", tmp_path)
        for kept in (experiments_recorded._benchmark, experiments_recorded._profile):
            kept.cache_clear()
        yield tmp_path
        experiments_recorded._profile.cache_clear()

    def ask(self, experiment, **parameters):
        from systems.common.core import Trial
        from systems.maveriq.experiments import EXPERIMENTS

        return EXPERIMENTS[experiment](Trial("maveriq", experiment, parameters, "h200x1", "recorded")).metrics

    def keep(self, folder, table, jobs):
        rows = [row for job, latency_s in jobs for row in tables.rows_of(done(job, latency_s))]
        tables.put(folder / "maveriq" / "profile" / f"{table}.csv", tables.as_csv(rows))

    def test_what_is_absent_is_one_line(self, reference):
        for experiment, parameters in (
            ("recorded_request", {"table": "whole", "model": "llama-2-7b"}),
            ("recorded_error", {"mode": "paper", "batch": "1"}),
            ("recorded_steps", {"file": "h200/benchmarks/none.json", "entry": "a", "base": "a"}),
        ):
            with pytest.raises(InputError) as error:
                self.ask(experiment, **parameters)
            assert "not recorded yet" in str(error.value)
            assert "\n" not in str(error.value)

    def test_a_request_is_found_on_whichever_machine_measured_it(self, reference):
        self.keep(reference / "h200", "whole", [(job, 0.1) for job in whole_jobs(BASE, [(1, 1)], ["float16"])])
        self.keep(reference / "h200x2", "whole", [(job, 0.3) for job in whole_jobs(BASE, [(1, 2)], ["float16"])])
        asked = {"table": "whole", "model": "llama-2-7b", "dtype": "float16", "batch": 1, "output_length": 20, "tp": 1}
        assert self.ask("recorded_request", **asked, pp=1)["latency_s"] == pytest.approx(2)
        assert self.ask("recorded_request", **asked, pp=2)["latency_s"] == pytest.approx(6)
        absent = self.ask("recorded_request", **asked, pp=4)["latency_s"]
        assert absent != absent

    def test_the_line_goes_through_one_and_two_layers(self, reference):
        jobs = [(replace(BASE, pp_map=(n,), table="scaling"), 0.1 * n) for n in (1, 2, 8)]
        self.keep(reference / "h200", "scaling", jobs)
        asked = {"table": "scaling", "model": "llama-2-7b", "tp": 1, "pp": 1, "output_length": 10}
        found = {n: self.ask("recorded_request", **asked, layers=n, what="line")["latency_s"] for n in (1, 2, 8)}
        assert found == pytest.approx({1: 1.0, 2: 2.0, 8: 8.0})

    def test_the_controller_at_work(self, reference):
        """A model's row and both queues, from what the trial wrote on one GPU; the node that was not measured is NaN."""
        with pytest.raises(InputError, match="not recorded yet"):
            self.ask("recorded_tenant", gpus=1, tenant="dense")
        mine = {
            "name": "dense", "configuration": {"tp": 1, "dtype": "int8"}, "pp_map": [20, 12], "load_s": 9.0,
            "service_s": [0.2, 0.1, 0.3], "memory": {"gib": 10.0}, "estimate": {"latency_s": 0.25, "memory_gib": 11.0},
        }  # fmt: skip
        told = {
            "load": {"tenants": [mine, {"name": "cheap", "refusal": "out of memory"}]},
            "queues": {"rate_rps": 4.0, "global": {"e2e_mean_s": 0.5, "requests": 7}, "per_model": {"requests": 0}},
        }
        tables.put(reference / "h200" / "benchmarks" / "maveriq_controller.json", json.dumps(told))
        found = self.ask("recorded_tenant", gpus=1, tenant="dense")
        assert (found["stages"], found["first_layers"], found["weight_bits"], found["load_s"]) == (2, 20, 8, 9.0)
        assert found["latency_error_percent"] == pytest.approx(25)
        assert found["memory_error_percent"] == pytest.approx(10)
        for asked in ({"gpus": 1, "tenant": "cheap"}, {"gpus": 1, "tenant": "other"}, {"gpus": 2, "tenant": "dense"}):
            assert self.ask("recorded_tenant", **asked)["load_s"] != found["load_s"]
        assert self.ask("recorded_queue", gpus=1, queue="global")["e2e_mean_s"] == 0.5
        for gpus, queue in ((1, "per_model"), (2, "global")):
            latency_s = self.ask("recorded_queue", gpus=gpus, queue=queue)["e2e_mean_s"]
            assert latency_s != latency_s

    def test_points_that_were_not_measured_are_left_out_of_a_recorded_figure(self, reference, tmp_path):
        from benchmarks import maveriq_record
        from systems.maveriq import experiments_recorded

        self.keep(reference / "h200", "whole", [(job, 0.1) for job in whole_jobs(BASE, [(1, 1)], ["float16"])])
        figure = maveriq_record.FIGURES / "h200_layouts.yaml"
        with pytest.raises(InputError, match="nothing of it was measured"):  # no answer of 100 tokens
            maveriq_record.record(figure, tmp_path / "none")
        experiments_recorded._profile.cache_clear()
        job = replace(BASE, pp_map=(32,), clock="served", table="whole", output_lengths=(100,))
        self.keep(reference / "h200x2", "whole", [(job, 0.1)])
        kept = maveriq_record.record(figure, tmp_path / "some") / "table.csv"
        shown = [(row["series"], row["layout"], row["latency_s"]) for row in tables.read(kept)]
        assert shown[0] == ("llama_7b", "1,1", "10.0")
        assert {(series, latency) for series, _, latency in shown[1:]} == {("llama_13b", "nan")}

    def test_what_is_shipped_agrees_with_the_benchmarks_it_is_from(self, tmp_path):
        from benchmarks import maveriq_record

        figures = sorted(maveriq_record.FIGURES.glob("h200_*.yaml"))
        assert len(figures) == 9
        for figure in figures:
            folder = maveriq_record.record(figure, tmp_path)
            kept = tables.read(maveriq_record.ROOT / "reference" / "h200" / "maveriq" / figure.stem / "table.csv")
            made = tables.read(folder / "table.csv")
            assert len(made) == len(kept)
            for new, old in zip(made, kept, strict=True):
                assert {key: number(cell) for key, cell in new.items()} == {
                    key: pytest.approx(number(cell), rel=1e-6, nan_ok=True) if isinstance(number(cell), float) else cell
                    for key, cell in old.items()
                }

    def test_what_the_paper_says_holds_of_pipelines_and_depth_and_not_of_precisions(self, root):
        """The verdicts of `snakemake claims --config backend=recorded`; docs/maveriq.md says why two differ."""
        found = {}
        for name in ("h200_requests", "h200_scaling", "h200_pipelines"):
            figure = load_figure(root / "figures" / "maveriq" / f"{name}.yaml")
            table = read_table(
                root / "reference" / "h200" / "maveriq" / name / "table.csv", tuple(figure.factors), figure.objective
            )
            found |= {claim.id: evaluate(claim, table).status for claim in figure.claims}
        assert {name for name, status in found.items() if status is Status.REPRODUCED} == {"HL1", "HP1", "HP2"}
        assert {name for name, status in found.items() if status is Status.DIFFERS} == {"HQ1", "HQ2"}

    def test_int8_gains_a_quarter_at_one_row_and_loses_at_128(self):
        asked = {"file": "h200/benchmarks/quantised.json", "base": "model bf16", "entry": "model int8"}
        gains = {rows: self.ask("recorded_steps", **asked, rows=rows)["faster"] for rows in (1, 128)}
        assert gains[1] > 1.2
        assert gains[128] < 1
