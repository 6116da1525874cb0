"""What the environment of a process must and must not say for communication to hide behind computation."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping

from pipehc.comm.budgets import ALLOCATOR, CONNECTIONS, MODULE_LOADING


def overlap_warnings(environment: Mapping[str, str], ranks_here: int, cores: int, on_gpu: bool) -> list[str]:
    """What in the environment of a process keeps communication from hiding behind computation, a sentence each.

    ranks_here: processes on this machine. cores: its processor cores.
    """
    reasons = {
        ("CUDA_LAUNCH_BLOCKING", "1"): "every kernel is waited for; unset it",
        ("TORCH_NCCL_BLOCKING_WAIT", "1"): "the host waits for every message; unset it",
        ("NCCL_BLOCKING_WAIT", "1"): "the host waits for every message; unset it",
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"): "every collective is checked with one more; set INFO or OFF",
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"): "memory that is freed waits for the device; unset it",
    }
    found = [f"{key}={value}: {why}" for (key, value), why in reasons.items() if environment.get(key, "").upper() == value]
    connections = CONNECTIONS.said(environment) or ""
    if connections.isdigit() and int(connections) < 8:
        share = "all streams share one hardware queue" if connections == "1" else "streams share few hardware queues"
        found.append(
            f"{CONNECTIONS.variable}={connections}: {share}, so messages and high-priority kernels wait behind computation; "
            f"set {CONNECTIONS.default}"
        )
    loading = MODULE_LOADING.said(environment) or ""
    if on_gpu and loading.upper() != MODULE_LOADING.default:
        found.append(
            f"{MODULE_LOADING.variable}={loading}: a kernel that is first needed in a later step is loaded then, which may wait "
            f"for messages that wait for it; set {MODULE_LOADING.default}"
        )
    allocator = ALLOCATOR.said(environment) or ""
    if on_gpu and ALLOCATOR.default.lower() not in allocator.lower():
        found.append(
            f"{ALLOCATOR.variable}={allocator}: memory in segments of fixed size fragments, and to give some back may wait for "
            f"messages that wait for it; add {ALLOCATOR.default}"
        )
    threads = environment.get("OMP_NUM_THREADS", "")
    if not on_gpu and threads.isdigit() and int(threads) * ranks_here > max(cores, ranks_here):
        found.append(
            f"OMP_NUM_THREADS={threads}: {ranks_here} processes with {threads} threads each on {cores} cores delay each other's "
            "messages; set 1"
        )
    return found


def quiet_libraries() -> None:
    """Keeps a dozen lines a process about what Megatron falls back to without TransformerEngine off the screen; -W shows them."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
