"""A dry run of a job is the job: what it counts equals what the same script does to real tensors, to the byte."""

import os

import pytest
from processes import run_ranks
from test_enable import PP2, SCRIPT, SHARDED, TIED, VPP2, command_line

MOE = """--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall
--moe-router-load-balancing-type none --expert-model-parallel-size 2 """
UNCHECKED = "--no-check-for-nan-in-loss-and-grad"  # what peers send is whatever the memory holds


def dry(arguments, device):
    """One iteration of rank 0 of four, in a process of its own; maps by the reference on either device."""

    def fn(_):
        os.environ |= {"PIPEHC_KERNELS": "reference", "CUDA_VISIBLE_DEVICES": ""}
        from pipehc.megatron.job import dry_rank

        zeros = dry_rank._zeros

        def on_device(provider):  # or one of the two alone would copy them there
            import torch
            from megatron.core.rerun_state_machine import RerunDataIterator

            batch = next(zeros(provider)[0])
            there = {name: torch.zeros(t.shape, dtype=t.dtype, device="cuda") for name, t in batch.items()}
            return RerunDataIterator(iter(lambda: dict(there), None)), None, None

        dry_rank._zeros = on_device
        given = (*command_line(arguments), UNCHECKED)
        return dry_rank.run_rank(dry_rank.Request(str(SCRIPT), given, 0, 4, device=device, host=True))

    return run_ranks(fn, 1, init=False, timeout=240)[0]


def found(arguments, device):
    result = dry(arguments, device)
    assert type(result).__name__ == "Found", result.text
    return result


def same(arguments):
    counted, real = found(arguments, "meta"), found(arguments, "cpu")
    assert counted.job == real.job and counted.pipeline == real.pipeline
    counted, real = counted.run, real.run
    for launches in (counted.launches, real.launches):
        for where in [where for where in launches if where.kind == "step"]:
            for operation in [o for o in launches[where] if o.name == "aten._to_copy"]:
                assert operation.bytes == 16  # what the loss function reports travels through the host: copied on a GPU alone
                del launches[where][operation]
    for where in counted.launches.keys() | real.launches.keys():
        assert counted.launches.get(where) == real.launches.get(where), where
    for name, peak in counted.peaks.items():
        other = real.peaks[name]
        assert (peak.total, peak.bytes, peak.at) == (other.total, other.bytes, other.at)
    assert counted.persistent == real.persistent
    assert sum(o.flops for counts in counted.launches.values() for o in counts) > 0
    return counted


def test_counts_are_those_of_real_tensors():
    counted = same(PP2 + MOE + "--schedule dualpipe --residual mhc --bf16 " + SHARDED)
    # The replicas of a stage share the optimizer's state: four hold it, of experts two. 12 bytes an element in bf16, 8 in fp32.
    experts = 8 * 2 * 3 * 32 * 32
    shared = (counted.persistent["gradients"] / 4 - experts) / 4 + experts / 2
    assert 8 * shared < counted.persistent["optimizer"] < 12.5 * shared


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "--schedule dualpipe",
        "--schedule zbv --residual hc " + VPP2 + TIED,
        "--schedule 1f1b --residual mhc --overlap-grad-reduce",
        "--spec local_stack LOCAL_STACK --hybrid-layer-pattern *E*-|*E-E --schedule dualpipe --residual mhc " + MOE,
    ],
)
def test_counts_are_those_of_real_tensors_elsewhere(arguments):
    same(PP2 + arguments)
