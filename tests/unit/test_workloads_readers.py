"""Readers: the published files, and every way in which a user's file can be wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systems.common.errors import InputError
from systems.common.workloads import readers
from systems.common.workloads.build import from_csv


def write(tmp_path, text, name="requests.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


GOOD = "arrival_s,input_tokens,output_tokens,adapter\n0,10,20,a\n1.5,11,21,\n1.5,12,22,b\n"


def test_users_own_requests(tmp_path):
    workload = from_csv(write(tmp_path, GOOD))
    assert workload.arrival_s.tolist() == [0.0, 1.5, 1.5]
    assert workload.requests[1].adapter is None
    assert (workload.requests[2].input_tokens, workload.requests[2].output_tokens, workload.requests[2].adapter) == (
        12,
        22,
        "b",
    )


@pytest.mark.parametrize(
    "text",
    [
        "output_tokens,arrival_s,extra,input_tokens\n20,0,x,10\n",  # any order, further columns
        "\ufeffarrival_s, input_tokens ,output_tokens\r\n0,10,20\r\n\r\n",  # a spreadsheet's export
        'arrival_s,input_tokens,output_tokens\n"0",10.0,"20"\n',
    ],
)
def test_harmless_variations(tmp_path, text):
    workload = from_csv(write(tmp_path, text))
    assert (workload.arrival_s.tolist(), workload.input_tokens.tolist(), workload.output_tokens.tolist()) == ([0], [10], [20])
    assert workload.adapters == ()


HEAD = "arrival_s,input_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "where", "key", "value"),
    [
        ("", "requests.csv", "file", "empty"),
        ("\n\n", "requests.csv", "file", "empty"),
        (HEAD, "requests.csv", "file", "no rows"),
        ("arrival_s,input_tokens\n0,1\n", "requests.csv", "output_tokens", "columns"),
        ("arrival,input_tokens,output_tokens\n0,1,1\n", "requests.csv", "arrival_s", "columns"),
        (HEAD + "0,1,1\nnan,1,1\n", "line 3", "arrival_s", "nan"),
        (HEAD + "0,1,1\n\ninf,1,1\n", "line 4", "arrival_s", "inf"),
        (HEAD + "zero,1,1\n", "line 2", "arrival_s", "zero"),
        (HEAD + "-0.5,1,1\n", "line 2", "arrival_s", "-0.5"),
        (HEAD + "5,1,1\n3,1,1\n", "line 3", "arrival_s", "3"),
        (HEAD + "0,-7,1\n", "line 2", "input_tokens", "-7"),
        (HEAD + "0,0,1\n", "line 2", "input_tokens", "0"),
        (HEAD + "0,1,2.5\n", "line 2", "output_tokens", "2.5"),
        (HEAD + "0,1,\n", "line 2", "output_tokens", "''"),
        (HEAD + "0,1,1e300\n", "line 2", "output_tokens", "1e300"),
        (HEAD + "0,1\n", "line 2", "row", "0,1"),
        (HEAD + "0,1,1,9\n", "line 2", "row", "0,1,1,9"),
        (HEAD + '0,1,"1\n', "requests.csv", "file", "end of data"),
    ],
)
def test_every_slip_names_file_line_column_value_and_mend(tmp_path, text, where, key, value):
    with pytest.raises(InputError) as caught:
        readers.requests_csv(write(tmp_path, text))
    line = str(caught.value)
    assert "requests.csv" in line and where in line and value in line and "\n" not in line
    assert caught.value.key == key and caught.value.mend


def test_files_that_are_no_text(tmp_path):
    for path in (tmp_path, tmp_path / "absent.csv", write(tmp_path, HEAD + "0,1,1\nü", encoding="latin-1")):
        with pytest.raises(InputError, match="readable CSV"):
            readers.requests_csv(path)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_end_in_requests_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "f.csv"
    path.write_bytes(HEAD.encode() + content)
    try:
        assert len(from_csv(path)) >= 1
    except InputError as error:
        assert "\n" not in str(error)


def test_azure_conversation(mirror):
    trace = readers.azure_llm(mirror / "azure_llm_2023/AzureLLMInferenceTrace_conv.csv")
    gaps = np.diff(trace.arrival_s)
    assert len(trace.arrival_s) == 19_366 and trace.arrival_s[0] == 0
    assert trace.arrival_s[1] == pytest.approx(4.3145790, abs=1e-9)  # 18:15:50.9951690 - 18:15:46.6805900
    assert trace.arrival_s[-1] == pytest.approx(3502, abs=1)
    assert gaps.std() / gaps.mean() == pytest.approx(1.09, abs=0.01)
    assert trace.input_tokens.mean() == pytest.approx(1155, abs=1)
    assert trace.output_tokens.mean() == pytest.approx(211, abs=1)


def test_azure_code(mirror):
    trace = readers.azure_llm(mirror / "azure_llm_2023/AzureLLMInferenceTrace_code.csv")
    assert len(trace.arrival_s) == 8_819
    assert (np.median(trace.input_tokens), np.median(trace.output_tokens)) == (1469, 13)  # MaverIQ's sheet, section 8


def test_azure_bad_timestamp(tmp_path):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,1,1\nyesterday,1,1\n"
    with pytest.raises(InputError, match="line 3: TIMESTAMP: 'yesterday'"):
        readers.azure_llm(write(tmp_path, text))


def test_sharegpt(mirror):
    table = readers.sharegpt_lengths(mirror / "sharegpt_lengths/sharegpt_8k_filtered_stats_llama2_tokenizer.csv")
    assert len(table.input_tokens) == 30_731 and table.arrival_s is None
    assert table.input_tokens.mean() == pytest.approx(2340, abs=1)
    assert table.output_tokens.mean() == pytest.approx(439, abs=1)
    with pytest.raises(InputError, match="no arrival times"):
        table.arrivals("sharegpt_lengths")


def test_results_can_be_shared(mirror):
    table = readers.sharegpt_lengths(mirror / "sharegpt_lengths/sharegpt_8k_filtered_stats_llama2_tokenizer.csv")
    with pytest.raises(ValueError, match="read-only"):
        table.input_tokens[0] = 1


BURST_HEAD = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def burst_file(tmp_path, rows):
    lines = (f"{t},{model},{i},{o},{i + o},Conversation log\n" for t, model, i, o in rows)
    return write(tmp_path, BURST_HEAD + "".join(lines), "burst.csv")


def test_burstgpt_as_llmstation_takes_it(tmp_path):
    early = [(second, "ChatGPT", 9, 9) for second in range(5200)]
    late = [
        (6000, "GPT-4", 1, 1),
        (6005, "ChatGPT", 472, 18),
        (6005, "ChatGPT", 5, 0),
        (6005, "ChatGPT", 7, 8),
        (6010, "ChatGPT", 3, 4),
    ]
    trace = readers.burstgpt(burst_file(tmp_path, early + late))
    assert trace.arrival_s.tolist() == [0, 0, 5]  # from the first row taken; simultaneous arrivals stay
    assert trace.input_tokens.tolist() == [472, 7, 3]
    assert trace.output_tokens.tolist() == [18, 8, 4]
    assert readers.burstgpt(burst_file(tmp_path, early + late), model="GPT-4").input_tokens.tolist() == [1]
    assert len(readers.burstgpt(burst_file(tmp_path, early + late), model=None, skip=5199).arrival_s) == 5
    with pytest.raises(InputError, match="Llama"):
        readers.burstgpt(burst_file(tmp_path, early + late), model="Llama")


@pytest.mark.parametrize("limit", [1, 20, 999, 5000])
def test_burstgpt_limit_gives_the_beginning(tmp_path, limit):
    path = burst_file(tmp_path, [(t // 3, "ChatGPT" if t % 40 == 0 else "GPT-4", 5, t % 3) for t in range(12_000)])
    whole = readers.burstgpt(path, skip=10)
    part = readers.burstgpt(path, skip=10, limit=limit)
    assert part.arrival_s.tolist() == whole.arrival_s[:limit].tolist()
    assert part.output_tokens.tolist() == whole.output_tokens[:limit].tolist()


# Measured on the files (SpotServe's sheet, section 4.2): nearly periodic where the name says CV 6
@pytest.mark.parametrize(
    ("name", "count", "rate_rps", "cv"),
    [
        ("query_tpt0.35_cv6.txt", 1024, 0.35, 0.046),
        ("query6144_tpt1.5_cv6.txt", 6144, 1.5, 0.094),
        ("query_tpt0.2_cv6.txt", 1024, 0.2, 0.035),
        ("query_realAr_cv6.txt", 681, 0.5965, 0.098),
    ],
)
def test_spotserve_queries(mirror, name, count, rate_rps, cv):
    trace = readers.spotserve_queries(mirror / "spotserve/query" / name)
    gaps = np.diff(trace.arrival_s, prepend=0.0)
    assert len(gaps) == count
    assert 1 / gaps.mean() == pytest.approx(rate_rps, rel=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.001)
    assert set(trace.input_tokens.tolist()) == {512} and set(trace.output_tokens.tolist()) == {128}


def test_spotserve_rates(mirror, tmp_path):
    rates = readers.spotserve_rates(mirror / "spotserve/query/arrival-rates.csv")
    assert len(rates) == 19
    assert rates[0] == pytest.approx(0.586, abs=5e-4) and max(rates) == pytest.approx(0.703, abs=5e-4)
    for text in ("", "0.5,-1\n", "0.5,x\n"):
        with pytest.raises(InputError):
            readers.spotserve_rates(write(tmp_path, text))


def instances(events):
    count, timeline = 0, []
    for event in events:
        count += {"add": 1, "remove": -1}.get(event.kind, 0) * len(event.nodes)
        timeline.append((event.time_s, count))
    return timeline


def test_spotserve_availability(mirror):
    events = readers.spotserve_availability(mirror / "spotserve/trace_seg/trace_0304_real.txt")
    # section 4.3 of the sheet: A_S is 7@0 8@240 10@360 9@600 10@900 8@1200, end 1320
    assert instances(events) == [(0, 7), (240, 8), (360, 10), (600, 9), (900, 10), (1200, 8), (1320, 8)]
    assert events[3].nodes == ("node-8",) and events[-1].kind == "DONE"
    workload = readers.spotserve_availability(mirror / "spotserve/trace_seg/trace_0304_workload.txt")
    assert [e.required_rps for e in workload if e.required_rps] == [0.8, 0.6]


def test_spotserve_full_log(mirror):
    events = readers.spotserve_availability(mirror / "spotserve/trace_full_g4dn.csv")
    assert len(events) == 153 and [e.kind for e in events].count("add") == 79
    assert max(count for _, count in instances(events)) == 24


def test_every_shipped_segment_reads(mirror):
    for path in sorted((mirror / "spotserve/trace_seg").glob("*.txt")):
        assert readers.spotserve_availability(path)[-1].kind == "DONE"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", ""),
        ("a.txt", "not json\n"),
        ("a.txt", '[0, "add"]\n'),
        ("a.txt", '[0, "grow", {"nodes": []}]\n'),
        ("a.txt", '[-1, "add", {"nodes": ["n"]}]\n'),
        ("a.txt", '["0", "add", {"nodes": ["n"]}]\n'),
        ("a.txt", '[5, "add", {"nodes": ["n"]}]\n[4, "DONE", {"nodes": []}]\n'),
        ("a.csv", "0,grow,n\n"),
        ("a.csv", "x,add,n\n"),
        ("a.csv", "5,add,n\n4,add,m\n"),
    ],
)
def test_bad_availability(tmp_path, name, text):
    with pytest.raises(InputError, match=name):
        readers.spotserve_availability(write(tmp_path, text, name))
