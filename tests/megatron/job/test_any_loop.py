"""`enable` in loops that are not megatron.training's: it works there, or the first step says what to call instead."""

import copy

import megatron.training.training  # noqa: F401 (imported once, for all children)
import megatron_job
import pytest
from bridge_loop import Loop
from processes import run_ranks

from pipehc.megatron import build_model_chunks, enable


def train(rank, schedule, residual, parallel, options):
    """(losses and norms, what was printed). schedule: None for the loop as it was."""
    megatron_job.initialize(**parallel)
    if schedule is None:
        return Loop(**parallel, **options).train(2, 4)
    with enable(schedule, residual=residual):
        return Loop(**parallel, **options).train(2, 4)


def last(ranks, *arguments):
    results = run_ranks(train, ranks, *arguments, timeout=240)
    return results[-1][0], results[0][1]


def assert_same(found, expected):
    for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=3e-6) and norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "parallel", "options"),
    [
        ("1f1b", {"pp": 2}, {}),
        pytest.param("zb_h1", {"pp": 2}, {"overlap": True}, marks=pytest.mark.slow),
        pytest.param("auto", {"pp": 2}, {}, marks=pytest.mark.slow),
        pytest.param("interleaved", {"pp": 2, "vpp": 2}, {}, marks=pytest.mark.slow),
        pytest.param("1f1b", {}, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_loop_of_bridges_kind_runs_our_schedules(schedule, parallel, options):
    ranks = parallel.get("pp", 1)
    found, printed = last(ranks, schedule, None, parallel, options)
    assert f"pipehc: on; schedule {schedule}" in printed and "residual connections as the job has them" in printed
    plain, printed = last(1, None, None, {}, {})  # in one process: Megatron's own interleaving wants more than two ranks
    assert printed == ""
    assert_same(found, plain)


@pytest.mark.parametrize("kind", ["mhc", pytest.param("hc", marks=pytest.mark.slow)])
def test_a_loop_of_bridges_kind_gets_hyper_connections(kind):
    own, printed = last(2, "megatron", kind, {"pp": 2}, {})
    assert f"pipehc: on; Megatron's own schedule (1F1B) over 2 ranks, stage messages 4 times as wide; residual {kind}" in printed
    ours, printed = last(2, "1f1b", kind, {"pp": 2}, {})
    assert f"residual {kind}, 4 streams" in printed
    assert_same(ours, own)
    assert abs(own[0][0] - last(2, None, None, {"pp": 2}, {})[0][0][0]) > 1e-4


@pytest.mark.slow
def test_a_hybrid_model_in_a_loop_of_bridges_kind():
    options = {"pattern": "+-|+E", "layers": 4}
    own, _ = last(2, "megatron", "mhc", {"pp": 2}, options)
    ours, printed = last(2, "1f1b", "mhc", {"pp": 2}, options)
    assert "residual mhc, 4 streams" in printed
    assert_same(ours, own)


def refused(act):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        act()
    return str(caught.value)


def start_wrongly(rank):
    """What each mistake is told, on this rank."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    megatron_job.initialize(pp=2)
    said = []
    loop, earlier = Loop(pp=2, layers=2), get_forward_backward_func()

    fresh = megatron_job.provider(megatron_job.model_config(pp=2, layers=2))

    def call(forward_backward=None, **more):
        said.append(refused(lambda: loop.call(forward_backward or loop.forward_backward(), 0, 4, **more)))

    with enable("1f1b", residual="mhc"):
        call()  # its model was built before
        call(earlier)
        said.append(refused(lambda: build_model_chunks(fresh, "1f1b", residual="hc")))
    with enable("megatron", residual="mhc"):
        call()
    with enable("dualpipe"):
        call()

    class Other(P2PCommunicator):
        pass

    with enable("1f1b"):
        call(p2p_communicator=Other(parallel_state.get_pipeline_model_parallel_group(), loop.config))
        groups = copy.copy(loop.groups)
        groups.pp = parallel_state.get_data_parallel_group()
        call(pg_collection=groups)
    with enable("1f1b", residual="mhc"):  # both ways of asking for the same thing
        chunks = build_model_chunks(fresh, "1f1b", residual="mhc")
        assert chunks[0].decoder.layers[0].residual.kind == "mhc"
    assert get_forward_backward_func() is earlier
    return said


def test_what_cannot_work_is_refused_at_the_first_step_on_every_rank():
    before = r"residual.kind = 'mhc': .*GPTModel\) are plain: built before .* was called.*build_model_chunks\(.*residual='mhc'\)"
    expected = [
        before,
        "runs a schedule of Megatron's that it got before",
        "residual.kind = 'hc': the decoder's spec has another form of hyper-connections already .mhc.",
        before,
        "dualpipe over 2 ranks needs 2: build them with pipehc.megatron.build_model_chunks and wrap_model_chunks, or take",
        "p2p_communicator = .*: must be None, or Megatron's P2PCommunicator",
        "pg_collection.pp: must be the pipeline group",
    ]
    for said in run_ranks(start_wrongly, 2):
        for message, text in zip(expected, said, strict=True):
            with pytest.raises(ValueError, match=message):
                raise ValueError(text)
