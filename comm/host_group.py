"""Process groups whose collectives all go through host memory: gloo's, for tensors of any device.

gloo takes tensors of CUDA in some collectives and versions only, and NCCL refuses two ranks on one GPU. So every tensor is copied
to the host, exchanged there, and copied back; on a CPU too, from host memory to host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only

from pipehc.comm.host_memory import Mark, fetched, host_memory

HOST = "pipehc_host"
"""The backend's name: what `init_process_group` takes after `register`, and `get_backend` returns."""

_FILLED = (
    "allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced", "all_gather_single",
    "all_gather_single_coalesced", "gather", "scatter", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single", "reduce_scatter_single_coalesced", "alltoall", "alltoall_base", "all_to_all_single", "recv",
    "recv_anysource",
)  # fmt: skip
"""Methods of a process group whose first argument is filled, under their names of all versions of torch."""

_CHANGED = "allreduce", "allreduce_coalesced", "broadcast", "reduce"
"""Those whose first argument is read, too."""

_SENT = ("send",)


class HostWork:
    """An exchange between hosts under way. As much of dist.Work as is used.

    results: pairs of host memory and the tensor that is to have it.
    """

    def __init__(self, work: dist.Work, results: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._work, self._results = work, results
        self._copied: list[Mark] | None = None

    def wait(self, *timeout: timedelta) -> bool:
        """The host waits for the exchange; then the current stream, and every other one that calls it, for the copy back."""
        if self._copied is None:
            self._work.wait(*timeout)
            with torch.no_grad():
                for host, tensor in self._results:
                    tensor.copy_(host, non_blocking=True)
            self._copied = [Mark(device) for device in {tensor.device for _, tensor in self._results}]
            self._results = []
        else:
            for mark in self._copied:
                mark.hold_stream()
        return True

    def is_completed(self) -> bool:
        return self._work.is_completed()


class HostGroup(dist.ProcessGroup):
    """A process group on top of `gloo`. Whoever issues a collective waits for what its stream was given before."""

    def __init__(self, gloo: dist.ProcessGroup) -> None:
        super().__init__(gloo.rank(), gloo.size())  # type: ignore[call-arg]  # of groups written in Python
        self._gloo = gloo

    def getBackendName(self) -> str:
        return HOST

    def barrier(self, *args: Any, **options: Any) -> dist.Work:
        return self._gloo.barrier(*args, **options)

    def shutdown(self) -> None:
        self._gloo.shutdown()

    def abort(self) -> None:
        self._gloo.abort()


def _exchange(name: str) -> Callable[..., HostWork]:
    """The method `name`, with the arguments that torch gives it: its results first, then what it reads, then options."""

    def exchange(self: HostGroup, results: Any, *args: Any, **options: Any) -> HostWork:
        targets = [] if name in _SENT else tree_leaves(results)
        if name in _FILLED:
            hosts = iter([host_memory(t.shape, t.dtype, t.device) for t in targets] + fetched(_tensors(args)))
        else:
            hosts = iter(fetched([*_tensors(results), *_tensors(args)]))
        own, *others = tree_map_only(torch.Tensor, lambda _: next(hosts), [results, *args])
        work = getattr(self._gloo, name)(own, *others, **options)
        return HostWork(work, list(zip(tree_leaves(own), targets)))

    return exchange


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


for _name in (*_FILLED, *_CHANGED, *_SENT):
    if hasattr(dist.ProcessGroup, _name):
        setattr(HostGroup, _name, _exchange(_name))


def register() -> None:
    """Makes HOST known to torch.distributed; a second call changes nothing."""
    if HOST not in dist.Backend.backend_list:
        dist.Backend.register_backend(HOST, _make, devices=["cpu", "cuda"])


def _make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> HostGroup:
    gloo = dist.ProcessGroup(store, rank, size)
    gloo._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    backend = dist.ProcessGroupGloo(store, rank, size, timeout)
    gloo._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return HostGroup(gloo)
