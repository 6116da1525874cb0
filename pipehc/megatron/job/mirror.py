"""Two replicas of every stage (DualPipe): the groups that sum their gradients, and what keeps the replicas one model.

Ranks r and P-1-r of a pipeline hold the same two stages. Data parallelism and mirror are one group for gradients and optimizer
state; for batches and losses Megatron's own groups stay what they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.utils import unwrap_model
from torch import nn

from pipehc.megatron.job.position import exchanged
from pipehc.schedules import Placement


@contextmanager
def gradient_groups(placement: Placement) -> Iterator[None]:
    """Inside, Megatron's data-parallel groups span the replicas of a stage: build DDP and the optimizer here. Collective.

    With one lane nothing changes.
    """
    if placement.lanes == 1:
        yield
        return
    with exchanged(mirrored_groups(parallel_state.get_pipeline_model_parallel_group())):
        yield


def mirrored_groups(pipeline: dist.ProcessGroup) -> dict[Any, Any]:
    """Each data-parallel group of Megatron's parallel state -> its union with that of the mirrored pipeline rank. Collective."""
    return _mirrored_groups(pipeline)


@lru_cache
def _mirrored_groups(pipeline: dist.ProcessGroup) -> dict[Any, Any]:
    own = {
        name: value
        for name, value in sorted(vars(parallel_state).items())
        if "DATA_PARALLEL_GROUP" in name and isinstance(value, dist.ProcessGroup)
    }
    ranks = {name: dist.get_process_group_ranks(value) for name, value in own.items()}
    mirror = dist.get_process_group_ranks(pipeline)[::-1][pipeline.rank()]
    everyone = gathered((ranks, mirror))
    made: dict[tuple[str, tuple[int, ...]], Any] = {}
    found: dict[Any, Any] = {}
    for name, value in own.items():
        backend = dist.get_backend(value)
        unions = [tuple(sorted({*of[name], *everyone[other][0][name]})) for of, other in everyone]
        for union in sorted(set(unions)):
            if (backend, union) not in made:  # one group for equal ranks: Megatron has several names for one group
                made[backend, union] = dist.new_group(list(union), backend=backend)
        found[value] = made[backend, unions[dist.get_rank()]]
    return found


def gathered(own: Any) -> list[Any]:
    """What every rank of the world has. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def equalize(chunks: Sequence[nn.Module], held: Sequence[tuple[int, int]]) -> None:
    """Gives both replicas of each stage the weights and buffers of lane 0. Collective over the pipeline.

    chunks: of this rank, on its device; held: the (lane, stage) of each.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(pipeline)
    mirror = ranks[::-1][pipeline.rank()]
    for chunk, (lane, _) in sorted(zip(chunks, held), key=lambda pair: pair[1][1]):
        with torch.no_grad():
            for tensor in [*chunk.parameters(), *chunk.buffers()]:
                if lane == 0:
                    dist.send(tensor.detach().contiguous(), mirror, group=pipeline)
                else:
                    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                    dist.recv(received, mirror, group=pipeline)
                    tensor.copy_(received)


def count_once(chunks: Sequence[Any], held: Sequence[tuple[int, int]], config: Any) -> None:
    """For DDP-wrapped chunks, before the optimizer is built: gradients are averaged over data parallelism alone, and the norm
    counts one replica."""
    for chunk, (lane, _) in zip(chunks, held):
        chunk.counts_replicas_once = True
        if not config.calculate_per_token_loss:
            # DDP divides by the size of its group, of which the mirror is half: the two replicas see different micro-batches.
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                buffer.gradient_scaling_factor *= 2
                for bucket in buffer.buckets:
                    bucket.gradient_scaling_factor *= 2
        if lane == 1 and not chunk.ddp_config.use_distributed_optimizer:  # which gives every element one owner
            for parameter in chunk.parameters():
                parameter.shared = True


class Counted:
    """A model chunk to functions that ask for its parameters and sum over the job: those that no other replica answers for."""

    def __init__(self, chunk: nn.Module, lane: int, sharded: bool) -> None:
        self._chunk, self._lane, self._sharded = chunk, lane, sharded

    def parameters(self) -> Iterator[nn.Parameter]:
        for parameter in self._chunk.parameters():
            if self._lane == 0 or (self._sharded and getattr(parameter, "main_param_sharded", False)):
                yield parameter


def counted_once(chunks: Sequence[nn.Module], held: Sequence[tuple[int, int]], sharded: bool) -> list[Counted]:
    """Stands in for the chunks of a rank. sharded: the distributed optimizer's shards will be asked for, each of which there is
    once, instead of the parameters, of which each replica has all."""
    return [Counted(chunk, lane, sharded) for chunk, (lane, _) in zip(chunks, held, strict=True)]


def save_once(chunks: Sequence[nn.Module], held: Sequence[tuple[int, int]]) -> None:
    """A checkpoint holds one replica of each stage, that of lane 0: in whatever wrappers, for training or evaluation."""
    for chunk, (lane, _) in zip(chunks, held, strict=True):
        if lane == 1:
            _keep_out_of_checkpoints(chunk)


def _keep_out_of_checkpoints(chunk: Any) -> None:
    """Marks all that the chunk gives to checkpoints as a replica: loaded, but not saved."""
    model = unwrap_model(chunk)
    original = model.sharded_state_dict

    def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        for value in nested_values(found):
            if isinstance(value, ShardedBase):
                replica = value.replica_id if isinstance(value.replica_id, tuple) else (0, 0, value.replica_id)
                value.replica_id = (1, *replica[1:])
        return found

    model.sharded_state_dict = sharded_state_dict
