"""A dry run is the program: what it counts equals what the same program does to real tensors, to the byte."""

import os

import pytest
from processes import run_ranks
from tiny_model import tiny_config

BASE = ("parallel.pp=4", "schedule.name=dualpipe", "train.global_batch=16", "recompute.enabled=true")


def dry(overrides, rank, device, kernels="reference", **more):
    """One step of one rank, in a process of its own."""
    config = tiny_config(*BASE, *overrides)

    def fn(_):
        os.environ["PIPEHC_KERNELS"] = kernels
        import torch
        from pipehc.dry_run import run_rank

        if device == "meta":  # attention as a CPU chooses it
            from pipehc.megatron import meta

            meta._patch_attention = lambda: None
        torch.manual_seed(0)
        return run_rank(config, rank, device=device, **more)

    return run_ranks(fn, 1, init=False)[0]


def same(overrides, rank=1, **more):
    counted, real = (dry(overrides, rank, device, **more) for device in ("meta", "cpu"))
    for where in counted.launches.keys() | real.launches.keys():
        if where.kind != "setup":
            assert counted.launches.get(where) == real.launches.get(where), where
    for name in real.peaks:
        assert counted.peaks[name] == real.peaks[name], name
    assert counted.persistent == real.persistent
    return counted


QUICK = {
    "demo": (),
    "experts over two ranks": ("parallel.ep=2", "parallel.dp=2", "train.global_batch=32", "train.precision=bf16"),
}
SLOW = {
    "dualpipev": ("schedule.name=dualpipev", "parallel.pp=2"),
    "interleaved": ("schedule.name=interleaved", "parallel.pp=2"),
    "1f1b without recomputation": ("schedule.name=1f1b", "recompute.enabled=false"),
    "dualpipe without recomputation": ("recompute.enabled=false",),
    "without overlap": ("runtime.overlap=false",),
    "recompute blocks": ("recompute.block=1",),
    **{kind: (f"residual.kind={kind}",) for kind in ("none", "hc", "isohc", "hybrid", "harmonized")},
    "static": ("residual.kind=harmonized", "residual.static=true"),
}


@pytest.mark.parametrize("case", QUICK)
def test_counts_are_those_of_real_tensors(case):
    same(QUICK[case])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", SLOW)
def test_counts_are_those_of_real_tensors_elsewhere(case, rank):
    same(SLOW[case], rank)


def test_counts_with_kernels():
    same((), kernels="triton")
