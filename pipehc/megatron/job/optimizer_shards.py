"""The distributed optimizer's state in checkpoints: by the names of parameters where stages are not where Megatron has them."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from pipehc.megatron.job.source import ScheduleSource
from pipehc.schedules import Placement

FLAG = "--dist-ckpt-optim-fully-reshardable"


def moves_stages(placement: Placement) -> bool:
    """Whether a stage is on another rank than in Megatron's own layouts, or on two."""
    return any(rank != stage % placement.ranks for lane in placement.table for stage, rank in enumerate(lane))


def saved_by_name[Optimizer: Any](optimizer: Optimizer, source: ScheduleSource) -> Optimizer:
    """`optimizer`, which then neither saves nor loads state in shards that go by the pipeline ranks of another layout.

    How a checkpoint's shards go is written in it, and no option of the job that loads it changes that: ValueError, on every rank,
    says what does.
    """
    if not moves_stages(source.placement(parallel_state.get_pipeline_model_parallel_world_size())):
        return optimizer
    original = optimizer.sharded_state_dict

    def sharded_state_dict(*args: Any, metadata: Any = None, **given: Any) -> Any:
        kind = (metadata or {}).get("distrib_optim_sharding_type")
        if kind is not None and kind not in DistributedOptimizer.checkpoint_fully_reshardable_formats:
            raise ValueError(
                f"--load: the checkpoint has optimizer state in shards by pipeline ranks ({kind}), which schedule = "
                f"{source.name!r} places elsewhere: load and save it once with the job as it was, without pipehc.megatron.enable, "
                f"and with {FLAG}; or start from its weights, with --no-load-optim"
            )
        return original(*args, metadata=metadata, **given)

    optimizer.sharded_state_dict = sharded_state_dict
    return optimizer
