"""One run in a process of its own: forked with all imports done, or started with the user's launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Protocol

from pipehc.comm.parent import end_with_parent


class Worker(Protocol):
    def code(self) -> int | None:
        """The exit code (negative: the signal that ended it); None while it runs."""

    def kill(self) -> None:
        """Ends it, and waits for that."""


def prepare() -> None:
    """Waits until workers can be forked. Without it the first of them waits, and its time is not that of its run."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, by the process that all are forked from
    context = get_context("forkserver")
    context.set_forkserver_preload(["pipehc.studies.preloaded"])
    process = context.Process(target=int, daemon=False)
    process.start()
    process.join()


class Forked:
    """`python -m pipehc.COMMAND ARGUMENTS` in a process forked from one that has imported everything.

    Its output goes to the end of `log`, and standard output to `answer` if that is given. It ends when this process does. Call
    `prepare` before the first one.
    """

    def __init__(self, command: str, arguments: Sequence[str], log: Path, answer: Path | None = None) -> None:
        context = get_context("forkserver")
        # Not a daemon: a dry run starts processes of its own.
        self._process = context.Process(
            target=_work, args=(command, list(arguments), str(log), answer and str(answer)), daemon=False
        )
        self._process.start()

    def code(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class Launched:
    """The same, with `launcher` (torchrun ...) before `-m`. It is told to end, by SIGTERM, when this process does."""

    def __init__(
        self, launcher: Sequence[str], command: str, arguments: Sequence[str], log: Path, answer: Path | None = None
    ) -> None:
        with open(log, "ab") as file, open(answer or log, "ab") as output:
            self._process = subprocess.Popen(
                [*launcher, "-m", f"pipehc.{command}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=file,
                start_new_session=True,  # Ctrl-C is for the study, which ends its runs
                preexec_fn=lambda: end_with_parent(signal.SIGTERM),
            )

    def code(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        """torchrun ends its own processes when it is asked to, but not when it is killed."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _work(command: str, arguments: list[str], log: str, answer: str | None) -> None:
    end_with_parent()  # which is the process that it was forked from, and that one ends with the study
    study = parent_process()
    if study is None or not study.is_alive():
        os._exit(1)
    os.setsid()  # Ctrl-C is for the study, which ends its runs
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    file = os.open(log, append, 0o644)
    os.dup2(file if answer is None else os.open(answer, append, 0o644), 1)
    os.dup2(file, 2)
    import torch

    torch.set_num_threads(1)
    code = import_module(f"pipehc.{command}").main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as the command itself ends: what is left of process groups may block
