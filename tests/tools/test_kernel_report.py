"""Counted traffic and compiled resources of the kernels stay within what the project promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "kernel_report.py"
LIMITS = {  # units of T*C elements, launches
    "coefficients_pre + post_res forward": (14.5, 3),
    "coefficients_pre + post_res backward": (21.0, 4),
    "post_res_pre forward": (14.5, 3),
    "post_res_pre backward": (18.0, 4),
}


def report(tmp_path, *arguments):
    target = tmp_path / "report.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PIPEHC"))}
    subprocess.run([sys.executable, TOOL, "--json", target, *arguments], check=True, env=environment)
    return json.loads(target.read_text())


def check_traffic(rows):
    assert [row["form"] for row in rows] == list(LIMITS)
    for row in rows:
        units, launches = LIMITS[row["form"]]
        assert row["minimum"] < row["sum"] <= units and row["launches"] <= launches and row["torch_operations"] == 0, row


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.slow
def test_traffic(tmp_path):
    # Coefficients weigh more against 640 channels than against 2560: the limits still hold.
    check_traffic(report(tmp_path, "--only", "traffic", "--tokens", "20", "--channels", "640")["traffic"])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_traffic_at_full_width(tmp_path):
    check_traffic(report(tmp_path, "--only", "traffic", "--tokens", "16")["traffic"])


@pytest.mark.slow
def test_compiled_kernels(tmp_path):
    """For the H100; for others by hand: python tools/kernel_report.py --only compiled."""
    rows = report(tmp_path, "--only", "compiled", "--arch", "90")["compiled"]
    for manifold in ("Birkhoff", "Isometric", "Hybrid", "IdentityOffset", "Harmonized"):
        for form in ("coefficients_pre", "post_res_pre", "coefficients_pre backward", "post_res_pre backward"):
            assert any(row["form"] == f"{form} {manifold}" for row in rows)
    for row in rows:
        # One binary for all of them: C is specialized on whether 16 divides it, and on nothing else.
        assert row["channels"] == [1280, 1920, 2560, 4096, 7168]
        assert row["registers"] <= 128 and row["spilled"] == 0 and row["atomics"] == 0, row
        if row["form"] != "parameter_sum_kernel":
            assert "128" in row["loads"] and "128" in row["stores"], row
        if "coefficients" in row["form"] or "post_res_pre" in row["form"]:
            assert row["matrix"] > 0, row
