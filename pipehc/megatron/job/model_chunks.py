"""Builds the model chunks of a rank for our placements, from the model provider of an existing job."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.utils import get_model_config, unwrap_model
from torch import nn

from pipehc.megatron.job.flags import LAYOUT
from pipehc.megatron.job.hybrid import building
from pipehc.megatron.job.mirror import count_once, equalize, gradient_groups, save_once
from pipehc.megatron.job.models import HybridModel
from pipehc.megatron.job.position import acting_at, held_stages, megatron_place
from pipehc.megatron.job.prediction import predicting
from pipehc.megatron.job.refusals import (
    DDP_OPTIONS,
    refuse_model,
    refuse_options,
    refuse_placement,
    refuse_values,
    refusing_everywhere,
)
from pipehc.megatron.job.source import source_of
from pipehc.megatron.job.spec import Residual, converted_once, residual_settings
from pipehc.megatron.job.tied import tie, tied_on_ranks
from pipehc.schedules import Placement


def build_model_chunks(
    model_provider: Callable[..., nn.Module], schedule: Any = "dualpipe", *, residual: Residual | None = None, **search: Any
) -> list[nn.Module]:
    """This rank's chunks for the placement of `schedule`, by stage, on its device; replicas start equal. Collective.

    Args:
        model_provider: the job's own; called with pre_process, post_process and vp_stage, and with config (None) and pg_collection
            if it takes them, once for each chunk, while Megatron's parallel state places this process where the stage would be.
        schedule, search: as for `forward_backward_func`.
        residual: turn the decoder into its hyper-connection form (see `hyper_connection_layer_spec`); None: as the provider has it.

    Raises:
        ValueError: for models and options that the schedule cannot run, naming the option and the remedy.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    source = source_of(schedule, search)
    return build_chunks(model_provider, source.placement(pipeline.size()), residual, ours=source.name != "megatron")


def build_chunks(
    model_provider: Callable[..., nn.Module],
    placement: Placement,
    residual: Residual | None,
    *,
    ours: bool = True,
    **provider_arguments: Any,
) -> list[nn.Module]:
    """`build_model_chunks` for a placement. ours: our schedules will run them, not Megatron's. provider_arguments: handed to the
    provider as far as it takes them."""
    refuse_placement(placement, parallel_state.get_virtual_pipeline_model_parallel_world_size())
    held = held_stages(placement, parallel_state.get_pipeline_model_parallel_group().rank())
    settings = None if residual is None else residual_settings(residual)
    with refusing_everywhere():
        chunks = _build(model_provider, placement, held, settings, ours, provider_arguments)
    if placement.lanes == 2:
        equalize(chunks, held)
        save_once(chunks, held)
    tie(chunks, held, placement)
    return chunks


def _build(
    model_provider: Callable[..., nn.Module],
    placement: Placement,
    held: Sequence[tuple[int, int]],
    settings: Residual | None,
    ours: bool,
    provider_arguments: dict[str, Any],
) -> list[nn.Module]:
    built: dict[tuple[int, int], nn.Module] = {}
    for lane, stage in sorted(held):
        position, vp_stage = megatron_place(placement, stage)
        # The second replica gets the weights of the first: it draws no numbers that the job as it was would not have drawn.
        drawing = nullcontext() if lane == 0 else _random_state_kept()
        with acting_at(position) as group, tied_on_ranks(placement), _converted(settings), drawing:
            collection = ProcessGroupCollection.use_mpu_process_groups()
            collection.pp = group
            ends = {"pre_process": stage == 0, "post_process": stage + 1 == placement.stages}
            chunk = _call(model_provider, **ends, vp_stage=vp_stage, pg_collection=collection, **provider_arguments)
        model = unwrap_model(chunk)
        refuse_model(model, placement)
        if (ours or settings is not None) and not model.decoder.layers:
            raise ValueError(f"stage {stage}: has no transformer layers, every stage needs one; change {LAYOUT}")
        if ours:
            refuse_options(get_model_config(model))
        # The decoder keeps the position that its layers are numbered by; the training loop asks the model who it is.
        model.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        chunk.model_type = ModelType.encoder_or_decoder  # type: ignore[assignment]
        if vp_stage is not None:
            chunk.vp_stage = vp_stage  # type: ignore[assignment]
        built[lane, stage] = chunk.cuda(torch.cuda.current_device()) if torch.cuda.is_available() else chunk
    return [built[place] for place in held]


def wrap_model_chunks(
    chunks: Sequence[nn.Module], ddp_config: DistributedDataParallelConfig, schedule: Any = "dualpipe", **search: Any
) -> list[DistributedDataParallel]:
    """The chunks in Megatron's DDP, whose groups span the replicas of a stage. Collective.

    Build the optimizer inside `gradient_groups_of` too. schedule, search: as for `build_model_chunks`. Raises ValueError for FSDP
    and several optimizer instances.
    """
    refuse_values(ddp_config, DDP_OPTIONS, "wrap_model_chunks")
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    placement = source_of(schedule, search).placement(pipeline.size())
    held = held_stages(placement, pipeline.rank())
    config = get_model_config(chunks[0])
    with gradient_groups(placement):
        wrapped = []
        for i, (chunk, (_, stage)) in enumerate(zip(chunks, held)):
            with acting_at(megatron_place(placement, stage)[0]):  # DDP cuts buckets by position: both replicas the same
                wrapped.append(DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=placement.lanes == 1 and i > 0))
    if placement.lanes == 2:
        count_once(wrapped, held, config)
    return wrapped


@contextmanager
def gradient_groups_of(schedule: Any = "dualpipe", **search: Any) -> Iterator[None]:
    """Build the optimizer inside: its groups then span the replicas of a stage. Collective."""
    size = parallel_state.get_pipeline_model_parallel_world_size()
    with gradient_groups(source_of(schedule, search).placement(size)):
        yield


def _call(model_provider: Callable[..., Any], **arguments: Any) -> Any:
    """Calls a provider with what it takes: config and pg_collection are newer than pre_process, post_process and vp_stage."""
    taken = inspect.signature(model_provider).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        arguments = {name: value for name, value in arguments.items() if name in taken}
    return model_provider(**arguments)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    tracker.set_states(states)


@contextmanager
def _converted(residual: Residual | None) -> Iterator[None]:
    """Inside, decoders and the layers of multi-token prediction are built in their hyper-connection form, if there is a residual; a
    HybridModel where it acts."""
    originals = [(owner, owner.__init__) for owner in (TransformerBlock, HybridModel, MultiTokenPredictionLayer)]
    original = TransformerBlock.__init__

    def init(self: Any, config: Any, spec: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, spec if residual is None else converted_once(spec, residual), *args, **kwargs)

    TransformerBlock.__init__ = init
    HybridModel.__init__ = building(residual)(HybridModel.__init__)
    if residual is not None:
        MultiTokenPredictionLayer.__init__ = predicting(residual)(MultiTokenPredictionLayer.__init__)
    try:
        yield
    finally:
        for owner, constructor in originals:
            owner.__init__ = constructor
