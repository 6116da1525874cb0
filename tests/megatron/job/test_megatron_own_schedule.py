"""Hyper-connection layers under Megatron's own 1F1B and interleaved schedules: every layout trains what one process trains.

The schedules free what they have sent, and the messages are n times as wide as Megatron's buffers would be.
"""

import functools

import megatron_job
import pytest
from processes import run_ranks

INTERLEAVED = {"pp": 4, "vpp": 2, "options": {"overlap_p2p_comm": True, "batch_p2p_comm": False}}
LAYOUTS = {
    "pp4": (4, {"pp": 4}),
    "pp4 x vpp2": (4, INTERLEAVED),
    "pp2 x tp2 x ep2": (4, {"pp": 2, "tp": 2, "ep": 2}),
}


def losses_and_norms(ranks, residual, **layout):
    """Of two steps of four micro-batches, and the loss of an evaluation; the same on every rank."""
    options = dict(layout.pop("options", {}), deallocate_pipeline_outputs=True)
    arguments = dict(layout, schedule=None, residual=residual, options=options)
    results = run_ranks(megatron_job.train, ranks, arguments, 2, 4, timeout=240)
    assert all(result == results[0] for result in results[1:])
    return results[0]


@functools.cache
def one_process(kind):
    return losses_and_norms(1, kind)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["mhc", pytest.param("hc", marks=pytest.mark.slow)])
def test_every_layout_equals_one_process(kind, layout):
    ranks, arguments = LAYOUTS[layout]
    expected, evaluation = one_process(kind)
    found, found_evaluation = losses_and_norms(ranks, kind, **arguments)
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected):
        assert loss == pytest.approx(expected_loss, abs=2e-6)
        assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert found_evaluation == pytest.approx(evaluation, abs=2e-6)


def test_the_streams_are_at_work():
    """What the comparison above would not see: one stream instead of four, or no streams at all."""
    mhc, hc, plain = one_process("mhc"), one_process("hc"), one_process(None)
    assert len({round(found[0][0][0], 4) for found in (mhc, hc, plain)}) == 3
