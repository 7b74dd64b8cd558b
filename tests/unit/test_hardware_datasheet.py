"""Datasheets and testbed names."""

from __future__ import annotations

import pytest

from systems.common.errors import InputError
from systems.common.hardware import GPUS, default_efficiencies, gpu, parse_testbed


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("rtx3090x2", "rtx3090", 2),
        ("h100", "h100", 1),
        ("a100-40x4", "a100-40", 4),
        (" RTX4090x1 ", "rtx4090", 1),
        ("v100x4", "v100-16", 4),
        ("a100", "a100-80", 1),
    ],
)
def test_testbeds(text, name, count):
    testbed = parse_testbed(text)
    assert (testbed.gpu.name, testbed.count) == (name, count)
    assert parse_testbed(testbed.name) == testbed


@pytest.mark.parametrize("text", ["rtx309", "h10", "x2", "", "a100 80", "rtx3090x", "rtx3090x2x2", "rtx3090x-1", None, "t4;ls"])
def test_unknown_testbeds_are_refused_in_one_line(text):
    with pytest.raises(InputError, match=r"fig\.yaml: hardware: ") as error:
        parse_testbed(text, "fig.yaml")
    assert "\n" not in str(error.value)


def test_close_names_are_offered():
    with pytest.raises(InputError, match="rtx3090"):
        parse_testbed("rtx3080x2")


def test_zero_gpus_are_refused():
    with pytest.raises(InputError, match="at least one"):
        parse_testbed("t4x0")


@pytest.mark.parametrize("row", GPUS.values(), ids=GPUS)
def test_every_row_is_complete(row):
    assert row.source and row.bandwidth > 1e11 and row.memory_bytes > 1e10 and row.pcie > 1e10
    assert {"fp32", "fp16"} <= row.flops.keys() and row.sms >= 40 and row.l2_bytes >= 2**22
    assert row.flops["fp16"] > row.flops["fp32"]


@pytest.mark.parametrize("row", GPUS.values(), ids=GPUS)
def test_every_gpu_has_efficiencies(row):
    found = default_efficiencies(row)
    assert found.source.startswith("efficiencies of ")
    assert found.gemm_compute < 1.05 and found.gemm_memory < 1.05, "nothing that reads DRAM beats its bandwidth"


def test_links_fall_back_to_pcie():
    card = gpu("rtx3090")
    assert card.link(2) == card.nvlink > card.link(4) == card.pcie
    assert gpu("t4").link(2) == gpu("t4").link(1) == gpu("t4").pcie


def test_number_formats():
    assert gpu("t4").dtype("bf16") == "fp16" and gpu("a100").dtype("bf16") == "bf16" and gpu("v100").dtype("tf32") == "fp32"
    with pytest.raises(InputError, match="it computes in"):
        gpu("a100").dtype("fp8")
