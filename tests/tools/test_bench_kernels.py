"""The chain that is timed on a GPU: which kernels it launches, and the bytes that their times are held against."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import bench_kernels

from pipehc.planning.dry_run.hardware import load_hardware

FORWARD = ["project_kernel", "map_kernel"]
BACKWARD = ["map_backward_kernel", "stream_gradient_kernel", "phi_gradient_kernel", "parameter_sum_kernel"]
MEASURED_US = dict(zip(FORWARD + BACKWARD, (115, 65, 95, 158, 52, 13)))
"""Of `post_res_pre` with the norm, on an H100 at T = 4096, n = 4, C = 2560: the README's table."""


@pytest.mark.parametrize("norm", [False, True])
def test_the_kernels_of_a_boundary_and_their_bytes(norm, monkeypatch):
    monkeypatch.setenv("PIPEHC_KERNELS", "triton")
    tokens, n, channels = 64, 4, 256
    launches = bench_kernels.counted(bench_kernels.boundary(tokens, n, channels, norm, "meta"))
    assert [name for name, _ in launches] == [*FORWARD * 2, *["rebuild_kernel"] * 2, "post_res_kernel", "pre_kernel", *BACKWARD * 2]
    unit = 2 * tokens * channels
    least = {"map_kernel": 5, "rebuild_kernel": 5, "map_backward_kernel": 10, "stream_gradient_kernel": 13}
    for name, nbytes in launches:
        assert nbytes > least.get(name, 0) * unit, name


def test_the_h100s_file_holds_the_times_that_were_measured(monkeypatch):
    monkeypatch.setenv("PIPEHC_KERNELS", "triton")
    launches = bench_kernels.counted(bench_kernels.boundary(4096, 4, 2560, True, "meta"))
    of_post_res_pre = launches[2:4] + launches[8:12]
    hardware = load_hardware("h100")
    shares = {name: nbytes / (1e-6 * MEASURED_US[name]) / hardware.memory.rate for name, nbytes in of_post_res_pre}
    not_timed = {"rebuild_kernel": 0.6}
    assert hardware.kernels == pytest.approx(shares | not_timed, abs=5e-4)
