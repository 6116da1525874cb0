"""The work of one GPU, made by hand so that its figures can be read off, and the Chrome trace of it."""

import pytest


def figures(rank):
    names = ("total", "compute", "bubble", "communication", "exposed", "recompute", "hidden", "high_delay")
    return {name: pytest.approx(getattr(rank, name)) for name in names}


def losses(rank):
    return {loss.why: loss.ms for loss in rank.losses if loss.ms}


# Kernels of one GPU, in ms: (start, end, name, stream, launched). Stream 20 has high priority.
KERNELS = [
    (0, 10, "void gemm<float>(int)", 7, 0),
    (4, 16, "ncclDevKernel_SendRecv(ncclDevComm*)", 13, 1),
    (20, 30, "rebuild", 7, 2),  # idle from 16 to 20, though launched long before: waited for an event
    (24, 28, "void deep_ep::internode::dispatch<1>()", 13, 3),
    (30, 40, "attention", 7, 4),
    (40, 42, "post_res", 20, 27),  # ready at 27, but 13 ms behind the others
    (50, 60, "gemm2", 7, 49),  # idle from 42 to 50: the host was late
]
EXPECTED = {
    "total": 60, "compute": 42, "bubble": 12, "communication": 16, "exposed": 6, "recompute": 10, "hidden": 4, "high_delay": 13,
}  # fmt: skip
LOSSES = {
    "ncclDevKernel_SendRecv ran with nothing to compute beside it": 6,
    "the device was idle: rebuild waited for an event": 4,
    "the device was idle: the host launched gemm2 late": 8,
    "recomputation ran with no message under way": 6,
    "high-priority work was ready, but stood behind other work": 13,
}


def profile():
    events = [{"ph": "M", "name": "process_name"}, {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5, "tid": 1}]
    for number, (start, end, name, stream, launched) in enumerate(KERNELS):
        arguments = {"correlation": number, "stream": stream, "priority": -5 if stream == 20 else 0}
        events.append({"ph": "X", "cat": "kernel", "name": name, "ts": 1e3 * start, "dur": 1e3 * (end - start), "args": arguments})
        call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 1, "args": {"correlation": number}}
        events.append(call | {"ts": 1e3 * launched - 10, "dur": 10})
    for name, start in (("Run 0R3", 1.9), ("Run 0F3", 3.5)):
        events.append({"ph": "X", "cat": "user_annotation", "name": name, "ts": 1e3 * start, "dur": 500, "tid": 1})
    return {"traceEvents": events, "distributedInfo": {"rank": 3}}
