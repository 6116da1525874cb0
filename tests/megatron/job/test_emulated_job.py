"""A job's forward-backward function on an emulated CUDA device: gradients to the bit those of the same program on the host."""

import os

import pytest
import torch
from megatron_job import Job
from processes import free_port, run_ranks

from pipehc.comm.queues import make_queues as host_queues

CASES = [
    {"schedule": "dualpipe", "pp": 2, "layers": 4, "residual": "mhc"},
    {"schedule": "dualpipev", "pp": 2, "vpp": 2, "layers": 4, "residual": "mhc", "overlap_grad_reduce": True,
     "distributed_optimizer": True},
    {"schedule": "1f1b", "pp": 4, "layers": 4},
    {"schedule": "dualpipe", "pp": 2, "ep": 2, "layers": 4},
]  # fmt: skip


def run(rank, arguments, seeds, world_size, port):
    from emulation import groups
    from emulation.queue import make_queues
    from emulation.trainer import emulated, launches
    from megatron.core.utils import unwrap_model

    emulated(rank, world_size, port)
    job = Job(**arguments)
    own = job.forward_backward
    own.hosts_wait = lambda: True

    buffers = [buffer for chunk in job.chunks for buffer in unwrap_model(chunk).buffers()]
    at_first = [buffer.clone() for buffer in buffers]  # a step moves the experts' biases

    def gradients(queues):
        for buffer, value in zip(buffers, at_first):
            buffer.copy_(value)
        own.__dict__["_queues"] = queues
        found = []
        for step in range(2):
            reports = job.accumulate(step, 4 * arguments.get("pp", 1) // 2)
            own_gradients = [p.main_grad.clone() for chunk in job.chunks for p in chunk.parameters() if p.requires_grad]
            found.append([*own_gradients, *(report["lm loss"].clone() for report in reports)])
        return found

    expected, wrong = gradients(host_queues(torch.device("cpu"))), []
    for seed in range(seeds):
        device = launches(seed, ahead=(0.02, 0.3, 0.0, 0.9)[seed % 4], idle=(0.003, 0.0)[seed % 2])
        groups.current = device
        with device.launching():
            found = gradients(make_queues(device))
        groups.current = None
        assert len(found[0]) >= 8  # a stage of one layer has few parameters
        both = [pair for a, b in zip(found, expected) for pair in zip(a, b, strict=True)]
        wrong.append([i for i, (own_value, value) in enumerate(both) if not torch.equal(own_value, value)])
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_a_job_on_a_device(case):
    """The more seeds the better: EMULATED_SEEDS."""
    world_size, seeds = case["pp"] * case.get("ep", 1), int(os.environ.get("EMULATED_SEEDS", "1"))
    for wrong in run_ranks(run, world_size, case, seeds, world_size, free_port(), init=False, timeout=500):
        assert wrong == [[]] * seeds
