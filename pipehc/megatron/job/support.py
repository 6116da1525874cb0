"""What works under which schedule, as README's table says it: asked of the functions that refuse jobs, so that it cannot drift.

python -m pipehc.megatron.job.support      the table, and every option that is refused
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipehc.megatron.job.flags import flag_of
from pipehc.megatron.job.job_refusals import ALWAYS, REPLICATED, SCHEDULED, refuse_job
from pipehc.megatron.job.refusals import DDP_OPTIONS, OPTIONS
from pipehc.megatron.job.source import source_of
from pipehc.megatron.layer import refuse_layer_options

RANKS = 2
# What a job of megatron.training has where a feature says nothing.
JOB = {
    "virtual_pipeline_model_parallel_size": None, "num_layers": 8, "save": None, "load": None, "ckpt_format": "torch_dist",
    "no_save_optim": False, "use_distributed_optimizer": False, "data_parallel_size": 1, "global_batch_size": 16,
    "micro_batch_size": 2, "rerun_mode": "disabled", "untie_embeddings_and_output_weights": True,
}  # fmt: skip
COLUMNS: dict[str, tuple[tuple[str, Mapping[str, Any], int | None], ...]] = {  # schedules, their options, virtual stages
    "megatron": (("megatron", {}, None),),
    "1f1b, gpipe, zb_h1, auto": tuple((name, {}, None) for name in ("1f1b", "gpipe", "zb_h1", "auto")),
    "interleaved": (("interleaved", {}, 2),),
    "dualpipe, auto over two directions": (("dualpipe", {}, None), ("auto", {"placement": "bidirectional"}, None)),
    "dualpipev, zbv, auto over a V": (("dualpipev", {}, 2), ("zbv", {}, 2), ("auto", {"placement": "v"}, 2)),
}


class Feature(NamedTuple):
    """arguments: of a job that has it. test: the file in tests/megatron/job that runs it against Megatron's own schedule, or where
    it is refused everywhere or was never run, sees it refused."""

    name: str
    arguments: Mapping[str, Any]
    test: str


REFUSED = "test_refusals.py"
FEATURES = (
    Feature("tensor and sequence parallelism", {"sequence_parallel": True}, "test_megatron_schedule.py"),
    Feature("context parallelism", {"context_parallel_size": 2}, "test_megatron_schedule.py"),
    Feature("expert parallelism, auxiliary losses", {"moe_router_load_balancing_type": "aux_loss"}, "test_megatron_schedule.py"),
    Feature(
        "distributed optimizer, overlapped reduction and parameter gather",
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
        "test_job_matrix.py",
    ),
    Feature("biases, frozen parameters, any norm and position embedding", {}, "test_job_matrix.py"),
    Feature("uneven stages, layout strings", {"num_layers": 9}, "test_megatron_schedule.py"),
    Feature("tied embeddings", {"untie_embeddings_and_output_weights": False}, "test_job_matrix.py"),
    Feature("multi-token prediction", {"mtp_num_layers": 1}, "test_prediction.py"),
    Feature(
        "HybridModel of attention, MLA, gated delta nets, MLP and experts",
        {"hybrid_layer_pattern": "*+G-E"},
        "test_hybrid_model.py",
    ),
    Feature("HybridModel with Mamba or sparse attention", {"hybrid_layer_pattern": "M-"}, REFUSED),
    Feature("HybridModel with multi-token prediction", {"hybrid_layer_pattern": "*-/*-"}, REFUSED),
    Feature("recomputation of modules by Megatron", {"recompute_granularity": "selective"}, "test_megatron_schedule.py"),
    Feature("checkpoints of torch_dist", {"save": "it"}, "test_enable.py"),
    Feature(
        "the same with the distributed optimizer's state",
        {"save": "it", "use_distributed_optimizer": True},
        "test_enable_checkpoints.py",
    ),
    Feature("evaluation alone", {"load": "it", "skip_train": True}, "test_enable_checkpoints.py"),
    Feature("other checkpoint formats", {"save": "it", "ckpt_format": "torch"}, REFUSED),
    Feature("local non-persistent checkpoints", {"non_persistent_ckpt_type": "local"}, REFUSED),
    Feature("balancing over the global batch", {"moe_router_load_balancing_type": "global_aux_loss"}, REFUSED),
    Feature("QK clipping", {"qk_clip": True}, REFUSED),
    Feature("saved or loaded logits", {"logits_save_dir": "it"}, REFUSED),
    Feature("full recomputation", {"recompute_granularity": "full"}, REFUSED),
    Feature("FP8, FP4", {"fp8": "hybrid"}, REFUSED),
    Feature("CUDA graphs", {"cuda_graph_impl": "local"}, REFUSED),
    Feature("CPU offloading", {"cpu_offloading": True}, REFUSED),
    Feature("batch size ramp-up", {"rampup_batch_size": [4, 4, 100]}, REFUSED),
    Feature("sequences of other lengths", {"variable_seq_lengths": True}, REFUSED),
    Feature("in-process restart", {"inprocess_restart": True}, REFUSED),
    Feature("FSDP", {"use_megatron_fsdp": True}, REFUSED),
    Feature("reinforcement learning", {"perform_rl_step": True}, REFUSED),
)


def refusal(feature: Feature, column: str) -> str | None:
    """Why a job with the feature is refused under the schedules of a column; None if it is not."""
    found = set()
    for name, search, virtual in COLUMNS[column]:
        arguments = Namespace(**JOB | {"virtual_pipeline_model_parallel_size": virtual} | dict(feature.arguments))
        if "hybrid_layer_pattern" in feature.arguments:  # of a stage, and of the depths behind
            stage, *depths = arguments.hybrid_layer_pattern.split("/")
            arguments.hybrid_layer_pattern = "/".join(["|".join([stage] * RANKS * (virtual or 1)), *depths])
        try:
            refuse_job(arguments, source_of(name, search), RANKS, "mhc")
            refuse_layer_options(arguments)
            found.add("")
        except ValueError as error:
            found.add(str(error).replace(f"schedule {name}", "it"))
    assert len(found) == 1, (feature, found)  # or the column would have to be two
    return found.pop() or None


def table() -> str:
    """In Markdown."""
    lines = [f"| | {' | '.join(COLUMNS)} | instead |", f"| --- |{' --- |' * (len(COLUMNS) + 1)}"]
    for feature in FEATURES:
        accepted = "untried" if feature.test == REFUSED else "yes"
        refusals = [refusal(feature, column) for column in COLUMNS]
        remedy = next((text.partition("; ")[2] for text in refusals if text), "")
        lines.append(f"| {feature.name} | {' | '.join('no' if text else accepted for text in refusals)} | {remedy} |")
    return "\n".join(lines)


def options() -> list[str]:
    """A line for every option that is refused unless it has a value that is fine."""
    where = {
        "under any schedule, Megatron's own included": ALWAYS,
        "under our schedules": {**SCHEDULED, **{name: (fine, why) for name, (fine, why, _) in OPTIONS.items()}},
        "with two replicas of every stage": REPLICATED,
        "in the configuration of DDP": DDP_OPTIONS,
    }
    return [
        f"{flag_of(name) or name}: must be {' or '.join(map(repr, fine))} {place}{f': {why}' if why else ''}"
        for place, refused in where.items()
        for name, (fine, why) in refused.items()
    ]


def main() -> None:
    refused = options()
    print(table(), f"\n{len(refused)} options are refused for other values:", *refused, sep="\n")


if __name__ == "__main__":
    main()
