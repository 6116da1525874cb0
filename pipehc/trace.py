"""Records what a step really did, as spans in the simulator's form, and marks it for profilers (NVTX)."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from pipehc.comm.messages import Mailbox
from pipehc.schedules.program import Instruction, Message, Program, Run, Wait
from pipehc.schedules.recording import Recording, merge
from pipehc.schedules.spans import Span

if TYPE_CHECKING:
    from pipehc.trainer import Trainer


@contextmanager
def traced(trainer: Trainer, step: int, folder: Path) -> Iterator[None]:
    """Records the training step in this block if `trace.steps` asks for it: a file in `folder`. Collective over the world."""
    config, rank = trainer.config, trainer.groups.pp_rank
    if config.trace.steps is None or not config.trace.steps[0] <= step <= config.trace.steps[1]:
        yield
        return
    recorder = Recorder(rank, trainer.device)
    trainer.observers.append(recorder)
    try:
        with recorder.attached(trainer.mailbox):
            yield
    finally:
        trainer.observers.remove(recorder)
    pipeline = dist.get_rank() % (dist.get_world_size() // config.parallel.pp)
    save_step(recorder, trainer.train_program, step, folder, (pipeline, rank), recompute=config.recompute.enabled)


class Recorder:
    """Records the spans of one rank while `attached` to its mailbox; an `Observer` of its instructions.

    rank: position in the pipeline. device: on CUDA, times are those of its streams, from events; on CPU those of the host. Times
    are ms of time.time: clocks of several machines must agree (NTP) for their spans to fit together.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._clock: _DeviceClock | _HostClock = _DeviceClock(device) if device.type == "cuda" else _HostClock()
        self._begun: Any = None
        self._actions: list[tuple[Run | Wait, Any, Any]] = []
        self._messages: list[tuple[Literal["send", "recv"], Message, Any, Future[Any]]] = []
        self._waiters: dict[tuple[str, int, int], ThreadPoolExecutor] = {}

    def begin(self, instruction: Instruction) -> None:
        self._begun = self._clock.now()

    def end(self, instruction: Instruction) -> None:
        if isinstance(instruction, Run | Wait):
            self._actions.append((instruction, self._begun, self._clock.now()))

    @contextmanager
    def attached(self, mailbox: Mailbox) -> Iterator[None]:
        """In this block the transfers of `mailbox` are recorded."""
        mailbox.tracker = self._track
        try:
            yield
        finally:
            mailbox.tracker = None
            for waiter in self._waiters.values():
                waiter.shutdown(wait=False)

    def spans(self) -> list[Span]:
        """Everything so far. On sending and receiving: from the call to the end of the transfer, waiting included."""
        ms = self._clock.ms
        spans = []
        for instruction, start, end in self._actions:
            if isinstance(instruction, Run):
                a = instruction.action
                tail = a.kind, a.lane, a.stage, a.microbatch, instruction.pair
                spans.append(Span(self._rank, "compute", ms(start), ms(end), str(a), *tail))
            else:
                m = instruction.message
                spans.append(Span(self._rank, "wait", ms(start), ms(end), f"wait {m.kind} {m.stage}.{m.microbatch}", *m[:4]))
        for queue, m, start, done in self._messages:
            spans.append(Span(self._rank, queue, ms(start), ms(done.result()), f"{m.kind} {m.stage}.{m.microbatch}", *m[:4]))
        return spans

    def _track(self, message: tuple, kind: Literal["send", "recv"], work: dist.Work) -> dist.Work:
        """Notes when a transfer ends. gloo tells only who waits for it: a thread per edge and direction does, in order."""
        key = (kind, *message[4:6])
        waiter = self._waiters.setdefault(key, ThreadPoolExecutor(1, thread_name_prefix="trace"))
        done: Future[Any] = waiter.submit(self._clock.after, work)
        self._messages.append((kind, message, self._clock.now(), done))  # type: ignore[arg-type]
        return work if isinstance(self._clock, _DeviceClock) else _Tracked(done)  # type: ignore[return-value]


class _Tracked:
    """A transfer that another thread waits for. As much of dist.Work as a mailbox uses."""

    def __init__(self, done: Future[Any]) -> None:
        self._done = done

    def wait(self, timeout: datetime.timedelta) -> bool:
        try:
            self._done.result(timeout.total_seconds())
        except FutureTimeout:
            return False
        return True


class _HostClock:
    def now(self) -> float:
        return time.time()

    def after(self, work: dist.Work) -> float:
        work.wait()
        return self.now()

    def ms(self, stamp: float) -> float:
        return 1000 * stamp


class _DeviceClock:
    """Times are events on the current stream. The first is put beside the host's clock while the device is idle."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self._zero, self._host_ms = torch.cuda.Event(enable_timing=True), 1000 * time.time()
        self._zero.record()

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def after(self, work: dist.Work) -> torch.cuda.Event:
        """On a stream of its own, so that nothing but the transfer is waited for."""
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            work.wait()
            return self.now()

    def ms(self, stamp: torch.cuda.Event) -> float:
        stamp.synchronize()
        return self._host_ms + self._zero.elapsed_time(stamp)


class Markers:
    """An `Observer` that opens a range for every instruction, for Nsight Systems (NVTX) and torch.profiler."""

    def __init__(self) -> None:
        self._open: torch.profiler.record_function | None = None

    def begin(self, instruction: Instruction) -> None:
        name = f"{type(instruction).__name__} {instruction.action if isinstance(instruction, Run) else instruction.message}"
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(name)
        self._open = torch.profiler.record_function(name)
        self._open.__enter__()

    def end(self, instruction: Instruction) -> None:
        assert self._open is not None
        self._open.__exit__(None, None, None)
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()


def save_step(
    recorder: Recorder, program: Program, step: int, folder: Path, position: tuple[int, int], *, recompute: bool
) -> None:
    """Brings the spans of all ranks together and writes a file a pipeline; collective over the world.

    position: (pipeline, position in it) of this rank. Files are folder/step-NNNNNN.json, and -pipelineN for others than the first.
    """
    everyone: list[tuple[int, int, list[Span]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (*position, recorder.spans()))
    if dist.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    schedule = program.schedule
    parts = sorted(part for part in everyone if part is not None)
    for pipeline in range(1 + max(part[0] for part in parts)):
        spans = merge([spans for number, _, spans in parts if number == pipeline], schedule.placement)
        title = f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches, step {step}"
        name = f"step-{step:06}" + (f"-pipeline{pipeline}" if pipeline else "")
        Recording(title, schedule, recompute, spans).save(folder / f"{name}.json")
