"""A dry run is the program: what it counts equals what the same program does to real tensors, to the byte."""

import os

import pytest
from processes import run_ranks
from tiny_model import tiny_config

BASE = ("parallel.pp=4", "schedule.name=dualpipe", "train.global_batch=16", "recompute.enabled=true")


def dry(overrides, rank, device):
    """One step of one rank, in a process of its own; maps by the reference and attention as a CPU chooses it, on either device."""
    config = tiny_config(*BASE, *overrides)

    def fn(_):
        os.environ |= {"PIPEHC_KERNELS": "reference", "CUDA_VISIBLE_DEVICES": ""}
        from pipehc.dry_run import run_rank
        from pipehc.megatron import meta

        meta._patch_attention = lambda: None
        return run_rank(config, rank, device=device, host=True)

    return run_ranks(fn, 1, init=False)[0]


def same(overrides, rank):
    counted, real = dry(overrides, rank, "meta"), dry(overrides, rank, "cpu")
    for where in counted.launches.keys() | real.launches.keys():
        if where.kind not in ("setup", "host"):
            assert counted.launches.get(where) == real.launches.get(where), where
    assert counted.peaks == real.peaks
    assert counted.persistent == real.persistent
    assert counted.saved == real.saved
    assert sum(o.flops for counts in counted.launches.values() for o in counts) > 0


EXPERTS = ("parallel.ep=2", "parallel.dp=2", "train.global_batch=32", "train.precision=bf16")
OTHERS = {
    "dualpipev": ("schedule.name=dualpipev", "parallel.pp=2"),
    "interleaved": ("schedule.name=interleaved", "parallel.pp=2"),
    "1f1b without recomputation": ("schedule.name=1f1b", "recompute.enabled=false"),
    "dualpipe without recomputation": ("recompute.enabled=false",),
    "without overlap": ("runtime.overlap=false",),
    "recompute blocks": ("recompute.block=1",),
    "experts over two ranks": EXPERTS,
    **{kind: (f"residual.kind={kind}",) for kind in ("mhc", "none", "hc", "isohc", "hybrid", "harmonized")},
    "static": ("residual.kind=harmonized", "residual.static=true"),
}


def test_counts_are_those_of_real_tensors():
    same(EXPERTS, 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", OTHERS)
def test_counts_are_those_of_real_tensors_elsewhere(case, rank):
    same(OTHERS[case], rank)
