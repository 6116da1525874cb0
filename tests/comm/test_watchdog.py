"""A job in which a rank hangs, is stopped, is slow or returns nonsense ends soon, says why, and leaves what every rank did last."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from pipehc.comm.messages import Waiting
from pipehc.comm.watchdog import KEPT, Watchdog
from pipehc.schedules.actions import Action
from pipehc.schedules.program import Message, Run, Wait

RUN, WAIT = Run(Action("F", 2, 7)), Wait(Message("gradient", 0, 1, 3, 2, 1))
TIMEOUT = 4.0


class Box:
    """As much of a mailbox as a watchdog looks at."""

    waiting = Waiting("waiting for the gradient for stage 1 (process 2, 144 bytes)", 0.0)

    def on_device(self):
        return 0, []


@pytest.fixture
def watched(tmp_path):
    """A watchdog with a short limit, and what it said."""
    said = []
    with Watchdog(tmp_path / "deep" / "rank.txt", 0.1, said.append, slack_s=0.1) as watchdog:
        yield watchdog, said, tmp_path / "deep" / "rank.txt"


def test_says_what_a_wait_is_for_and_since_when(watched):
    watchdog, said, _ = watched
    watchdog.watch(Box())
    with watchdog.limited("in step 7"):
        watchdog.begin(WAIT)
        time.sleep(0.6)
    assert len(said) == 1  # once
    assert re.search(r"since \d\d:\d\d:\d\d\.\d\d\d, in step 7: waiting for the gradient .*process 2, 144 bytes", said[0])


def test_neither_work_nor_progress_nor_time_without_limit_counts(watched):
    watchdog, said, _ = watched
    watchdog.begin(WAIT)  # no limit here: saving a checkpoint may take its time
    time.sleep(0.4)
    with watchdog.limited("in step 1"):
        watchdog.begin(RUN)
        time.sleep(0.4)  # slow, but working
        watchdog.end(RUN)
        for _ in range(8):
            watchdog.begin(WAIT)
            time.sleep(0.05)
            watchdog.end(WAIT)
    assert said == []


def test_waits_after_the_last_instruction_count_too(watched):
    watchdog, said, _ = watched
    with watchdog.limited("in step 1"):
        watchdog.begin(RUN)
        watchdog.end(RUN)
        time.sleep(0.6)
    assert len(said) == 1 and "waiting for other ranks" in said[0]


class Device:
    """As much of a mailbox as a watchdog looks at, on CUDA: the host does not wait, the device comes through 20 waits a second."""

    waiting = None

    def __init__(self, seconds):
        self.begin, self.seconds = time.monotonic(), seconds

    def on_device(self):
        passed = int(20 * min(time.monotonic() - self.begin, self.seconds))
        return passed, [f"waiting for {k}" for k in range(passed, 2000)]


@pytest.mark.parametrize(
    ("current", "where"),
    [
        (None, "outside of the pipeline's instructions; "),
        (RUN, "at run 2F7; "),  # the routing of experts asks the device for numbers
    ],
)
def test_a_device_that_stops_is_noticed_wherever_the_host_is(watched, current, where):
    """While it comes through one message after another, nobody hangs, though the host may be blocked for the rest of the step."""
    watchdog, said, _ = watched
    watchdog.watch(Device(0.7))
    with watchdog.limited("in step 7"):
        watchdog.begin(RUN)
        if current is None:
            watchdog.end(RUN)
        time.sleep(0.7)
        assert said == []
        time.sleep(0.5)
    assert len(said) == 1 and f"{where}not finished on the device: waiting for 14; waiting for 15" in said[0]
    assert "waiting for 22" not in said[0]


def test_dumps_the_last_instructions_once(watched):
    watchdog, _, file = watched
    for microbatch in range(KEPT + 30):
        instruction = Run(Action("F", 2, microbatch))
        watchdog.begin(instruction)
        watchdog.end(instruction)
    watchdog.begin(WAIT)
    watchdog.dump("the reason")
    watchdog.dump("another")
    text = file.read_text()
    assert "the reason" in text and "another" not in text
    assert len(re.findall(r"^\S+ +\d+\.\d{3} +run 2F", text, re.M)) == KEPT
    assert "run 2F30\n" in text and "run 2F229\n" in text and "run 2F29\n" not in text
    assert "not finished  wait gradient for stage 1, micro-batch 3, rank 2 -> 1" in text
    assert "test_dumps_the_last_instructions_once" in text  # where the main thread is


def test_hears_signals_while_the_main_thread_is_blocked(tmp_path):
    """As inside a library: the handler would not run before the call returns."""
    heard, (read, write) = [], os.pipe()
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with Watchdog(tmp_path / "x", 10.0, heard.append, lambda signum: (heard.append(signum), os.write(write, b"x"))):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert os.read(read, 1) == b"x"
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert heard == [signal.SIGUSR1]


# The trainer with one fault: from micro-batch 2 of the second step on, the stages of rank 1 do something else.
FAULTY = """
import os, sys, time
from pipehc import train
from pipehc.model import stage
calls, forward = 0, stage.ModelStage.forward
def faulty(self, microbatch, x):
    global calls
    calls += 1
    y = forward(self, microbatch, x)
    if os.environ["RANK"] == "1" and calls == 8:
        open("when", "w").write(str(time.time()))
        {fault}
    return y
stage.ModelStage.forward = faulty
code = train.main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)
"""
FAULTS = {
    "stopped": "os.kill(os.getpid(), 19)",
    "killed": "os.kill(os.getpid(), 9)",
    "slow": "time.sleep(600)",
    "wrong shape": "y = y[:-1]",
}
CONFIG = {
    "model": {
        "vocab_size": 256, "hidden_size": 16, "blocks": 3, "dense_blocks": 3, "heads": 2, "head_dim": 8, "rope_dim": 4,
        "kv_rank": 8, "dense_ffn_size": 16,
    },
    "residual": {"kind": "mhc", "streams": 2},
    "parallel": {"pp": 3},
    "schedule": {"name": "1f1b"},
    "train": {"steps": 50, "sequence_length": 16, "micro_batch": 1, "global_batch": 6},
    "optimizer": {"lr": 1e-3},
    "runtime": {"timeout_s": TIMEOUT},
}  # fmt: skip


@pytest.mark.slow  # each starts three processes that import Megatron
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_rank_ends_the_job_with_a_report_of_every_rank(tmp_path, fault):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = CONFIG | {"data": {"paths": [str(tmp_path / "text.txt")]}, "run": {"folder": "x"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "faulty.py").write_text(FAULTY.format(fault=FAULTS[fault]))
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "faulty.py"]
    job = subprocess.Popen(
        [*launcher, "--config", "config.yaml", f"run.folder={run}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        _, errors = job.communicate(timeout=150)
    finally:
        for process in psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []:
            process.kill()
        job.kill()
    took = time.time() - float((tmp_path / "when").read_text())
    assert job.returncode != 0
    assert took < (15 if fault in ("killed", "wrong shape") else TIMEOUT + 15), errors
    assert errors.count("pipehc: rank") == 1, errors
    reports = {path.stem: path.read_text() for path in (run / "watchdog").iterdir()}
    assert set(reports) == {f"rank{rank:05}" for rank in range(3) if (fault, rank) != ("killed", 1)}
    assert all("last instructions" in text and re.search(r"run \dF\d", text) for text in reports.values())
    message = errors[errors.index("pipehc: rank") :].split("torch/distributed/elastic")[0]
    if fault in ("stopped", "slow"):
        # The neighbour that waits for rank 1 names the message, where it comes from, how large it is and how long it waited.
        message_of_rank_1 = r"(activation|gradient) for stage \d, micro-batch \d, rank 1 -> [02] \(process 1, 2048 bytes\)"
        assert re.search(message_of_rank_1 + r".* since \d\d:\d\d", message)
    if fault == "stopped":
        assert re.search(r"rank 1 \(process \d+\) is stopped", message)
    if fault == "wrong shape":
        assert "(15, 1, 32)" in message and "(16, 1, 32)" in message
