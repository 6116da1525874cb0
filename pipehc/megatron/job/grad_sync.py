"""How a job's DDP takes part in our schedules: gradients are summed when the last one is there, parameters before their use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from pipehc.comm.queues import Queue, join
from pipehc.megatron.buckets import BucketReduction
from pipehc.model.reduction import EarlyReduction
from pipehc.schedules import Program


def reduces_early(chunk: nn.Module) -> bool:
    """Whether the job wants reductions to run beside the backward."""
    return isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_grad_reduce


@contextlib.contextmanager
def without_grad_sync(chunks: Sequence[Any], config: Any) -> Iterator[None]:
    """No gradient starts its reduction by being counted: with weight gradients deferred, the last one to come is not the last
    micro-batch's."""
    functions = config.no_sync_func
    if functions is None:
        functions = [c.no_sync for c in chunks if isinstance(c, DistributedDataParallel)]
    with contextlib.ExitStack() as stack:
        for function in functions if isinstance(functions, list) else [functions]:
            stack.enter_context(function())
        yield


def early_reduction(
    program: Program,
    rank: int,
    chunks: Mapping[tuple[int, int], Any],
    config: Any,
    reduction: BucketReduction,
    queues: Mapping[str, Queue],
) -> EarlyReduction:
    """Sums the gradients of a chunk when its last weight gradient is there: bucket by bucket, or by a function of the job's own."""
    functions = config.grad_sync_func
    if functions is not None and not isinstance(functions, list):
        functions = [functions] * len(chunks)
    if functions is not None and all(map(_is_megatrons, functions, chunks.values())):
        functions = None  # what --align-grad-reduce sets

    def start(held: tuple[int, int]) -> None:
        join(queues)  # gradients of hyper-connections come from other queues
        if functions is None:
            reduction.start(chunks[held])
        else:
            functions[list(chunks).index(held)](chunks[held].parameters())

    def expect(held: tuple[int, int]) -> None:
        if functions is None:
            join(queues)
            reduction.expect_last(chunks[held])

    reduction.forget()
    return EarlyReduction(program, rank, start, expect)


def refuse_param_sync(chunks: Sequence[Any], config: Any) -> None:
    """ValueError for a param_sync_func of the job's own, which is not called."""
    functions = config.param_sync_func or []
    for function in functions if isinstance(functions, list) else [functions]:
        if not any(_is_megatrons(function, chunk, "start_param_sync") for chunk in chunks):
            raise ValueError(
                f"param_sync_func = {function!r}: is not called under our schedules, which start the gathers of Megatron's DDP; "
                "set None"
            )


def _is_megatrons(function: Any, chunk: Any, name: str = "start_grad_sync") -> bool:
    return getattr(function, "__self__", None) is chunk and getattr(function, "__name__", "") == name


def start_gathers(chunks: Sequence[Any]) -> None:
    """Starts overlapped parameter gathers that are still to come, chunk by chunk: in the same order on all replicas."""
    for group in (group for chunk in chunks for group in _gathering(chunk)):
        if not group.param_gather_dispatched:
            group.start_param_sync()


def finish_gathers(chunk: Any) -> None:
    """Before a chunk's first forward: our nodes use parameters without asking the modules that own them."""
    for group in _gathering(chunk):
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def _gathering(chunk: Any) -> list[Any]:
    if not isinstance(chunk, DistributedDataParallel) or not chunk.remove_forward_pre_hook_handles:
        return []
    return list(chunk.bucket_groups + chunk.expert_parallel_bucket_groups)
