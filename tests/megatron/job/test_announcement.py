"""What a job is told at its first step: that pipehc is on, with what, and what is off. And which iteration it is in."""

import contextlib
import io
from types import SimpleNamespace

import pytest
from megatron.core import rerun_state_machine
from megatron_job import Job
from processes import run_ranks

from pipehc.megatron.job.announcement import Setup, megatrons_own
from pipehc.megatron.job.iteration import Iterations
from pipehc.megatron.job.source import source_of
from pipehc.schedules import Costs, build, compile


def text(schedule, *, recompute=True, forward=False, **changes):
    program = compile(build(schedule, 2, 4, forward=forward), recompute=recompute, high=True)
    fields = dict(
        program=program, asked=schedule, origin="", message="no stage messages", recompute_block=None, overlap=True,
        trace_steps=None, trace_folder="traces", nvtx=False, timeout_s=600.0, watchdog_folder="watchdog",
        diagnostics_interval=0, diagnostics_folder="figures",
    )  # fmt: skip
    return Setup(**(fields | changes)).text([])


@pytest.mark.parametrize(
    ("arguments", "on", "off"),
    [
        (dict(schedule="dualpipe"), "overlapped pairs", "traces"),
        (dict(schedule="dualpipe"), "recomputation in blocks of all sub-layers of a chunk", "profiler ranges"),
        (dict(schedule="dualpipe"), "dualpipe, 2 stages in two directions over 2 ranks, 4 micro-batches a step", ""),
        (dict(schedule="dualpipe", overlap=False), "", "overlapped pairs (overlap = False)"),
        (dict(schedule="1f1b"), "1f1b, 2 stages over 2 ranks, 4 micro-batches", "overlapped pairs (this schedule has none)"),
        (dict(schedule="1f1b", recompute=False), "", "recomputation"),
        (dict(schedule="1f1b", recompute_block=3), "recomputation in blocks of 3 sub-layers", ""),
        (dict(schedule="1f1b", trace_steps=(3, 4), nvtx=True), "traces of iterations 3 to 4 in traces/; profiler ranges", ""),
        (dict(schedule="1f1b", diagnostics_interval=10), "figures of the streams every 10 iterations in figures/", ""),
        (dict(schedule="1f1b"), "", "figures of the streams (diagnostics_interval)"),
        (dict(schedule="1f1b", timeout_s=30.0), "reports of waits over 30 s in watchdog/", ""),
        (dict(schedule="1f1b", origin="as given"), "1f1b (as given), 2 stages", ""),
        (dict(schedule="1f1b", forward=True, recompute=False), "evaluation under schedule 1f1b", "recomputation"),
    ],
    ids=str,
)
def test_what_is_on_and_what_is_off(arguments, on, off):
    said_on, _, said_off = text(**arguments).partition(". Off: ")
    assert said_on.startswith("on; ") and "\n" not in said_on
    assert on in said_on and on not in said_off.split(", ") and off in said_off
    for other in ("overlapped pairs", "recomputation", "traces"):
        assert (other in said_on) != (other in said_off)


def test_megatrons_own_schedules():
    assert megatrons_own(1, None, []).startswith("on; Megatron's own schedule (no pipeline) over 1 ranks; residual connections")
    assert "(interleaved, 2 stages a rank) over 4 ranks; " in megatrons_own(4, 2, [])


def test_what_a_search_found_and_from_which_costs():
    def searched(rank):
        said = []
        for options in ({}, {"costs": Costs(f=40, b=40, w=40, link=20 / 3, weights=(1, 2.00001)), "placement": "v"}):
            source = source_of("auto", options)
            source.build(2, 4, False)
            said.append(source.origin(4))
        return said

    ((default, given),) = run_ranks(searched, 1)
    assert default.startswith(
        "searched over the linear placement from costs f = 1, b = 1, w = 1, a guess (costs=Costs(...) gives others; no dry run: "
    )
    assert given.startswith("searched over the v placement from costs f = 40, b = 40, w = 40, link = 6.667, weights = (1, 2): ")
    assert all("best" in text and ("faster than" in text or "it is" in text) for text in (default, given))


def first_step(rank, folder):
    """What two steps and an evaluation print, and the steps that were recorded."""
    printed = io.StringIO()
    run = {"trace_steps": (7, 7), "trace_folder": folder, "watchdog_folder": "w", "transport": "host"}
    job = Job("dualpipe", pp=2, layers=2, residual="mhc", run=run)
    machine = rerun_state_machine.get_rerun_state_machine()
    machine.current_iteration = 5  # the loop has resumed after five steps
    with contextlib.redirect_stdout(printed):
        job.evaluate(0, 4)
        for step in range(2):
            while machine.should_run_forward_backward(None):
                job.call(step, 4)
    return printed.getvalue()


def test_the_first_step_says_it_once_on_rank_0(tmp_path):
    first, second = run_ranks(first_step, 2, tmp_path)
    evaluation, training = first.splitlines()
    assert evaluation.startswith("pipehc: on; evaluation under schedule dualpipe, 2 stages") and second == ""
    assert training.startswith("pipehc: on; schedule dualpipe, 2 stages in two directions over 2 ranks, 4 micro-batches a step; ")
    assert "residual mhc, 4 streams; " in training
    assert "; stage messages 32 x 2 x 256 float32 over gloo, through host memory (transport = 'host'); " in training
    assert f"traces of iterations 7 to 7 in {tmp_path}/" in training
    assert training.endswith(". Off: figures of the streams (diagnostics_interval), profiler ranges (nvtx)")
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007.json"]


@pytest.fixture
def machine(monkeypatch):
    machine = rerun_state_machine.RerunStateMachine()
    monkeypatch.setattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", machine)
    return machine


def numbers(machine, steps):
    iterations, found = Iterations(), []
    for _ in range(steps):
        while machine.should_run_forward_backward(None):
            found.append(iterations.next())
    return found


def test_iterations_are_numbered_as_the_loop_numbers_them(machine, monkeypatch):
    iterations = Iterations()
    assert [iterations.next() for _ in range(3)] == [1, 2, 3]  # nobody says it
    assert numbers(machine, 3) == [1, 2, 3]  # never told where it starts
    machine.current_iteration = 20
    assert numbers(machine, 2) == [21, 22]
    import megatron.training.global_vars as training

    monkeypatch.setattr(training, "_GLOBAL_ARGS", SimpleNamespace(curr_iteration=99))
    assert Iterations().next() == 100
