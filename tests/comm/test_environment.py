"""What is warned about, and what is set, so that messages hide behind computation."""

import os

import pytest

from pipehc.comm.environment import GPU_DEFAULTS, overlap_warnings, set_gpu_defaults


@pytest.mark.parametrize(
    ("environment", "on_gpu", "expected"),
    [
        ({}, False, []),
        ({}, True, ["CUDA_MODULE_LOADING=:"]),
        (GPU_DEFAULTS, True, []),
        (GPU_DEFAULTS | {"CUDA_MODULE_LOADING": "LAZY"}, True, ["CUDA_MODULE_LOADING=LAZY"]),
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


def test_what_a_user_has_set_stays():
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    set_gpu_defaults(environment)
    assert environment == {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "CUDA_MODULE_LOADING": "EAGER"}


def test_the_trainer_sets_them_before_it_asks_for_cuda(monkeypatch):
    """Afterwards they would come too late."""
    from pipehc import train

    class Asked(Exception): ...

    def is_available():
        raise Asked(os.environ.get("CUDA_MODULE_LOADING"))

    for name in ("check_world_size", "check_data", "quiet_libraries"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("torch.cuda.is_available", is_available)
    monkeypatch.setattr("os.environ", {"RANK": "0"})
    with pytest.raises(Asked, match="EAGER"):
        train.run(None)
