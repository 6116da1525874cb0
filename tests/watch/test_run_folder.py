"""One training a folder, and nothing lost."""

import os
import signal
from pathlib import Path

import pytest
from processes import run_ranks

from pipehc.comm.ranks import Ranks
from pipehc.watch.run_folder import RunFolder, set_aside


def test_a_folder_is_held_until_its_holder_is_gone(tmp_path):
    folder = tmp_path / "new" / "run"

    def hold_and_die(rank):
        held = RunFolder(folder, Ranks())
        os.kill(os.getpid(), signal.SIGKILL)
        return held

    run_ranks(hold_and_die, 1, init=False, may_die=[0])
    held = RunFolder(folder, Ranks())
    with pytest.raises(ValueError, match=r"run\.folder: .*new/run': another training runs there"):
        RunFolder(folder, Ranks())
    del held
    RunFolder(folder, Ranks())


def test_all_ranks_hear_that_a_folder_cannot_be_made():
    def occupy(rank):
        with pytest.raises(ValueError, match=r"run\.folder: '/proc/run': .*must be a folder to write into"):
            RunFolder(Path("/proc/run"), Ranks())

    run_ranks(occupy, 2)


def test_set_aside_never_replaces(tmp_path):
    for number in range(3):
        (tmp_path / "metrics.jsonl").write_text(str(number))
        set_aside(tmp_path / "metrics.jsonl")
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "file").write_text(str(number))
        set_aside(tmp_path / "checkpoints")
    set_aside(tmp_path / "missing")
    assert [(tmp_path / f"metrics-{i}.jsonl").read_text() for i in (1, 2, 3)] == ["0", "1", "2"]
    assert [(tmp_path / f"checkpoints-{i}" / "file").read_text() for i in (1, 2, 3)] == ["0", "1", "2"]
    assert len(os.listdir(tmp_path)) == 6
