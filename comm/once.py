"""Says something once, though every process of this machine wants to say it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import psutil


def job_id() -> str | None:
    """Of the torchrun that started this process, the same after it has restarted its processes; None without one."""
    if run := os.environ.get("TORCHELASTIC_RUN_ID"):
        launcher = psutil.Process(os.getppid())
        # Without --standalone every run has the same id, and process numbers come again: only with its start is a launcher unique.
        return f"{run}-{launcher.pid}-{launcher.create_time()}"
    return None


def say_once(text: str, topic: str) -> None:
    """Prints `text` on standard error, if no other process of this job on this machine has said something on `topic` yet.

    The first process to create a marker file wins; no process has to be alive or reachable, so this also works while a job falls
    apart. A job is the processes of one torchrun (or this process alone).
    """
    if job := job_id():
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        marker = Path(tempfile.gettempdir(), f"pipehc-{topic}-{job}-{restart}".replace("/", "-"))
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        except OSError:
            pass  # no room for markers: better said by every process than by none
    # One write: lines of several processes must not mix.
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
