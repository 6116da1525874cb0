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
    "coefficients_pre + post_res forward": (19.1, 3),
    "coefficients_pre + post_res backward": (33.5, 5),
    "post_res_pre forward": (15.1, 2),
    "post_res_pre backward": (29.0, 4),
}
NORM = 0.3  # more than that the norm of y may not cost, where by itself it moves 2 and 3 units at the least


def report(tmp_path, *arguments):
    target = tmp_path / "report.json"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PIPEHC"))}
    subprocess.run([sys.executable, TOOL, "--json", target, *arguments], check=True, env=environment)
    return json.loads(target.read_text())


def check_traffic(rows):
    *kernels, eager_forward, eager_backward = rows
    plain, normed = kernels[: len(LIMITS)], kernels[len(LIMITS) :]
    assert [row["form"] for row in plain] == list(LIMITS) and [row["form"] for row in normed] == [f"{f} with norm" for f in LIMITS]
    for row, other in zip(plain, normed, strict=True):
        units, launches = LIMITS[row["form"]]
        assert row["minimum"] < row["sum"] <= units and row["launches"] <= launches and row["torch_operations"] == 0, row
        assert row["sum"] < other["sum"] <= row["sum"] + NORM, (row, other)
        assert (other["launches"], other["torch_operations"]) == (row["launches"], 0)
    for row in (eager_forward, eager_backward):
        assert row["minimum"] <= row["sum"] and row["torch_operations"] > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
@pytest.mark.slow
def test_traffic(tmp_path):
    # Coefficients weigh more against 640 channels than against 2560: the limits still hold.
    check_traffic(report(tmp_path, "--only", "traffic", "--tokens", "20", "--channels", "640")["traffic"])


@pytest.mark.slow
def test_compiled_kernels(tmp_path):
    """For the H100; for others by hand: python tools/kernel_report.py --only compiled."""
    rows = report(tmp_path, "--only", "compiled", "--arch", "90")["compiled"]
    for manifold in ("Birkhoff", "Isometric", "Hybrid", "IdentityOffset", "Harmonized"):
        for form in ("map_kernel", "map_backward_kernel"):
            for norm in ("", "with norm "):
                assert any(row["form"] == f"{form} {norm}{manifold}" for row in rows)
    for streams in ("all streams", "streams apart"):
        for form in ("project_kernel", "project_kernel of post_res_pre", "stream_gradient_kernel", "phi_gradient_kernel"):
            assert any(row["form"] == f"{form} {streams}" for row in rows)
    for row in rows:
        # One binary for all of them: C is specialized on whether 16 divides it, and on nothing else.
        assert row["channels"] == [1280, 1920, 2560, 4096, 7168]
        assert row["registers"] <= 128 and row["spilled"] == 0 and row["atomics"] == 0, row
        if not row["form"].startswith("parameter_sum_kernel"):
            assert "128" in row["loads"], row
            # Those store numbers of tokens alone, and rows of a phi that need not be a multiple of 16 bytes.
            narrow = row["form"].startswith(("map_backward", "phi_gradient")) or row["form"] == "project_kernel streams apart"
            assert narrow or "128" in row["stores"], row
        if any(name in row["form"] for name in ("project", "stream_gradient", "phi_gradient")):
            assert row["matrix"] > 0, row
