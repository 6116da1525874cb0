"""One training a folder, and nothing lost."""

import os
import signal
from pathlib import Path

import pytest
from processes import run_ranks

from pipehc.comm.ranks import Ranks
from pipehc.watch.run_folder import RunFolder


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
