"""A job under our schedules that hangs: a rank that waits in vain leaves a report, in which step, for what, and after what."""

import os
import time
from functools import partial

import pytest
from megatron_job import Job, forward_step
from processes import run_ranks

from pipehc.comm.messages import PeerError


def slow_step(count, iterator, model):
    """Takes long in its third micro-batch on pipeline rank 1."""
    count.append(None)
    if os.environ["RANK"] == "1" and len(count) == 3:
        time.sleep(6)
    return forward_step(iterator, model)


def late_message(rank, folder):
    job = Job("1f1b", pp=2, layers=2, run={"timeout_s": 3.0, "watchdog_folder": folder})
    job.step(0, 4)
    with pytest.raises(PeerError) as caught:
        job.call(1, 4, forward_step=partial(slow_step, []))
    return str(caught.value), (folder / f"rank{rank:05}.txt").read_text()


def test_a_message_that_does_not_come(tmp_path):
    said, report = run_ranks(late_message, 2, tmp_path, timeout=60)[0]
    assert "process 1" in said
    assert "failed in training step 2: waiting for the gradient" in report
    assert "run 0F3" in report and "in late_message" in report  # what it did last, and where it is


def late_gradients(rank, folder):
    job = Job("1f1b", pp=2, layers=2, run={"timeout_s": 3.0, "watchdog_folder": folder})
    if rank == 1:
        finalize = job.config.finalize_model_grads_func
        job.config.finalize_model_grads_func = lambda *args, **more: (time.sleep(20), finalize(*args, **more))
    job.step(0, 4)


@pytest.mark.slow
def test_a_hang_outside_of_the_schedule_ends_the_process(tmp_path):
    """Here where the job ends its gradients."""
    with pytest.raises(RuntimeError, match="exited with 1"):
        run_ranks(late_gradients, 2, tmp_path, timeout=60)
    report = (tmp_path / "rank00001.txt").read_text()
    assert "no progress for" in report and "in training step 1: waiting for other ranks, outside of the pipeline's" in report


def no_hang(rank, folder):
    job = Job("1f1b", pp=2, layers=2, run={"timeout_s": 3.0, "watchdog_folder": folder})
    job.step(0, 4)
    time.sleep(7)  # between steps a job may save checkpoints, or end
    job.step(1, 4)
    job.evaluate(2, 4)


@pytest.mark.slow
def test_time_between_steps_does_not_count(tmp_path):
    run_ranks(no_hang, 2, tmp_path, timeout=60)
    assert not list(tmp_path.iterdir())
