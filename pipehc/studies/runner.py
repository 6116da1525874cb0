"""Runs what is not over yet, so many at a time, and says how far it is. Killed at any moment, the same call goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from pipehc.config.loading import to_yaml
from pipehc.config.schema import Config
from pipehc.studies.asked import CONFIG, Place, check_parts, compare, configuration
from pipehc.studies.design import Study
from pipehc.studies.outcome import ANSWER, LOG, End, Outcome, broke_at, read_end, write_end
from pipehc.studies.run import Run
from pipehc.studies.worker import Forked, Launched, Worker, prepare
from pipehc.watch.display import clock
from pipehc.watch.whole_file import write_whole

_POLL_S = 0.05


class StudyError(RuntimeError):
    """A run failed, which is no result. The message names it and its log."""


@dataclass
class _Task:
    run: Run
    config: Config
    folder: Path
    worker: Worker | None = None
    began: float = 0.0
    log_began: int = 0  # bytes of the log that earlier attempts wrote


@dataclass
class Runner:
    """launcher: what stands before `-m pipehc.train`, none: a process on this machine.  jobs: at a time."""

    study: Study
    place: Place
    jobs: int
    launcher: Sequence[str] = ()
    console: Console = field(default_factory=Console)

    def outcomes(self, runs: Sequence[Run]) -> list[Outcome]:
        """All runs, over, in their order. A run that is over already is not started again.

        Raises ConfigError, before anything starts, for a configuration that cannot be trained or that differs from what lies in
        its folder; StudyError for a run that failed, after ending all others.
        """
        tasks = [_Task(run, configuration(run, self.place), self.place.folder(run)) for run in runs]
        for task in tasks:
            if self.study.command == "train":
                check_parts(task.run, task.config, self.study.parts)
        for task in tasks:
            compare(task.run, task.config, task.folder)
        self._work([task for task in tasks if read_end(task.folder) is None], len(tasks))
        outcomes = []
        for task in tasks:
            end = read_end(task.folder)
            assert end is not None
            outcomes.append(Outcome(task.run, task.folder, end))
        return outcomes

    def _work(self, waiting: list[_Task], total: int) -> None:
        running: list[_Task] = []
        if waiting and not self.launcher:
            self.console.print("importing torch and Megatron", highlight=False)
            prepare()
        with _Shown(self.console, total, total - len(waiting), self.jobs) as shown:
            try:
                while waiting or running:
                    while waiting and len(running) < self.jobs:
                        running.append(self._start(waiting.pop(0)))
                    for task in list(running):
                        assert task.worker is not None
                        code = task.worker.code()
                        if code is not None:
                            running.remove(task)
                            shown.over(task.run.name, self._end(task, code))
                    shown.refresh([task.run.name for task in running])
                    time.sleep(_POLL_S)
            finally:
                for task in running:
                    assert task.worker is not None
                    task.worker.kill()

    def _start(self, task: _Task) -> _Task:
        folder, command = task.folder, self.study.command
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG, to_yaml(task.config))
        log = folder / LOG
        task.log_began, task.began = log.stat().st_size if log.exists() else 0, time.monotonic()
        arguments, answer = ["--config", str(folder / CONFIG)], None
        if command == "plan":
            arguments += ["--dry-run", "--json"]
            answer = folder / ANSWER
            answer.unlink(missing_ok=True)
        if self.launcher:
            task.worker = Launched(self.launcher, command, arguments, log, answer)
        else:
            task.worker = Forked(command, arguments, log, answer)
        return task

    def _end(self, task: _Task, code: int) -> End:
        """Keeps the outcome of a run. Raises StudyError if there is none."""
        log = task.folder / LOG
        said = log.read_bytes()[task.log_began :].decode(errors="replace") if log.exists() else ""
        step = broke_at(said) if code > 0 else None  # 1, or what torchrun makes of it
        if code and step is None:
            how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
            last = said.strip().splitlines()[-1:]
            raise StudyError("; ".join([f"run {task.run.name} {how}", *last, f"its output is in {log}"]))
        end = End(step, round(time.monotonic() - task.began, 1))
        write_end(task.folder, end)
        return end


class _Shown:
    """Progress: one live line, or a line a run where standard output is no terminal."""

    def __init__(self, console: Console, total: int, done: int, jobs: int) -> None:
        self._console, self._total, self._done, self._jobs = console, total, done, jobs
        self._seconds: list[float] = []
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        # Drawn from the loop, without rich's thread: launchers are forked from here.
        self._progress = Progress(TextColumn("runs"), MofNCompleteColumn(), text, console=console, auto_refresh=False)
        self._task = self._progress.add_task("", total=total, completed=done)
        self._drawn = 0.0

    def __enter__(self) -> _Shown:
        if done := self._done:
            self._console.print(f"{done} of {self._total} runs are over already", highlight=False)
        if self._console.is_terminal and self._done < self._total:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def over(self, name: str, end: End) -> None:
        self._done += 1
        self._seconds.append(end.seconds)
        how = "done" if end.broke_at is None else f"broke off at step {end.broke_at}"
        text = f"{self._done}/{self._total}  {name}: {how} in {end.seconds:.0f} s  left {self._left()}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def refresh(self, names: Sequence[str]) -> None:
        if self._console.is_terminal and time.monotonic() - self._drawn > 0.5:
            self._drawn = time.monotonic()
            description = f"left {self._left()}  running {', '.join(names)}"
            self._progress.update(self._task, completed=self._done, description=description, refresh=True)

    def _left(self) -> str:
        """By the mean of the runs since this start: they differ, but are ordered seed by seed."""
        if not self._seconds:
            return "?"
        return clock(sum(self._seconds) / len(self._seconds) * (self._total - self._done) / self._jobs)
