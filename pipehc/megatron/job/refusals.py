"""What cannot work together with our schedules, each with a reason and a remedy. Found before anything runs, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import unwrap_model

from pipehc.comm.handshake import first_problem
from pipehc.megatron.job.flags import LAYOUT, named, without
from pipehc.megatron.job.models import DECODERS
from pipehc.megatron.job.tied import is_tied, refuse_tied
from pipehc.megatron.layer import HyperConnectionLayer
from pipehc.schedules import Placement

CAPTURE = "a graph captures the order that our schedules change"
ORDER = "it relies on the order of Megatron's own schedules"
DEFERRED = "our schedules defer weight gradients themselves"
PAIRS = "our pairs overlap the all-to-alls themselves"
GATHERED = "weights would have to be gathered for every node"
CONTEXTS = "the nodes do not enter its contexts"

# option of Megatron's configuration -> (values that are fine, why not, remedy beside leaving it out)
OPTIONS: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "cuda_graph_impl": (("none", None), CAPTURE, ""),
    "enable_cuda_graph": ((False, None), CAPTURE, ""),
    "external_cuda_graph": ((False, None), CAPTURE, ""),
    "cpu_offloading": ((False, None), "it wraps the whole decoder", "recompute=True drops what is cheap to rebuild"),
    "fine_grained_activation_offloading": ((False, None), "it wraps the whole decoder", ""),
    "recompute_granularity": (
        (None, "selective"),
        "it runs whole layers again, while ours recomputes hyper-connections alone",
        "or set --recompute-granularity selective --recompute-modules core_attn (recompute_modules = ['core_attn'])",
    ),
    "overlap_moe_expert_parallel_comm": ((False, None), PAIRS, ""),
    "delay_wgrad_compute": ((False, None), DEFERRED, ""),
    "overlap_dispatch_backward_with_experts_wgrad": ((False, None), DEFERRED, ""),
    "defer_embedding_wgrad_compute": ((False, None), DEFERRED, ""),
    "variable_seq_lengths": ((False, None), "stage messages have one shape", "pad to seq_length"),
    "enable_autocast": ((False, None), "the nodes of the decoder run outside the forward step", "use --bf16 or --fp16"),
    "fp8": ((None,), CONTEXTS, "train in bf16, or use schedule = 'megatron'"),
    "fp4": ((None,), CONTEXTS, "train in bf16, or use schedule = 'megatron'"),
    "fp32_residual_connection": ((False, None), "stage messages have the dtype of the parameters", ""),
    "num_microbatches_with_partial_activation_checkpoints": (
        (None,),
        "how much is recomputed is a matter of the schedule",
        "recompute=True drops what is cheap to rebuild",
    ),
    "hybrid_context_parallel": ((False, None), "micro-batches must have one length", ""),
    "moe_shared_expert_overlap": ((False, None), PAIRS, ""),
    "moe_paged_stash": ((False, None), ORDER, ""),
    "moe_enable_routing_replay": ((False, None), ORDER, ""),
    "gtp_weight_remat_size": ((1, None), GATHERED, ""),
    "expert_gtp_weight_remat_size": ((1, None), GATHERED, ""),
    "heterogeneous_block_specs": ((False, None), "a layer may lack attention or FFN", "use equal layers"),
    "experimental_attention_variant": ((None,), "its layers may share state", "use standard attention or MLA"),
}


BUILD = (
    "build them with pipehc.megatron.build_model_chunks and wrap_model_chunks, or take a schedule with the stages where Megatron "
    "has them (1f1b, gpipe, zb_h1, interleaved)"
)


@contextmanager
def refusing_everywhere() -> Iterator[None]:
    """A ValueError raised inside, on any rank, is raised on every rank at the end: the first rank's. Collective."""
    problem = None
    try:
        yield
    except ValueError as error:
        problem = str(error)
    if (found := first_problem(problem)) is not None:
        raise ValueError(found)


def refuse_options(config: Any) -> None:
    """ValueError for the first option of Megatron's model configuration that our schedules cannot honour."""
    for name, (fine, reason, remedy) in OPTIONS.items():
        value = getattr(config, name, None)
        if value not in fine:
            remedies = "; ".join(filter(None, (without(name, fine[0]), remedy)))
            raise ValueError(f"{named(name, value)}: not supported under our schedules: {reason}; {remedies}")


# option of Megatron's DistributedDataParallelConfig -> (values that are fine, remedy beside leaving it out)
DDP_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_megatron_fsdp": ((False, None), "ours works with Megatron's DistributedDataParallel"),
    "use_custom_fsdp": ((False, None), "ours works with Megatron's DistributedDataParallel"),
    "num_distributed_optimizer_instances": ((1, None), ""),
}


def refuse_values(owner: Any, table: Mapping[str, tuple[tuple[Any, ...], str]], by: str) -> None:
    """ValueError for the first option in `table`, name -> (values that are fine, remedy beside leaving it out), that `by` does not
    support."""
    for name, (fine, remedy) in table.items():
        value = getattr(owner, name, None)
        if value not in fine:
            remedies = "; ".join(filter(None, (without(name, fine[0]), remedy)))
            raise ValueError(f"{named(name, value)}: not supported by {by}; {remedies}")


def refuse_call(config: Any, adjust_tensor_shapes_fn: Any, p2p_communicator: Any, pg_collection: Any) -> None:
    """ValueError for what a call of the forward-backward function asks and we do not do."""
    refuse_options(config)
    if adjust_tensor_shapes_fn is not None:
        raise ValueError(f"adjust_tensor_shapes_fn = {adjust_tensor_shapes_fn!r}: must be None: our stage messages have one shape")
    refuse_groups(p2p_communicator, pg_collection)


def refuse_groups(p2p_communicator: Any, pg_collection: Any) -> None:
    """ValueError for messages, or a pipeline, other than those that Megatron's schedules make of its parallel state by themselves.

    Megatron Bridge hands over those very ones.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise ValueError(
            "megatron.core.parallel_state: is not initialised; call initialize_model_parallel (in Megatron Bridge: "
            "dist.use_decentralized_pg = False)"
        )
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if p2p_communicator is not None and not (type(p2p_communicator) is P2PCommunicator and p2p_communicator.pp_group is pipeline):
        raise ValueError(
            f"p2p_communicator = {p2p_communicator!r}: must be None, or Megatron's P2PCommunicator over the pipeline group of its "
            "parallel state: stage messages go through ours"
        )
    if pg_collection is not None and getattr(pg_collection, "pp", pipeline) is not pipeline:
        raise ValueError("pg_collection.pp: must be the pipeline group of Megatron's parallel state")


def refuse_model(model: Any, placement: Placement) -> None:
    """ValueError for a model chunk that our schedules cannot take apart or place."""
    name = type(model).__name__
    if type(getattr(model, "decoder", None)) not in DECODERS:
        allowed = " or ".join(decoder.__name__ for decoder in DECODERS)
        raise ValueError(f"{name}: has no {allowed} as its decoder; use GPTModel or HybridModel")
    if getattr(model, "encoder", None) is not None and getattr(model, "add_encoder", False):
        raise ValueError(f"{name}: encoder-decoder models are not supported; use a decoder-only model")
    if getattr(model, "mtp_process", False) and not model.post_process:
        raise ValueError(f"{LAYOUT}: has multi-token prediction (m) on another stage than the last; put it before the loss (...mL)")
    if is_tied(model):
        refuse_tied(placement)


def refuse_places(
    chunks: Sequence[Any], held: Sequence[tuple[int, int]], placement: Placement, pipeline: dist.ProcessGroup
) -> None:
    """ValueError unless the chunks hold, stage by stage, the layers of the whole model in their order. Collective over `pipeline`.

    held: the (lane, stage) that each chunk of this rank is to run as.
    """
    own = {place: [layer.layer_number for layer in unwrap_model(chunk).decoder.layers] for place, chunk in zip(held, chunks)}
    everyone: list[dict[tuple[int, int], list[int]]] = [{} for _ in range(pipeline.size())]
    dist.all_gather_object(everyone, own, group=pipeline)
    layers = {place: numbers for found in everyone for place, numbers in found.items()}
    for lane in range(placement.lanes):
        following = 1
        for stage in range(placement.stages):
            numbers = layers[lane, stage]
            if numbers != list(range(following, following + len(numbers))):
                raise ValueError(
                    f"model: the chunk that runs as stage {stage} has layers {numbers}, it must begin with layer {following}: the "
                    f"chunks are not those of the schedule's placement; {BUILD}"
                )
            following += len(numbers)


def refuse_unconverted(chunks: Sequence[Any], residual: Any) -> None:
    """ValueError for chunks whose layers do not have the hyper-connections that were asked for. residual: None if none were."""
    for i, chunk in enumerate(chunks):
        layers = getattr(getattr(unwrap_model(chunk), "decoder", None), "layers", ())
        forms = [layer.residual if isinstance(layer, HyperConnectionLayer) else None for layer in layers]
        if residual is None or (forms and all(form == residual for form in forms)):
            continue
        found = ", ".join(sorted({"plain" if form is None else form.kind for form in forms})) or "none"
        raise ValueError(
            f"residual.kind = {residual.kind!r}: the layers of model chunk {i} ({type(unwrap_model(chunk)).__name__}) are {found}: "
            "built before pipehc.megatron.enable was called, or neither GPTModel nor HybridModel; call enable before the model is "
            f"built, or build it with pipehc.megatron.build_model_chunks(..., residual={residual.kind!r})"
        )


def refuse_unmirrored(chunks: Sequence[Any]) -> None:
    """ValueError for chunks whose DDP does not span the replicas of their stage: each replica would train by itself."""
    for i, chunk in enumerate(chunks):
        if not getattr(chunk, "counts_replicas_once", False):
            raise ValueError(
                f"model: chunk {i} ({type(chunk).__name__}) does not sum its gradients over both replicas of its stage, which "
                "would drift apart; wrap the chunks with pipehc.megatron.wrap_model_chunks"
            )


def refuse_placement(placement: Placement, virtual_stages: int | None) -> None:
    """ValueError if the job's virtual pipeline stages are not those of the placement."""
    if placement.ranks % 2 and placement.lanes == 2:
        given = named("pipeline_model_parallel_size", placement.ranks)
        raise ValueError(f"{given}: must be even for two replicas of every stage")
    chunks = placement.stages // placement.ranks
    given = f"--num-virtual-stages-per-pipeline-rank (virtual_pipeline_model_parallel_size = {virtual_stages})"
    if chunks == 1 and virtual_stages is not None:
        raise ValueError(
            f"{given}: a {placement.kind} placement has one stage a rank{' and direction' if placement.lanes == 2 else ''}; leave "
            "it out, and --num-layers-per-virtual-pipeline-stage (set virtual_pipeline_model_parallel_size = None)"
        )
    if chunks > 1 and virtual_stages != chunks:
        raise ValueError(
            f"{given}: a {placement.kind} placement needs {chunks}; set --num-virtual-stages-per-pipeline-rank {chunks} "
            f"(virtual_pipeline_model_parallel_size = {chunks})"
        )
