"""What is warned about, and what is set, so that messages hide behind computation."""

import pytest

from pipehc.comm.budgets import BEFORE_CUDA
from pipehc.comm.environment import overlap_warnings

GPU_DEFAULTS = {budget.variable: budget.default for budget in BEFORE_CUDA}


@pytest.mark.parametrize(
    ("environment", "on_gpu", "expected"),
    [
        ({}, False, []),
        ({}, True, ["CUDA_MODULE_LOADING=:", "PYTORCH_ALLOC_CONF=:"]),
        (GPU_DEFAULTS, True, []),
        (GPU_DEFAULTS | {"CUDA_MODULE_LOADING": "LAZY"}, True, ["CUDA_MODULE_LOADING=LAZY"]),
        (GPU_DEFAULTS | {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, True, ["PYTORCH_ALLOC_CONF=max_split_size_mb:64: memory"]),
        ({"CUDA_MODULE_LOADING": "eager", "PYTORCH_CUDA_ALLOC_CONF": "backend:native,expandable_segments:True"}, True, []),
        (GPU_DEFAULTS | {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "CUDA_LAUNCH_BLOCKING": "0"}, True, []),
        (GPU_DEFAULTS | {"CUDA_DEVICE_MAX_CONNECTIONS": "4"}, True, ["CUDA_DEVICE_MAX_CONNECTIONS=4: streams share few"]),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, False, ["CUDA_DEVICE_MAX_CONNECTIONS=1: all streams share one"]),
        (
            GPU_DEFAULTS | {"TORCH_DISTRIBUTED_DEBUG": "detail", "CUDA_LAUNCH_BLOCKING": "1"},
            True,
            ["CUDA_LAUNCH", "TORCH_DISTRIBUTED_DEBUG"],
        ),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, False, ["PYTORCH_NO_CUDA_MEMORY_CACHING=1"]),
        ({"OMP_NUM_THREADS": "4"}, False, ["OMP_NUM_THREADS=4"]),
        (GPU_DEFAULTS | {"OMP_NUM_THREADS": "4"}, True, []),
        ({"OMP_NUM_THREADS": "1"}, False, []),
    ],
)
def test_warns_of_what_defeats_overlap(environment, on_gpu, expected):
    found = overlap_warnings(environment, ranks_here=4, cores=2, on_gpu=on_gpu)
    assert [text.startswith(start) for text, start in zip(found, expected)] == [True] * len(found)
    assert len(found) == len(expected)
