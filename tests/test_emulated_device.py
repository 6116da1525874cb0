"""The trainer on an emulated CUDA device: whatever its streams, its allocator and its hosts' waits do, the gradients are to the bit
those of the same program on the host."""

import itertools
import os
from functools import partial

import preloaded  # noqa: F401
import pytest
import torch
from processes import free_port, run_ranks
from tiny_model import tiny_config

LEAST = (
    "model.blocks=2", "model.experts=2", "model.experts_active=1",
    "model.hidden_size=8", "model.heads=1", "model.head_dim=4", "model.rope_dim=2", "model.kv_rank=4",
    "model.expert_ffn_size=8", "model.dense_ffn_size=8", "residual.sinkhorn_iterations=2", "train.sequence_length=5",
    "train.micro_batch=1", "train.global_batch=4", "runtime.bucket_size=300",
)  # fmt: skip
AHEAD = (0.0, 0.02, 0.3, 0.9)
"""From a device that does nothing until the host waits, to one that is all but idle."""


def run(rank, overrides, tempers, port, world_size, kernels=False):
    """What was wrong, by temper; and the waits of the host. kernels: of Triton, in its interpreter, not their reference."""
    from emulation.trainer import EmulatedTrainer, differing, emulated, launches

    emulated(rank, world_size, port)
    trainer, steps = EmulatedTrainer(tiny_config(*overrides)), (1,) if kernels else (1, 2)
    # Kernels in the interpreter take a second each: one step of them.
    expected, found, waits = trainer.gradients(None, steps=steps), [], []
    assert len(expected[0]) > 10
    if kernels:
        os.environ["PIPEHC_KERNELS"] = "triton"
        reference, expected = expected, trainer.gradients(None, steps=steps)
        for got, want in zip(expected, reference):
            for name in want:
                a, b = (torch.as_tensor(each[name]).double() for each in (got, want))
                assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9, (name, a, b)
    for seed, temper in tempers:
        device = launches(seed, **temper)
        trainer.compile(hosts_wait=bool(temper["hardware_queues"] or temper["idle"]))
        found.append(differing(trainer.gradients(device, steps=steps), expected))
        waits.append(device.device.waits)
    return found, waits


def check(layout, tempers, **options):
    config = tiny_config(*LEAST, *layout)
    world_size = config.parallel.pp * (config.parallel.dp or config.smallest_dp)
    given = [*LEAST, *layout], tempers, free_port(), world_size
    results = run_ranks(partial(run, **options), world_size, *given, init=False, timeout=300 + 60 * len(tempers))
    for found, _ in results:
        assert found == [[]] * len(tempers), [(temper, names[:3]) for temper, names in zip(tempers, found) if names]
    return [waits for _, waits in results]


def seeds(count, first=0):
    """Of many kinds: one in two stops for an idle device now and then, some have few hardware queues. From number `first` on."""
    kinds = itertools.cycle(itertools.product((0.003, 0.0), (None, 1, None, 3)))
    tempers = ({"idle": idle, "hardware_queues": queues} for idle, queues in kinds)
    all_of_them = ((k, temper | {"ahead": AHEAD[k * 5 // 8 % 4]}) for k, temper in enumerate(tempers))
    return list(itertools.islice(all_of_them, first, first + count))


DUALPIPE = ("schedule.name=dualpipe", "parallel.pp=2", "recompute.enabled=true")
FOUR = ("parallel.pp=4", "model.blocks=4", "train.global_batch=8")
LAYOUTS = {
    "dualpipe": DUALPIPE,
    "dualpipe over four": (*DUALPIPE, *FOUR),
    "dualpipev": (*DUALPIPE, "schedule.name=dualpipev", "model.blocks=4"),
    "zbv, FFN deferred": (*DUALPIPE, "schedule.name=zbv", "schedule.deferred=[ffn]", "model.blocks=4"),
    "interleaved": (*DUALPIPE, "schedule.name=interleaved", "model.blocks=4"),
    "1f1b over four": (*DUALPIPE, "schedule.name=1f1b", *FOUR),
    "zb_h1, without recomputation": (*DUALPIPE, "schedule.name=zb_h1", "recompute.enabled=false"),
    "two replicas, harmonized, bf16": (
        *DUALPIPE, "parallel.dp=2", "train.global_batch=8", "residual.kind=harmonized", "train.precision=bf16", "recompute.block=1"
    ),
    "multi-token prediction, experts over two ranks": (*DUALPIPE, "model.mtp_depth=1", "parallel.ep=2", "train.global_batch=8"),
    "the plain residual": (*DUALPIPE, "residual.kind=none"),
}


SEEDS = int(os.environ.get("EMULATED_SEEDS", "1"))


def test_gradients_on_a_device():
    check(LAYOUTS["dualpipe"], seeds(3))


@pytest.mark.slow
@pytest.mark.timeout(400 + 60 * SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS if SEEDS > 1 else list(LAYOUTS)[1:])
def test_gradients_for_many_seeds(layout):
    """The more seeds the better: EMULATED_SEEDS=50 pytest tests/test_emulated_device.py, for all layouts, are 500."""
    check(LAYOUTS[layout], seeds(SEEDS, first=3 * list(LAYOUTS).index(layout)))


@pytest.mark.slow
def test_gradients_of_our_kernels_on_a_device():
    """What the end of a sub-layer leaves to its maps crosses queues, both ways: a stage has two blocks."""
    check((*DUALPIPE, "model.blocks=4", "residual.streams=2"), seeds(1), kernels=True)
