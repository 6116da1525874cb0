"""The command itself, over real trainings."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipehc.study import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["stability2"], "NAME stability2: must be one of ablation, init, overhead, retrieval, scaling, stability"),
        (["scaling", "--seeds", "0"], "--seeds 0: must be a whole number from 1 to 1000"),
        (["scaling", "--jobs", "two"], "--jobs two: must be a whole number from 1 to 1000"),
        (["overhead", "--seeds", "3"], "--seeds 3: overhead trains nothing, so it has no seeds"),
        (["scaling", "train.seed=3"], "override 'train.seed=3': the runs of this study differ in train.seed"),
        (["scaling", "--scale", "paper", "--configs", "nowhere"], "--configs nowhere: no file 3b.yaml"),
        (["init", "train.steps=100"], "train.steps: 100 with evaluation.interval: 60"),
        (["scaling", "train.stepz=3"], "unknown key 'train.stepz'"),
    ],
)
def test_questions_without_an_answer(arguments, words, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_one_study_a_folder(tmp_path, capsys):
    import fcntl

    with open(tmp_path / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["scaling", "--out", str(tmp_path)]) == 2
    assert "another study runs there" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_goes_on_and_reports(tmp_path):
    """SIGKILL for the study alone: its workers must notice."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * 20)
    tiny = ["model.blocks=1", "model.dense_blocks=1", "train.steps=8", "evaluation.interval=2", "evaluation.samples=16",
            "optimizer.warmup_steps=2", "train.sequence_length=16", f"data.paths=[{text}]"]  # fmt: skip
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipehc.study", "scaling", "--seeds", "2", "--jobs", "2", "--out", str(out), *tiny]
    study = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 300
        while not list(out.glob("runs/*/outcome.json")):
            assert study.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        children = psutil.Process(study.pid).children(recursive=True)
    finally:
        os.kill(study.pid, signal.SIGKILL)
        study.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/outcome.json")}

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("runs/*/outcome.json"))) == 8
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert (out / "report.md").read_text().startswith("# Study `scaling`") and (out / "scaling.png").stat().st_size < 100_000
    assert len((out / "results.csv").read_text().splitlines()) == 9
