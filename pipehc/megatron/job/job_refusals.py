"""What a job of megatron.training asks by its arguments that cannot work with our schedules; found before its model is built."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from pipehc.megatron.job.flags import flag_of, named
from pipehc.megatron.job.hybrid import refuse_pattern, refuse_segments
from pipehc.megatron.job.optimizer_shards import moves_stages
from pipehc.megatron.job.refusals import refuse_options, refuse_placement, refuse_values
from pipehc.megatron.job.source import ScheduleSource
from pipehc.megatron.job.tied import refuse_tied
from pipehc.megatron.versions import refuse_optimizer
from pipehc.schedules import ScheduleError

DDP = "ours works with Megatron's DistributedDataParallel"
BATCH = "a schedule is for one number of micro-batches"

# argument -> (values that are fine, remedy beside leaving it out)
ALWAYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_megatron_fsdp": ((False, None), DDP),
    "use_torch_fsdp2": ((False, None), DDP),
    "init_model_with_meta_device": ((False, None), ""),
    "perform_rl_step": ((False, None), ""),
    "vision_pretraining": ((False, None), "use a language model"),
    "modelopt_enabled": ((False, None), "train without ModelOpt"),
    "heterogeneous_layers_config_path": ((None,), "use equal layers"),
    "heterogeneous_layers_config_encoded_json": ((None,), "use equal layers"),
    "use_layer_wise_distributed_optimizer": ((False, None), "with --optimizer muon leave out --use-distributed-optimizer"),
    "moe_use_upcycling": ((False, None), "convert the checkpoint in a job without pipehc first"),
    "dataloader_inter_document_masking": ((False, None), "layers and stages do not hear where documents end"),
}
SCHEDULED: dict[str, tuple[tuple[Any, ...], str]] = {
    "overlap_param_gather_with_optimizer_step": ((False, None), ""),
    "rampup_batch_size": ((None,), BATCH),
    "step_batch_size_schedule": ((None,), BATCH),
    "rerun_mode": (("disabled", "validate_results"), ""),
    "moe_expert_rank_capacity_factor": ((None,), ""),
    "sft": ((False, None), "micro-batches must have one length"),
    "inprocess_restart": ((False, None), "process groups of ours do not survive it; let the launcher restart"),
    "num_distributed_optimizer_instances": ((1, None), ""),
}
REPLICATED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logits_save_dir": ((None,), "it counts the micro-batches of a step on a rank, of which each replica has half"),
    "logits_load_dir": ((None,), "it takes the micro-batches of a step in their order on one rank"),
    "non_persistent_ckpt_type": ((None, "global"), "or set 'global': a rank would miss its second replica's weights"),
    "qk_clip": ((False, None), "the replicas would be clipped by different micro-batches"),
}


def refuse_job(args: Namespace, source: ScheduleSource, ranks: int, residual: Any) -> None:
    """ValueError, naming argument, value and remedy, for the first thing that cannot work. The same on every rank."""
    placement = source.placement(ranks)
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern is not None:
        refuse_pattern(pattern, getattr(args, "mtp_num_layers", None))
        refuse_segments(pattern, ranks, placement.stages // ranks)
    refuse_placement(placement, args.virtual_pipeline_model_parallel_size)
    ours = source.name != "megatron"
    replicated = placement.lanes == 2
    for table in (ALWAYS, *([SCHEDULED] if ours else []), *([REPLICATED] if replicated else [])):
        refuse_values(args, table, f"pipehc.megatron with schedule {source.name}")
    if ours:
        refuse_options(args)
    if ours and (not getattr(args, "untie_embeddings_and_output_weights", True) or getattr(args, "mtp_num_layers", None)):
        refuse_tied(placement)
    if replicated:
        _refuse_replicas(args)
    if moves_stages(placement) and (args.save or args.load or getattr(args, "pretrained_checkpoint", None)):
        _refuse_checkpoints(args)
    if ours:
        data_parallel = args.data_parallel_size
        microbatches = args.global_batch_size // (args.micro_batch_size * data_parallel)
        try:
            source.check(ranks, microbatches)
        except (ValueError, ScheduleError) as error:
            raise ValueError(
                f"{named('global_batch_size', args.global_batch_size)}: makes {microbatches} micro-batches of "
                f"{args.micro_batch_size} for each of {data_parallel} data-parallel ranks: {error}; change --global-batch-size"
            ) from error
        evaluation = "eval_global_batch_size" if getattr(args, "eval_global_batch_size", None) else "global_batch_size"
        evaluated = getattr(args, evaluation)
        size = (getattr(args, "eval_micro_batch_size", None) or args.micro_batch_size) * data_parallel
        if (evaluated // size) % placement.lanes:
            raise ValueError(
                f"{named(evaluation, evaluated)}: makes {evaluated // size} micro-batches, of which half travel in either "
                f"direction; change {flag_of(evaluation)}"
            )
    if residual is not None and args.num_layers < placement.stages:
        given = named("num_layers", args.num_layers)
        raise ValueError(f"{given}: fewer than the {placement.stages} stages; every stage needs a layer")


def _refuse_replicas(args: Namespace) -> None:
    """What Megatron computes per replica, so that the two would drift apart, or counts on having one of."""
    refuse_optimizer(getattr(args, "optimizer", "adam"))
    balancing = getattr(args, "moe_router_load_balancing_type", None) or "none"
    for kind in ("quantile_balancing", "global_aux_loss"):
        if kind in (balancing if isinstance(balancing, list) else [balancing]):
            raise ValueError(
                f"{named('moe_router_load_balancing_type', balancing)}: each of two replicas would balance its own micro-batches; "
                "use aux_loss, seq_aux_loss or the expert bias"
            )


def _refuse_checkpoints(args: Namespace) -> None:
    """Where stages are not where Megatron's own layouts have them, or exist twice: only formats that go by global names."""
    if args.ckpt_format != "torch_dist":
        raise ValueError(f"{named('ckpt_format', args.ckpt_format)}: goes by pipeline ranks; set --ckpt-format torch_dist")
    if not args.use_distributed_optimizer or not args.save or args.no_save_optim or getattr(args, "skip_train", False):
        return  # what is loaded says itself how it was saved: see `saved_by_name`
    if not getattr(args, "dist_ckpt_optim_fully_reshardable", False):
        raise ValueError(
            f"{named('dist_ckpt_optim_fully_reshardable', False)}: the optimizer's shards would go by pipeline ranks; "
            "set --dist-ckpt-optim-fully-reshardable"
        )
    if getattr(args, "distrib_optim_fully_reshardable_mem_efficient", False):
        raise ValueError(
            f"{named('distrib_optim_fully_reshardable_mem_efficient', True)}: lets one rank of a mirrored group write, which may "
            "hold only the second replica of a stage; leave it out"
        )
