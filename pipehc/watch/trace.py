"""Records what a step really did, as spans in the simulator's form."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from pipehc.comm.messages import Mailbox
from pipehc.comm.queues import Queue
from pipehc.model.stage import NodeWatch
from pipehc.schedules.program import Instruction, Message, Program, Run, Wait
from pipehc.schedules.recording import Recording, merge
from pipehc.schedules.spans import Span
from pipehc.watch.clock import clock_of


@runtime_checkable
class NodeObserver(Protocol):
    """Told when the work of a node starts, on the thread and the stream that it runs on."""

    def node(self, of: Node) -> Callable[[], None]:
        """Returns what is called when it has ended."""


class Node(NamedTuple):
    """A node of one action. queue: `high` for the first or last piece of its action, `communication` for an all-to-all."""

    kind: str  # F, B, R or W
    lane: int
    stage: int
    microbatch: int
    name: str  # BLOCK.KIND
    queue: str

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch} {self.name}"


def node_watch(observers: Sequence[object], lane: int, stage: int) -> NodeWatch | None:
    """What a ModelStage is to tell of its nodes, or None if no observer wants to know."""
    watching = [observer for observer in observers if isinstance(observer, NodeObserver)]
    if not watching:
        return None

    def watch(kind: str, microbatch: int, name: str, queue: str) -> Callable[[], None]:
        ended = [observer.node(Node(kind, lane, stage, microbatch, name, queue)) for observer in watching]

        def end() -> None:
            for observer_ended in reversed(ended):
                observer_ended()

        return end

    return watch


class Recorder:
    """Records the spans of one rank while `attached` to its mailbox; an `Observer` of its instructions, and of their nodes.

    rank: position in the pipeline. device: on CUDA, times are those of its `queues`, from events; on CPU those of the host. Times
    are ms of time.time: clocks of several machines must agree (NTP) for their spans to fit together.
    """

    def __init__(self, rank: int, device: torch.device, queues: Mapping[str, Queue]) -> None:
        self._rank, self.device = rank, device
        self._clock = clock_of(device, queues)
        self._begun: Any = None
        self._actions: list[tuple[Run | Wait, Any, Any]] = []
        self._nodes: list[tuple[Node, Any, list[Any]]] = []  # with its start, and its end once there
        self._messages: list[tuple[Literal["send", "recv"], Message, Any, Future[Any]]] = []
        self._waiters: dict[tuple[str, int, int], ThreadPoolExecutor] = {}

    def begin(self, instruction: Instruction) -> None:
        # An action starts when the compute queue is free and the gradient is there that another queue may wait for.
        entry = [instruction.entry] if isinstance(instruction, Run) and instruction.entry != "compute" else []
        self._begun = self._clock.now("compute", *entry)

    def end(self, instruction: Instruction) -> None:
        if isinstance(instruction, Run):
            self._actions.append((instruction, self._begun, self._clock.now("compute")))
        elif isinstance(instruction, Wait):
            self._actions.append((instruction, self._begun, self._clock.now("compute", instruction.queue)))

    def node(self, of: Node) -> Callable[[], None]:
        if self._nodes and self._nodes[-1][0] == of and self._nodes[-1][2]:
            end = self._nodes[-1][2]  # the next piece of the same node
            end.clear()
        else:
            end = []
            self._nodes.append((of, self._clock.now(), end))
        return lambda: end.append(self._clock.now())

    @contextmanager
    def attached(self, mailbox: Mailbox) -> Iterator[None]:
        """In this block the transfers of `mailbox` are recorded."""
        mailbox.tracker = lambda message, kind, work: self._track(message, kind, work, mailbox.host_waits)
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
        for node, start, ends in self._nodes:
            on: Literal["high", "node"] = "high" if node.queue == "high" else "node"
            spans.append(Span(self._rank, on, ms(start), ms(ends[0]), str(node), *node[:4]))
        for queue, m, start, done in self._messages:
            spans.append(Span(self._rank, queue, ms(start), ms(done.result()), f"{m.kind} {m.stage}.{m.microbatch}", *m[:4]))
        return spans

    def _track(self, message: tuple, kind: Literal["send", "recv"], work: dist.Work, host_waits: bool = False) -> dist.Work:
        """Notes when a transfer ends. gloo tells only who waits for it: a thread per edge and direction does, in order."""
        key = (kind, *message[4:6])
        waiter = self._waiters.setdefault(key, ThreadPoolExecutor(1, thread_name_prefix="trace"))
        done: Future[Any] = waiter.submit(self._clock.after, work, key)
        self._messages.append((kind, message, self._clock.now(), done))  # type: ignore[arg-type]
        return _Tracked(done) if host_waits else work  # type: ignore[return-value]


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


def save_step(recorder: Recorder, program: Program, step: int, folder: Path, position: tuple[int, int], *, recompute: bool) -> None:
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
        recording = Recording(title, schedule, recompute, spans, step, pipeline, recorder.device.type)
        recording.save(folder / f"{name}.json")
