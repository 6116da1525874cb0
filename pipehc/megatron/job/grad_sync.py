"""How a job's DDP takes part in our schedules: gradients are summed when the last one is there, parameters before their use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from pipehc.megatron.buckets import BucketReduction
from pipehc.model.reduction import EarlyReduction
from pipehc.schedules import Program


def as_list(functions: Any, chunks: int = 1) -> list[Any]:
    """Megatron's options take None, a function for all of `chunks`, or one for each; an empty list for None."""
    if functions is None:
        return []
    return list(functions) if isinstance(functions, list) else [functions] * chunks


def reduces_early(chunk: nn.Module) -> bool:
    """Whether the job wants reductions to run beside the backward."""
    return isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_grad_reduce


@contextlib.contextmanager
def without_grad_sync(chunks: Sequence[Any], config: Any) -> Iterator[None]:
    """No gradient starts its reduction by being counted: with weight gradients deferred, the last one to come is not the last
    micro-batch's."""
    functions = [chunk.no_sync for chunk in chunks if isinstance(chunk, DistributedDataParallel)]  # whatever the job's own does
    functions += as_list(config.no_sync_func)
    with contextlib.ExitStack() as stack:
        for function in functions:
            stack.enter_context(function())
        yield


def early_reduction(
    program: Program,
    rank: int,
    chunks: Mapping[tuple[int, int], Any],
    config: Any,
    reduction: BucketReduction,
) -> EarlyReduction:
    """Sums the gradients of a chunk when its last weight gradient is there: bucket by bucket, or by a function of the job's own."""
    functions = as_list(config.grad_sync_func, len(chunks))
    if all(map(_is_megatrons, functions, chunks.values())):
        functions = []  # what --align-grad-reduce sets

    def start(held: tuple[int, int]) -> None:
        chunk = chunks[held]
        reduction.start(chunk, partial(functions[list(chunks).index(held)], chunk.parameters()) if functions else None)

    def expect(held: tuple[int, int]) -> None:
        if not functions:
            reduction.expect_last(chunks[held])

    return EarlyReduction(program, rank, start, expect)


def refuse_param_sync(chunks: Sequence[Any], config: Any) -> None:
    """ValueError for a param_sync_func of the job's own, which is not called."""
    for function in as_list(config.param_sync_func):
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
