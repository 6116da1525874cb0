"""Runs of a study: never twice, never mixed; broken ones are results, failures are told; killed at any moment it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from study_cases import launcher, run, runner, starts

from pipehc.config.strict_yaml import ConfigError
from pipehc.studies.asked import Place, check_overrides, configuration
from pipehc.studies.outcome import LOG, broke_at
from pipehc.studies.run import Run
from pipehc.studies.runner import StudyError

RUNS = [run("a", 0.1), run("b", 0.2), run("c", 0.3)]
# In a process of its own, that can be killed: `python -c SCRIPT OUT FOLDER LR`.
SCRIPT = """
import sys
from pathlib import Path
from study_cases import run, runner
runner(Path(sys.argv[1]), Path(sys.argv[2]), jobs=2).outcomes([run("a", 0.1), run("b", float(sys.argv[3])), run("c", 0.3)])
"""


def test_runs_are_over_once_and_in_their_order(tmp_path):
    outcomes = runner(tmp_path / "out", tmp_path).outcomes(RUNS)
    assert [outcome.run.name for outcome in outcomes] == ["a", "b", "c"]
    assert [outcome.last("val_loss") for outcome in outcomes] == [0.1, 0.2, 0.3]
    again = runner(tmp_path / "out", tmp_path).outcomes([*RUNS, run("d", 0.4)])
    assert [outcome.last("val_loss") for outcome in again] == [0.1, 0.2, 0.3, 0.4]
    assert [starts(tmp_path / "out", name) for name in "abcd"] == [1, 1, 1, 1]


def test_a_run_that_differs_from_what_lies_there_is_refused_before_anything_starts(tmp_path):
    runner(tmp_path / "out", tmp_path).outcomes(RUNS[:1])
    with pytest.raises(ConfigError, match=r"run a with another configuration.*\n  optimizer.lr: 0.1 there, now 0.7"):
        runner(tmp_path / "out", tmp_path).outcomes([run("b", 0.2), run("a", 0.7)])
    assert starts(tmp_path / "out", "b") == 0


def test_a_study_may_be_moved(tmp_path):
    runner(tmp_path / "out", tmp_path).outcomes(RUNS)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert len(runner(tmp_path / "moved", tmp_path).outcomes(RUNS)) == 3
    assert starts(tmp_path / "moved", "a") == 1


def test_a_run_that_breaks_off_is_a_result(tmp_path):
    for _ in range(2):
        a, broken = runner(tmp_path / "out", tmp_path).outcomes([run("a", 0.1), run("b", 0.5)])
        assert (a.end.broke_at, broken.end.broke_at) == (None, 7)
        assert broken.last("val_loss") is None  # what it had reached is no end
        assert starts(tmp_path / "out", "b") == 1


def test_a_run_that_fails_stops_the_study_and_names_its_log(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(StudyError, match=f"run b failed with exit code 1; no space left on device; its output is in .*{LOG}"):
        runner(out, tmp_path, jobs=1).outcomes([run("a", 0.1), run("b", 0.25), run("c", 0.3)])
    assert [starts(out, name) for name in "abc"] == [1, 1, 0]
    assert "hello" in (out / "runs" / "b" / LOG).read_text()


def test_killed_with_all_its_processes_it_goes_on(tmp_path):
    out = tmp_path / "out"
    study = _start(out, tmp_path)
    os.killpg(study.pid, signal.SIGKILL)
    study.wait()
    outcomes = runner(out, tmp_path).outcomes([run("a", 0.1), run("b", 8.0), run("c", 0.3)])
    assert [outcome.last("val_loss") for outcome in outcomes] == [0.1, 8.0, 0.3]
    assert [starts(out, name) for name in "abc"] == [1, 2, 1]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_no_run_outlives_the_study(tmp_path, signum):
    study = _start(tmp_path / "out", tmp_path)
    children = psutil.Process(study.pid).children(recursive=True)
    assert children
    os.kill(study.pid, signum)
    study.wait(20)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_overrides_are_for_what_runs_share():
    check_overrides(RUNS, ["train.steps=3"])
    with pytest.raises(ConfigError, match=r"override 'optimizer.lr=1': the runs of this study differ in optimizer.lr"):
        check_overrides(RUNS, ["optimizer.lr=1"])
    with pytest.raises(ConfigError, match="--out chooses the folder"):
        check_overrides(RUNS, ["run.folder=x"])


def test_a_configuration_that_cannot_be_names_its_run(tmp_path):
    with pytest.raises(ConfigError, match=r"run a: .*train.micro_batch x dp"):
        configuration(RUNS[0], Place(tmp_path, overrides=("train.global_batch=17",)))
    with pytest.raises(ConfigError, match=r"--configs .*: no file 3b.yaml"):
        configuration(Run("a", {}, (), "3b.yaml"), Place(tmp_path, configs=tmp_path))


@pytest.mark.parametrize(
    "line, step",
    [
        ("pipehc: rank 0 ended in step 7: the loss of step 7 is nan; no weight was changed", 7),
        ("pipehc: rank 0 ended in step 12: step 12: the gradient norm is inf, on all ranks; no weight was changed", 12),
        ("pipehc: rank 0 ended in step 3: rank 1: the loss of step 3 is -inf; no weight was changed", 3),
        ("pipehc: rank 0 ended in step 7: OSError: no space left on device", None),
        ("step 7: no weight was changed", None),
    ],
)
def test_the_trainers_words_for_a_broken_run(line, step):
    assert broke_at(f"step 1/9  loss 2.0\n{line}\n") == step


def _start(out: Path, folder: Path) -> subprocess.Popen:
    """A study in a process group of its own, whose runs a and c are over and b waits."""
    launcher(folder)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(out), str(folder), "8"]
    study = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not all((out / "runs" / name / "outcome.json").exists() for name in "ac") or not starts(out, "b"):
        if study.poll() is not None or time.monotonic() > until:
            study.kill()
            raise AssertionError(f"runs a and c are not over, exit code {study.poll()}")
        time.sleep(0.05)
    return study
