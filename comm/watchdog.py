"""Ends a job that hangs, with words: a thread that sees how long this process has been waiting, and what it did before."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from pipehc.comm.messages import Mailbox

KEPT = 200  # instructions
NAMED = 8  # messages that the device waits for, the oldest: a host that is a step ahead has issued hundreds


class _Done(NamedTuple):
    instruction: object
    start: float  # time.monotonic
    end: float


class Watchdog:
    """Watches this process while it is `limited`; implements `pipehc.schedules.execute.Observer`.

    file: where `dump` writes. timeout_s: how long nothing may happen: neither an instruction starts or ends, nor does a CUDA stream
    get a message that it waits for, nor does the limited block end. Work does not count, however long it takes, unless the device
    waits for messages meanwhile: then the host may be blocked by that, inside of the work. slack_s: added, so that waits with a
    limit of their own, which know more, come first. on_expiry: called with what this process waits for. on_signal: called with the
    number of every signal that has a Python handler. Both are called from a thread, at once, even while the main thread is blocked
    inside a library; they should end the process, for this watchdog is then of no more use. Make it on the main thread; a context
    manager.
    """

    def __init__(
        self,
        file: Path,
        timeout_s: float,
        on_expiry: Callable[[str], None],
        on_signal: Callable[[int], None] | None = None,
        slack_s: float = 2.0,
    ) -> None:
        self._file, self._limit_s, self._on_expiry, self._on_signal = file, timeout_s + slack_s, on_expiry, on_signal
        self._done: deque[_Done] = deque(maxlen=KEPT)
        self._current: object | None = None
        self._last = time.monotonic()  # when something last happened
        self._limited: str | None = None
        self._mailbox: Mailbox | None = None
        self._come_through = 0  # waits of the device
        self._dumping = threading.Lock()
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False) if on_signal else None
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def watch(self, mailbox: Mailbox) -> None:
        """Lets reports say which message `mailbox` waits for."""
        self._mailbox = mailbox

    def begin(self, instruction: object) -> None:
        self._current, self._last = instruction, time.monotonic()

    def end(self, instruction: object) -> None:
        now = time.monotonic()
        self._done.append(_Done(instruction, self._last, now))
        self._current, self._last = None, now

    @contextmanager
    def limited(self, where: str) -> Iterator[None]:
        """In this block the time limit holds. where: what the process does, for the report ("in step 7")."""
        self._limited, self._last = where, time.monotonic()
        try:
            yield
        finally:
            self._limited = None

    def dump(self, reason: str) -> None:
        """Writes the reason, what is waited for, the last instructions and the stacks of all threads; once, and without raising."""
        if not self._dumping.acquire(blocking=False):
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "w", encoding="utf-8") as file:
                file.write("\n".join(self._lines(reason)) + "\n\nstacks:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            pass  # a full disk may be why the job ends

    def close(self) -> None:
        """Stops watching."""
        if self._closed:
            return
        self._closed = True
        if self._previous_wakeup is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
        self._wake.send(b"\0")
        self._thread.join()
        self._wake.close()
        self._woken.close()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        period = min(1.0, self._limit_s / 4)
        while not self._closed:
            readable, _, _ = select.select([self._woken], [], [], period)
            for signum in self._woken.recv(64) if readable else b"":
                if signum and self._on_signal is not None:
                    self._on_signal(signum)
            unfinished = self._on_device()
            where, waited = self._limited, time.monotonic() - self._last
            working = hasattr(self._current, "action") and not unfinished
            if where is not None and waited > self._limit_s and not working:
                self._limited = None
                self._on_expiry(f"no progress for {waited:.0f} s, since {_clock(self._last)}, {where}: {self._waiting()}")

    def _on_device(self) -> list[str]:
        """What the device waits for; notes its progress."""
        come_through, unfinished = self._device_waits()
        if come_through != self._come_through:
            self._come_through, self._last = come_through, time.monotonic()
        return unfinished

    def _device_waits(self) -> tuple[int, list[str]]:
        return self._mailbox.on_device() if self._mailbox is not None else (0, [])

    def _waiting(self) -> str:
        waiting = self._mailbox.waiting if self._mailbox is not None else None
        if waiting is not None:
            return waiting.what
        _, unfinished = self._device_waits()
        device = f"; not finished on the device: {'; '.join(unfinished[:NAMED])}" if unfinished else ""
        if self._current is not None:
            return f"at {_describe(self._current)}{device}"
        return f"waiting for other ranks, outside of the pipeline's instructions{device}"

    def _lines(self, reason: str) -> Iterator[str]:
        yield f"process {os.getpid()} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {reason}"
        yield self._waiting()
        yield ""
        yield f"last instructions, at most {KEPT}: start, ms, what"
        yield from (f"{_clock(start)}  {1e3 * (end - start):10.3f}  {_describe(what)}" for what, start, end in list(self._done))
        if self._current is not None:
            yield f"{_clock(self._last)}  not finished  {_describe(self._current)}"


class Stopped(NamedTuple):
    """A process that is stopped (SIGSTOP). It cannot notice that its job has ended, nor say where it was, until it is resumed."""

    rank: str
    process: psutil.Process

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process.pid}) is stopped"


def stopped_siblings() -> list[Stopped]:
    """Which other ranks of this process's launcher on this machine are stopped."""
    found = []
    try:
        siblings = psutil.Process(os.getppid()).children()
    except psutil.Error:
        return []
    for process in siblings:
        try:
            if process.status() == psutil.STATUS_STOPPED and (rank := process.environ().get("RANK")):
                found.append(Stopped(rank, process))
        except psutil.Error:
            continue
    return found


def _describe(instruction: object) -> str:
    what = getattr(instruction, "action", None) or getattr(instruction, "message", None)
    return f"{type(instruction).__name__.lower()} {what}"


def _clock(monotonic: float) -> str:
    """Time of day of a time.monotonic, with milliseconds."""
    seconds = time.time() - time.monotonic() + monotonic
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{int(seconds % 1 * 1000):03d}"
