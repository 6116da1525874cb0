"""Queues that work is issued to: CUDA streams with priorities on a GPU; on a CPU, an executor that makes their order observable.

Work of one queue runs in order of issue. Between queues only events order: `wait(event)` holds back what is issued afterwards until
all that was issued before the event has ended.

On a CPU there is nothing to run beside the host. There a queue other than `compute` does its work as late as the rules allow:
when somebody waits for an event that covers it. Whoever forgets to wait finds nothing, each time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import torch

Work = Callable[[], Callable[[], None] | None]


class Queue(Protocol):
    """What pieces of work are issued to."""

    ahead: bool  # whether the host issues work long before it runs, as on CUDA

    def run(self, work: Work) -> None:
        """Issues `work`. What it returns, if anything, ends it: a transfer starts at once and ends in its place in the queue."""

    def event(self) -> Any:
        """An event of all that was issued so far."""

    def wait(self, event: Any) -> None:
        """What is issued from now on starts after `event`, which may be of any queue."""

    def push(self) -> None:
        """From here on what was issued goes on without being waited for."""

    def hold(self, tensor: torch.Tensor) -> None:
        """Called by work that uses a tensor of another queue: its memory is not used again before that work has ended."""

    def beside(self, name: Hashable) -> Queue:
        """A queue on the same device for what the host itself need not wait for; made once, then the same for the same name."""


class CudaQueue:
    """A CUDA stream. The host runs ahead; `run` returns when the kernels are launched."""

    ahead = True

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        # Kept: streams come from a pool of 32, and two queues that got the same one would wait for each other.
        self._beside: dict[Hashable, CudaQueue] = {}

    def run(self, work: Work) -> None:
        with torch.cuda.stream(self._stream):
            end = work()
            if end is not None:
                end()

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        self._stream.wait_event(event)

    def push(self) -> None:
        """Kernels are on their way as soon as they are launched."""

    def hold(self, tensor: torch.Tensor) -> None:
        if tensor.is_cuda:  # messages may lie in host memory
            tensor.record_stream(self._stream)

    def beside(self, name: Hashable) -> CudaQueue:
        if name not in self._beside:
            self._beside[name] = CudaQueue(torch.cuda.Stream(self._stream.device))
        return self._beside[name]


class HostEvent:
    """All that a host queue had been given when the event was made."""

    def __init__(self, queue: HostQueue, count: int) -> None:
        self._queue, self._count = queue, count

    def finish(self) -> None:
        """Does what is left of it."""
        self._queue.advance(self._count)


class HostQueue:
    """Runs on the host's thread.

    late: work waits until an event that covers it is waited for; otherwise it is done, or a transfer is started, when issued.
    """

    ahead = False

    def __init__(self, late: bool) -> None:
        self._late = late
        self._pending: deque[tuple[int, Work]] = deque()
        self._issued = 0

    def run(self, work: Work) -> None:
        end = work if self._late else work()
        self._issued += 1
        if end is not None:
            self._pending.append((self._issued, end))

    def event(self) -> HostEvent:
        return HostEvent(self, self._issued)

    def wait(self, event: HostEvent) -> None:
        if self._late:
            self.run(event.finish)
        else:
            event.finish()

    def push(self) -> None:
        self.advance(self._issued)

    def hold(self, tensor: torch.Tensor) -> None:
        """Memory of the host is not used again while anything refers to it."""

    def beside(self, name: Hashable) -> HostQueue:
        return HostQueue(late=False)  # it keeps nothing between two uses

    def advance(self, count: int) -> None:
        """Does what was issued up to number `count`."""
        while self._pending and self._pending[0][0] <= count:
            end = self._pending.popleft()[1]()
            while end is not None:
                end = end()


class IssueQueue:
    """Everything is done when it is issued, the end of a transfer too: in the order in which CUDA is given its work, so that memory
    is taken and given back as there. For dry runs."""

    ahead = True

    def run(self, work: Work) -> None:
        end = work()
        while end is not None:
            end = end()

    def event(self) -> None:
        """What was issued is done."""

    def wait(self, event: None) -> None:
        """So is what is waited for."""

    def push(self) -> None:
        """Nothing is left to do."""

    def hold(self, tensor: torch.Tensor) -> None:
        """Memory is not used again while anything refers to it."""

    def beside(self, name: Hashable) -> IssueQueue:
        return self


def join(queues: Mapping[str, Queue]) -> None:
    """What is issued to `compute` from now on starts after all that the other queues were given."""
    for queue in queues.values():
        if queue is not queues["compute"]:
            queues["compute"].wait(queue.event())


def make_queues(device: torch.device) -> dict[str, Queue]:
    """`compute` (on CUDA, the current stream), `high` and `communication` for one rank."""
    if device.type == "cuda":
        _, highest = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        return {
            "compute": CudaQueue(torch.cuda.current_stream(device)),
            "high": CudaQueue(torch.cuda.Stream(device, priority=highest)),
            "communication": CudaQueue(torch.cuda.Stream(device, priority=highest)),
        }
    return {"compute": HostQueue(late=False), "high": HostQueue(late=True), "communication": HostQueue(late=False)}
