"""What cannot work together with our schedules, each with a reason and a remedy. Found before anything runs, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core.utils import unwrap_model

from pipehc.comm.handshake import first_problem
from pipehc.schedules import Placement

# option of Megatron's configuration -> (values that are fine, why not, remedy)
OPTIONS: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "mtp_num_layers": ((None, 0), "multi-token prediction has layers outside the decoder", "set None"),
    "cuda_graph_impl": ((None, "none"), "a graph captures the order that our schedules change", "set 'none'"),
    "enable_cuda_graph": ((None, False), "a graph captures the order that our schedules change", "set False"),
    "external_cuda_graph": ((None, False), "a graph captures the order that our schedules change", "set False"),
    "cpu_offloading": ((None, False), "it wraps the whole decoder", "set False; recompute=True drops what is cheap to rebuild"),
    "fine_grained_activation_offloading": ((None, False), "it wraps the whole decoder", "set False"),
    "recompute_granularity": (
        (None, "selective"),
        "it runs whole layers again, while ours recomputes hyper-connections alone",
        "set None or 'selective' with recompute_modules ['core_attn']",
    ),
    "overlap_moe_expert_parallel_comm": ((None, False), "our pairs overlap the all-to-alls themselves", "set False"),
    "delay_wgrad_compute": ((None, False), "our schedules defer weight gradients themselves", "set False"),
    "overlap_dispatch_backward_with_experts_wgrad": (
        (None, False),
        "our schedules defer weight gradients themselves",
        "set False",
    ),
    "defer_embedding_wgrad_compute": ((None, False), "our schedules defer weight gradients themselves", "set False"),
    "variable_seq_lengths": ((None, False), "stage messages have one shape", "set False and pad to seq_length"),
    "enable_autocast": ((None, False), "the nodes of the decoder run outside the forward step", "set False; use bf16 or fp16"),
    "fp8": ((None,), "the nodes do not enter its contexts", "train in bf16, or use schedule = 'megatron'"),
    "fp4": ((None,), "the nodes do not enter its contexts", "train in bf16, or use schedule = 'megatron'"),
    "fp32_residual_connection": ((None, False), "stage messages have the dtype of the parameters", "set False"),
    "num_microbatches_with_partial_activation_checkpoints": (
        (None,),
        "how much is recomputed is a matter of the schedule",
        "set None and recompute=True",
    ),
    "hybrid_context_parallel": ((None, False), "micro-batches must have one length", "set False"),
    "moe_shared_expert_overlap": ((None, False), "our pairs overlap the all-to-alls themselves", "set False"),
    "moe_paged_stash": ((None, False), "it relies on the order of Megatron's own schedules", "set False"),
    "moe_enable_routing_replay": ((None, False), "it replays routes in the order of Megatron's own schedules", "set False"),
    "gtp_weight_remat_size": ((None, 1), "weights would have to be gathered for every node", "set 1"),
    "expert_gtp_weight_remat_size": ((None, 1), "weights would have to be gathered for every node", "set 1"),
    "heterogeneous_block_specs": ((None, False), "a layer may lack attention or FFN", "use equal layers"),
    "experimental_attention_variant": ((None,), "its layers may share state", "use standard attention or MLA"),
}


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
            raise ValueError(f"{name} = {value!r}: not supported under our schedules: {reason}; {remedy}")


# option of Megatron's DistributedDataParallelConfig -> (values that are fine, remedy)
DDP_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_megatron_fsdp": ((None, False), "use Megatron's DistributedDataParallel"),
    "use_custom_fsdp": ((None, False), "use Megatron's DistributedDataParallel"),
    "num_distributed_optimizer_instances": ((None, 1), "set 1"),
}


def refuse_values(owner: Any, table: Mapping[str, tuple[tuple[Any, ...], str]], by: str) -> None:
    """ValueError for the first option in `table`, name -> (values that are fine, remedy), that `by` does not support."""
    for name, (fine, remedy) in table.items():
        value = getattr(owner, name, None)
        if value not in fine:
            raise ValueError(f"{name} = {value!r}: not supported by {by}; {remedy}")


def refuse_call(config: Any, adjust_tensor_shapes_fn: Any, p2p_communicator: Any) -> None:
    """ValueError for what a call of the forward-backward function asks and we do not do."""
    refuse_options(config)
    for name, value in {"adjust_tensor_shapes_fn": adjust_tensor_shapes_fn, "p2p_communicator": p2p_communicator}.items():
        if value is not None:
            raise ValueError(f"{name} = {value!r}: must be None: our stage messages have one shape and groups of their own")


def refuse_model(model: Any, placement: Placement) -> None:
    """ValueError for a model chunk that our schedules cannot take apart or place."""
    name = type(model).__name__
    decoder = getattr(model, "decoder", None)
    if decoder is None or type(decoder).__name__ != "TransformerBlock":
        remedy = "use GPTModel"
        if name == "HybridModel":
            remedy = "use GPTModel: HybridModel has attention and FFN in layers of their own, no residual of two sub-layers"
        raise ValueError(f"{name}: has no TransformerBlock as its decoder; {remedy}")
    if getattr(model, "encoder", None) is not None and getattr(model, "add_encoder", False):
        raise ValueError(f"{name}: encoder-decoder models are not supported; use a decoder-only model")
    if getattr(model, "share_embeddings_and_output_weights", False) and placement.ranks > 1:
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
                    "chunks are not those of the schedule's placement; build them with pipehc.megatron.build_model_chunks"
                )
            following += len(numbers)


def refuse_unmirrored(chunks: Sequence[Any]) -> None:
    """ValueError for chunks whose DDP does not span the replicas of their stage: each replica would train by itself."""
    for i, chunk in enumerate(chunks):
        if not getattr(chunk, "counts_replicas_once", False):
            raise ValueError(
                f"model: chunk {i} ({type(chunk).__name__}) does not sum its gradients over both replicas of its stage, which "
                "would drift apart; wrap the chunks with pipehc.megatron.wrap_model_chunks"
            )


def refuse_tied(placement: Placement) -> None:
    """ValueError if embedding and output head, which Megatron sums between first and last rank, lie on one rank."""
    if any(lane[0] != 0 or lane[-1] != placement.ranks - 1 for lane in placement.table):
        raise ValueError(
            f"share_embeddings_and_output_weights = True: not supported over a {placement.kind} placement, which has embedding and "
            "output head on the same rank; set --untie-embeddings-and-output-weights, or use schedule = '1f1b'"
        )


def refuse_placement(placement: Placement, virtual_stages: int | None) -> None:
    """ValueError if the job's virtual pipeline stages are not those of the placement."""
    if placement.ranks % 2 and placement.lanes == 2:
        raise ValueError(f"pipeline_model_parallel_size = {placement.ranks}: must be even for two replicas of every stage")
    chunks = placement.stages // placement.ranks
    if chunks == 1 and virtual_stages is not None:
        raise ValueError(
            f"virtual_pipeline_model_parallel_size = {virtual_stages}: a {placement.kind} placement has one stage a rank"
            f"{' and direction' if placement.lanes == 2 else ''}; leave it out"
        )
    if chunks > 1 and virtual_stages != chunks:
        raise ValueError(
            f"virtual_pipeline_model_parallel_size = {virtual_stages}: a {placement.kind} placement needs {chunks}; "
            f"set --num-virtual-stages-per-pipeline-rank {chunks}"
        )
