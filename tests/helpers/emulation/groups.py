"""Process groups that behave like NCCL's: a call launches, on a stream of the group; a message occupies it until both sides are
there. What they carry goes over gloo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.utils._pytree import tree_map_only

from emulation.device import Event, Stream
from emulation.launch import Launches

current: Launches | None = None
"""The device of this process; None: groups carry things at once, as gloo does."""


class Work(dist.Work):
    """As NCCL's: to wait makes the current stream wait, not the host. Keeps tensors until then."""

    def __init__(self, launches: Launches, event: Event, tensors: Any) -> None:
        super().__init__()
        self._launches, self._event, self._tensors = launches, event, tensors

    def wait(self, timeout: Any = None) -> bool:
        self._launches.device.wait(self._launches.device.current, self._event)
        self._tensors = None
        return True

    def is_completed(self) -> bool:
        return self._event.done


class HostWork(dist.Work):
    """Without a device: gloo's."""

    def __init__(self, started: Sequence[Any]) -> None:
        super().__init__()
        self._started = started

    def wait(self, timeout: Any = None) -> bool:
        _end(self._started)
        return True


class Group(dist.ProcessGroup):
    """A group of NCCL's kind, whose messages gloo carries."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._stream: tuple[Launches, Stream] | None = None

    def getBackendName(self) -> str:
        return "emulated"

    def _call(self, name: str, run: Callable[..., Any], *tensors: Any) -> dist.Work:
        """run: starts transfers of gloo's over the tensors, and returns their handles and functions that end them."""
        launches = current
        if launches is None or not launches.device.active:
            return HostWork(_list(run(*tensors)))
        device = launches.device
        if self._stream is None or self._stream[0] is not launches:
            self._stream = launches, device.stream(f"group of {self.size()}: {name}")
        stream = self._stream[1]
        device.wait(stream, device.current.event())
        later = tree_map_only(torch.Tensor, launches.memory.alias, tensors)
        started: list[Any] = []

        def attempt() -> bool:
            if not started:
                started.extend(_list(run(*later)))
            if not all(callable(work) or work.is_completed() for work in started):
                return False
            _end(started)
            return True

        device.issue(stream, name, attempt)
        return Work(launches, stream.event(), tensors)

    # A message is a sum over both sides: it goes through when both are there, and its bits stay as they are.

    def send(self, tensors: list[torch.Tensor], target: int, tag: int = 0) -> dist.Work:
        return self._call("send", lambda given: self._message([_bits(t).clone() for t in given]), tensors)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> dist.Work:
        return self._call("recv", lambda given: self._message([_bits(t).zero_() for t in given]), tensors)

    def _message(self, bits: list[torch.Tensor]) -> list[Any]:
        assert self.size() == 2, "messages go over groups of two"
        return [self._gloo.allreduce([each]) for each in bits]

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        opts = opts or c10d.AllreduceOptions()
        return self._call("allreduce", lambda given: [self._gloo.allreduce([t], opts) for t in given], tensors)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        each = c10d.AllreduceOptions()
        if opts is not None:
            each.reduceOp = opts.reduceOp
        return self.allreduce(tensors, each)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        return self._call("broadcast", lambda given: self._gloo.broadcast(given, opts), tensors)

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        return self._call("reduce", lambda given: self._gloo.reduce(given, opts), tensors)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        return self._call("allgather", lambda o, i: self._gloo.allgather(o, i, opts or c10d.AllgatherOptions()), outputs, inputs)

    def _allgather_base(self, output: torch.Tensor, given: torch.Tensor, opts: Any = None) -> dist.Work:
        def run(o: torch.Tensor, i: torch.Tensor) -> Any:
            return self._gloo.allgather([[*o.view(-1).chunk(self.size())]], [i.reshape(-1)], c10d.AllgatherOptions())

        return self._call("allgather", run, output, given)

    def _reduce_scatter_base(self, output: torch.Tensor, given: torch.Tensor, opts: Any = None) -> dist.Work:
        return self.reduce_scatter_single_coalesced([output], [given], opts)

    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        """The sum of all, of which each keeps its part: gloo's own can only be waited for, not asked."""
        each = c10d.AllreduceOptions()
        if opts is not None:
            each.reduceOp = opts.reduceOp

        def run(o: Any, i: Any) -> Any:
            sums = [given.clone() for given in i]

            def end() -> None:
                for target, total in zip(o, sums):
                    target.view(-1).copy_(total.view(-1).chunk(self.size())[self.rank()])

            return [*(self._gloo.allreduce([total], each) for total in sums), end]

        return self._call("reduce_scatter", run, outputs, inputs)

    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        def run(o: Any, i: Any) -> Any:
            return [self._gloo.allgather([[*a.view(-1).chunk(self.size())]], [b.reshape(-1)]) for a, b in zip(o, i)]

        return self._call("allgather", run, outputs, inputs)

    def alltoall_base(self, output: torch.Tensor, given: torch.Tensor, received: Any, sent: Any, opts: Any = None) -> dist.Work:
        def run(o: torch.Tensor, i: torch.Tensor) -> Any:
            return self._gloo.alltoall_base(o, i, received, sent, opts or c10d.AllToAllOptions())

        return self._call("all_to_all", run, output, given)

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        return self._call("gather", lambda o, i: self._gloo.gather(o, i, opts), outputs, inputs)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        return self._call("scatter", lambda o, i: self._gloo.scatter(o, i, opts), outputs, inputs)

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._call("barrier", lambda t: self._gloo.allreduce([t]), torch.zeros(1))

    all_gather_single, reduce_scatter_single, all_to_all_single = _allgather_base, _reduce_scatter_base, alltoall_base


def _list(works: Any) -> Sequence[Any]:
    return works if isinstance(works, list) else [works]


def _end(works: Sequence[Any]) -> None:
    for work in works:
        if callable(work):
            work()
        else:
            work.wait()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Flat, and with its memory."""
    return tensor.view(-1).view(torch.uint8)


def register() -> None:
    """Makes `emulated` a backend."""
    if not hasattr(dist.Backend, "EMULATED"):
        dist.Backend.register_backend("emulated", Group, devices=["cpu"])
