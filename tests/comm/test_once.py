"""One message of a job, whoever says it first, and never none."""

import os
import tempfile

import psutil
import pytest
from processes import run_ranks

from pipehc.comm.once import say_once


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """As torchrun without --standalone starts its processes: every job has the id 'none'."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def said(capfd):
    return capfd.readouterr().err.splitlines()


def test_one_of_several_processes_speaks(launched, capfd):
    run_ranks(lambda rank: say_once("the end", "end"), 3, init=False)
    assert said(capfd) == ["the end"]


def test_a_later_job_whose_launcher_got_the_same_number_speaks_again(launched, monkeypatch, capfd):
    say_once("first job", "end")
    start = psutil.Process(os.getppid()).create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: start + 100)
    say_once("second job", "end")
    say_once("second job", "end")
    assert said(capfd) == ["first job", "second job"]


@pytest.mark.parametrize(("writable", "run"), [(False, "none"), (True, "a/b")])
def test_speaks_where_no_marker_can_be_made_and_whatever_the_id(launched, monkeypatch, capfd, writable, run):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
    with monkeypatch.context() as patch:
        if not writable:
            patch.setattr(tempfile, "tempdir", "/proc/nowhere")
        say_once("the end", "end")
        say_once("the end", "end")
    assert said(capfd) == ["the end"] * (1 if writable else 2)


def test_a_process_without_launcher_always_speaks(monkeypatch, capfd):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    say_once("one", "end")
    say_once("two", "end")
    assert said(capfd) == ["one", "two"]
