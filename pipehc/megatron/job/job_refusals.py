"""What a job of megatron.training asks by its arguments that cannot work with our schedules; found before its model is built."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from pipehc.megatron.job.optimizer_shards import moves_stages
from pipehc.megatron.job.refusals import refuse_options, refuse_placement, refuse_tied, refuse_values
from pipehc.megatron.job.source import ScheduleSource
from pipehc.megatron.versions import refuse_optimizer
from pipehc.schedules import ScheduleError

# argument -> (values that are fine, remedy)
ALWAYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_megatron_fsdp": ((None, False), "use Megatron's DistributedDataParallel"),
    "use_torch_fsdp2": ((None, False), "use Megatron's DistributedDataParallel"),
    "init_model_with_meta_device": ((None, False), "leave out --init-model-with-meta-device"),
    "perform_rl_step": ((None, False), "train without reinforcement learning"),
    "vision_pretraining": ((None, False), "use a language model"),
    "modelopt_enabled": ((None, False), "train without ModelOpt"),
    "heterogeneous_layers_config_path": ((None,), "use equal layers"),
    "heterogeneous_layers_config_encoded_json": ((None,), "use equal layers"),
    "use_layer_wise_distributed_optimizer": ((None, False), "use --use-distributed-optimizer or none"),
    "moe_use_upcycling": ((None, False), "convert the checkpoint in a job without pipehc first"),
    "dataloader_inter_document_masking": ((None, False), "leave it out: layers and stages do not hear where documents end"),
}
SCHEDULED: dict[str, tuple[tuple[Any, ...], str]] = {
    "overlap_param_gather_with_optimizer_step": ((None, False), "leave out --overlap-param-gather-with-optimizer-step"),
    "rampup_batch_size": ((None,), "leave out --rampup-batch-size: a schedule is for one number of micro-batches"),
    "step_batch_size_schedule": ((None,), "leave it out: a schedule is for one number of micro-batches"),
    "rerun_mode": (("disabled", "validate_results"), "set --rerun-mode disabled"),
    "moe_expert_rank_capacity_factor": ((None,), "leave it out"),
    "sft": ((None, False), "leave out --sft: micro-batches must have one length"),
    "inprocess_restart": ((None, False), "leave it out: process groups of ours do not survive it; let the launcher restart"),
    "num_distributed_optimizer_instances": ((None, 1), "leave out --num-distributed-optimizer-instances"),
}
REPLICATED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logits_save_dir": ((None,), "leave it out: it counts the micro-batches of a step on a rank, of which each replica has half"),
    "logits_load_dir": ((None,), "leave it out: it takes the micro-batches of a step in their order on one rank"),
    "non_persistent_ckpt_type": ((None, "global"), "leave it out or set 'global': a rank would miss its second replica's weights"),
    "qk_clip": ((None, False), "leave out --qk-clip: the replicas would be clipped by different micro-batches"),
}


def refuse_job(args: Namespace, source: ScheduleSource, ranks: int, residual: Any) -> None:
    """ValueError, naming argument, value and remedy, for the first thing that cannot work. The same on every rank."""
    placement = source.placement(ranks)
    refuse_placement(placement, args.virtual_pipeline_model_parallel_size)
    ours = source.name != "megatron"
    replicated = placement.lanes == 2
    for table in (ALWAYS, *([SCHEDULED] if ours else []), *([REPLICATED] if replicated else [])):
        refuse_values(args, table, f"pipehc.megatron with schedule {source.name}")
    if ours:
        refuse_options(args)
    if ours and not getattr(args, "untie_embeddings_and_output_weights", True):
        refuse_tied(placement)
    if replicated:
        _refuse_replicas(args)
    if moves_stages(placement) and (args.save or args.load or getattr(args, "pretrained_checkpoint", None)):
        _refuse_checkpoints(args)
    if ours:
        data_parallel = args.data_parallel_size
        microbatches = args.global_batch_size // (args.micro_batch_size * data_parallel)
        try:
            source.build(ranks, microbatches, False)
        except (ValueError, ScheduleError) as error:
            raise ValueError(
                f"global_batch_size = {args.global_batch_size}: makes {microbatches} micro-batches of {args.micro_batch_size} for "
                f"each of {data_parallel} data-parallel ranks: {error}; change --global-batch-size"
            ) from error
        evaluated = getattr(args, "eval_global_batch_size", None) or args.global_batch_size
        size = (getattr(args, "eval_micro_batch_size", None) or args.micro_batch_size) * data_parallel
        if (evaluated // size) % placement.lanes:
            raise ValueError(
                f"eval_global_batch_size = {evaluated}: makes {evaluated // size} micro-batches, of which half travel in either "
                "direction; change --eval-global-batch-size"
            )
    if residual is not None and args.num_layers < placement.stages:
        raise ValueError(f"num_layers = {args.num_layers}: fewer than the {placement.stages} stages; every stage needs a layer")


def _refuse_replicas(args: Namespace) -> None:
    """What Megatron computes per replica, so that the two would drift apart, or counts on having one of."""
    refuse_optimizer(getattr(args, "optimizer", "adam"))
    balancing = getattr(args, "moe_router_load_balancing_type", None) or "none"
    for kind in ("quantile_balancing", "global_aux_loss"):
        if kind in (balancing if isinstance(balancing, list) else [balancing]):
            raise ValueError(
                f"moe_router_load_balancing_type = {balancing!r}: each of two replicas would balance its own micro-batches; "
                "use aux_loss, seq_aux_loss or the expert bias"
            )


def _refuse_checkpoints(args: Namespace) -> None:
    """Where stages are not where Megatron's own layouts have them, or exist twice: only formats that go by global names."""
    if args.ckpt_format != "torch_dist":
        raise ValueError(f"ckpt_format = {args.ckpt_format!r}: goes by pipeline ranks; set --ckpt-format torch_dist")
    if not args.use_distributed_optimizer or not args.save or args.no_save_optim or getattr(args, "skip_train", False):
        return  # what is loaded says itself how it was saved: see `saved_by_name`
    if not getattr(args, "dist_ckpt_optim_fully_reshardable", False):
        raise ValueError(
            "dist_ckpt_optim_fully_reshardable = False: the optimizer's shards would go by pipeline ranks; "
            "set --dist-ckpt-optim-fully-reshardable"
        )
    if getattr(args, "distrib_optim_fully_reshardable_mem_efficient", False):
        raise ValueError(
            "distrib_optim_fully_reshardable_mem_efficient = True: lets one rank of a mirrored group write, which may hold only "
            "the second replica of a stage; leave it out"
        )
