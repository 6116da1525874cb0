"""The model chunks of a job of megatron.training, in the wrappers that Megatron itself puts around them.

Megatron makes them in one of two ways, from a model provider (`get_model`) or from a configuration of the model, whose builder has
settings of its own. Both build and wrap in one go; here they are given chunks that are there already.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import nn

from pipehc.megatron.job.mirror import count_once, gradient_groups, mirrored_groups
from pipehc.megatron.job.model_chunks import build_chunks
from pipehc.megatron.job.position import acting_at, held_stages, megatron_place
from pipehc.megatron.job.refusals import DDP_OPTIONS, refuse_values
from pipehc.megatron.job.source import ScheduleSource
from pipehc.megatron.job.spec import Residual

Wrap = Callable[[Callable[..., nn.Module], Any], list[Any]]
"""Given a provider of a chunk that is there, and the process groups as it sees them (None: Megatron's own): in its wrappers."""


def wrapped_chunks(
    source: ScheduleSource, residual: Residual | None, provider: Callable[..., nn.Module], wrap: Wrap, groups: Any, **given: Any
) -> list[Any]:
    """This rank's chunks for the placement of `source`, by stage. Collective.

    groups: what the job gave, or None. given: handed to the provider as far as it takes them.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    placement = source.placement(pipeline.size())
    held = held_stages(placement, pipeline.rank())
    chunks = build_chunks(provider, placement, residual, ours=source.name != "megatron", **given)
    if placement.lanes == 1:
        return list(wrap(lambda *_, vp_stage=None, **__: chunks[vp_stage or 0], groups))
    wrapped = []
    with gradient_groups(placement):
        for (_, stage), chunk in zip(held, chunks):
            with acting_at(megatron_place(placement, stage)[0]) as acting:
                seen = None if groups is None else _exchanged(groups, mirrored_groups(pipeline) | {pipeline: acting})
                wrapped += wrap(lambda *_, _chunk=chunk, **__: _chunk, seen)
    if hasattr(wrapped[0], "ddp_config"):
        for chunk in wrapped:  # the optimizer wants one; --ddp-num-buckets made a bucket size for each
            chunk.ddp_config = wrapped[0].ddp_config
        count_once(wrapped, held, get_model_config(wrapped[0]))
    return wrapped


class OurModelConfig:
    """In the place of a configuration of Megatron's models: its builder makes our chunks, and wraps them by its own settings."""

    def __init__(self, model_config: Any, source: ScheduleSource, residual: Residual | None) -> None:
        hooks = [name for name in ("pre_wrap_hooks", "post_wrap_hooks") if getattr(model_config, name, None)]
        if hooks:
            raise ValueError(f"{hooks[0]}: not supported; apply them in a model_provider")
        self._builder = model_config.get_builder_cls()(model_config)
        self._source, self._residual = source, residual

    def get_builder_cls(self) -> Callable[[Any], Any]:
        return lambda _: self

    def build_distributed_models(self, pg_collection: Any = None, ddp_config: Any = None, **settings: Any) -> list[Any]:
        """The builder's own, over chunks that are there."""
        refuse_values(ddp_config, DDP_OPTIONS, f"pipehc.megatron with schedule {self._source.name}")

        def wrap(chunk_of: Callable[..., nn.Module], groups: Any) -> list[Any]:
            builder = copy.copy(self._builder)
            builder.build_model = chunk_of
            chunks: list[Any] = builder.build_distributed_models(pg_collection=groups, ddp_config=ddp_config, **settings)
            return chunks

        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        return wrapped_chunks(self._source, self._residual, self._provider, wrap, groups)

    def _provider(
        self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, pg_collection: Any = None
    ) -> nn.Module:
        given = {"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage}
        taken = inspect.signature(self._builder.build_model).parameters
        model: nn.Module = self._builder.build_model(pg_collection, **{name: given[name] for name in given if name in taken})
        return model


def _exchanged(groups: Any, others: dict[Any, Any]) -> Any:
    """A collection with the groups on the right for those on the left."""
    found = copy.copy(groups)
    for name, group in vars(groups).items():
        if group is not None and not isinstance(group, list) and group in others:
            setattr(found, name, others[group])
    return found
