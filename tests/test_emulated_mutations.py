"""What keeps streams in order is needed: taken away, the emulated device computes something else, or the host finds nothing.

`hold`, `wait` and `event` of the places that ask for them, a place at a time: of those in NEEDED, or of all, which takes a
quarter of an hour: MUTATE=all pytest -s tests/test_emulated_mutations.py.
"""

import os
import sys
from collections import Counter

import preloaded  # noqa: F401
import pytest
import torch.distributed as dist
from processes import free_port, run_ranks
from test_emulated_device import AHEAD, DUALPIPE, LEAST
from tiny_model import tiny_config

SEEDS = 4


def place(kind, queue):
    """(kind, queue, function that asks, function that called it), of the frames outside of the emulation."""
    names, frame = [], sys._getframe(2)
    while frame is not None and len(names) < 2:
        file = frame.f_code.co_filename
        if "/emulation/" not in file and not file.endswith(("contextlib.py", "test_emulated_mutations.py")):
            name = frame.f_code.co_name
            names.append("_sum of a carrier" if name == "_sum" and "carrier" in frame.f_locals["name"] else name)
        frame = frame.f_back
    return kind, queue.split()[0], *names


def run(rank, overrides, needed, kernels, port, world_size):
    """By place, whether it was missed. kernels: of Triton, in its interpreter, or their reference."""
    from emulation.trainer import EmulatedTrainer, differing, emulated, launches

    os.environ["PIPEHC_KERNELS"] = kernels
    emulated(rank, world_size, port)
    trainer = EmulatedTrainer(tiny_config(*overrides))
    trainer.compile(hosts_wait=True)
    steps = (1,) if kernels == "triton" else (1, 2)  # in the interpreter a step takes half a minute
    expected, seen = trainer.gradients(None, steps=steps), Counter()

    def wrong(seed, skip, steps=steps):
        """On any rank."""
        try:
            found = bool(differing(trainer.gradients(launches(seed, ahead=AHEAD[seed % 4]), skip, steps), expected[: len(steps)]))
        except RuntimeError:
            found = True
        everyone = [None] * world_size
        dist.all_gather_object(everyone, found)
        return any(everyone)

    def note(*asked):
        seen[place(*asked)] += 1
        return False

    assert not wrong(0, note) and (kernels == "triton" or not wrong(1, note))
    everyone = [None] * world_size
    dist.all_gather_object(everyone, set(seen))
    asked_for = set().union(*everyone)
    if os.environ.get("MUTATE") != "all":
        asked_for &= needed

    def is_missed(name):
        lengths = sorted({1, len(steps)})  # most are missed in one step
        return any(wrong(seed, lambda *asked: place(*asked) == name, steps[:n]) for n in lengths for seed in range(SEEDS))

    return {name: is_missed(name) for name in sorted(asked_for)}


def check(overrides, needed, kernels):
    missed, _ = run_ranks(run, 2, [*LEAST, *overrides], needed, kernels, free_port(), 2, init=False, timeout=3000)
    print(*(f"{'missed' if found else 'NOT MISSED'}: {' '.join(name)}" for name, found in missed.items()), sep="\n")
    assert {name for name, found in missed.items() if found} >= needed


@pytest.mark.slow
@pytest.mark.timeout(3100)
def test_waits_holds_and_events_are_missed():
    """Of two pipeline ranks, with recomputation and overlapped pairs, over two steps."""
    check(DUALPIPE, NEEDED, "reference")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_waits_of_receives_for_their_buffers_are_missed():
    """Under 1f1b: dualpipe's receives are posted too late for that."""
    check((*DUALPIPE, "schedule.name=1f1b"), {("wait", "Post", "start_after", "edge_queue")}, "reference")


@pytest.mark.slow
@pytest.mark.timeout(3100)
def test_holds_of_what_the_end_of_a_sublayer_leaves_are_missed():
    """It goes to the maps of its sub-layer past the F between them, from queue to queue (kernels/link.py)."""
    check((*DUALPIPE, "schedule.name=1f1b", "model.blocks=4", "residual.streams=2", "train.global_batch=2"), LEFT, "triton")


# Not among them, since nothing of these two steps shows it: a send's wait for the step before, the join at the end of a step, and
# the event of a gradient that is handed in on `high`.
NEEDED = {
    ("wait", "Send", "start_after", "edge_queue"),
    ("wait", "compute", "after", "forward"),
    ("wait", "compute", "after", "backward"),
    ("wait", "high", "after", "forward"),
    ("wait", "high", "after", "backward"),
    ("event", "compute", "mark", "forward"),
    ("event", "compute", "mark", "backward"),
    ("event", "compute", "execute", "_execute"),
    ("event", "high", "mark", "forward"),
    ("event", "high", "mark", "backward"),
    ("event", "high", "execute", "_execute"),
    ("hold", "compute", "_take", "work"),
    ("hold", "high", "_take", "work"),
}

LEFT = {
    ("hold", "compute", "_sum of a carrier", "<genexpr>"),
    ("hold", "high", "_sum of a carrier", "<genexpr>"),
}
