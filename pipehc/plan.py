"""`python -m pipehc.plan --config FILE`: what a configuration amounts to, before any GPU is asked for.

Builds no model and no process group, imports no torch; with `--dry-run` it does both, without a GPU and without data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipehc.comm.environment import quiet_libraries
from pipehc.config.loading import add_config_arguments, check_world_size, run_with_config
from pipehc.config.schema import Config
from pipehc.planning import parameters
from pipehc.planning.activations import planned
from pipehc.planning.dry_run import command, recomputation
from pipehc.planning.notes import human, live_microbatches, mebibytes, notes
from pipehc.planning.search import question


def plan(config: Config) -> dict[str, Any]:
    """The plan as plain data, ready for JSON. Numbers of parameters are exact; `message_bytes` is one micro-batch's, one way;
    `saved_bytes`, with recomputation, what hyper-connections keep of one micro-batch, and rebuild, on top of what F saves.

    Without parallel.dp it holds for the smallest dp possible. `live` counts micro-batches whose activations of one stage a rank
    keeps at once. Raises ConfigError if the smallest dp does not fit the batch.
    """
    parallel, train = config.parallel, config.train
    world_size = parallel.pp * parallel.tp * (parallel.dp or config.smallest_dp)
    dp = check_world_size(config, world_size)
    placement = config.placement
    held = [[stage for _, stage in placement.held(rank)] for rank in range(parallel.pp)]
    saved = planned(config)
    per_stage = [
        {
            "stage": stage,
            "blocks": [blocks.start, blocks.stop - 1],
            "ranks": [rank for rank, stages in enumerate(held) if stage in stages],
            "parameters": count.total,
            "saved_bytes": None if saved is None else {k: v for k, v in saved[stage]._asdict().items() if v},
        }
        for stage, (blocks, count) in enumerate(zip(config.stage_blocks(), parameters.stages(config)))
    ]
    per_rank = [
        {"rank": rank, "stages": stages, "parameters": count, "live": live}
        for rank, (stages, count, live) in enumerate(zip(held, parameters.ranks(config), live_microbatches(config, dp)))
    ]
    return {
        "parameters": {
            "total": parameters.total(config),
            "active": parameters.active(config),
            "vocabulary": parameters.vocabulary(config),
        },
        "schedule": config.schedule.name,
        "stages": config.stages,
        "microbatches": config.microbatches(dp),
        "world_size": world_size,
        "parallel": {"pp": parallel.pp, "tp": parallel.tp, "ep": parallel.ep, "dp": dp, "dp_assumed": parallel.dp is None},
        "tokens_per_step": train.global_batch * train.sequence_length,
        "tokens": train.steps * train.global_batch * train.sequence_length,
        "message_bytes": config.stage_message_bytes(),
        "per_stage": per_stage,
        "per_rank": per_rank,
        "notes": notes(config, dp),
    }


def show(plan: dict[str, Any], console: Console) -> None:
    """Prints a plan as tables for people."""
    counts, parallel = plan["parameters"], plan["parallel"]
    assumed = " (the smallest; parallel.dp is null)" if parallel["dp_assumed"] else ""
    summary = Table.grid(padding=(0, 2))
    cut = parallel["tp"] > 1
    for name, text in (
        (
            "parameters",
            f"{human(counts['total'])} total, {human(counts['active'])} active, {human(counts['vocabulary'])} vocabulary",
        ),
        ("processes", f"{plan['world_size']} = pp {parallel['pp']} x tp {parallel['tp']} x dp {parallel['dp']}{assumed}"),
        *([("attention, FFN", f"cut over tp {parallel['tp']}, vocabulary too; every sequence as well")] if cut else []),
        ("experts", f"cut over ep {parallel['ep']} of the dp x tp processes of a stage"),
        ("schedule", f"{plan['schedule']}, {plan['stages']} stages, {plan['microbatches']} micro-batches a step"),
        ("tokens", f"{human(plan['tokens_per_step'])} a step, {human(plan['tokens'])} in all"),
        ("stage message", mebibytes(plan["message_bytes"])),
    ):
        summary.add_row(f"[bold]{name}[/]", text)
    console.print(summary)
    console.print()

    stages = Table("stage", "blocks", "on ranks", "parameters", title="Stages", title_justify="left", title_style="bold")
    if recomputed := plan["per_stage"][0]["saved_bytes"] is not None:
        stages.add_column("kept a micro-batch, beside F")
        stages.add_column("rebuilt")
    for row in plan["per_stage"]:
        first, last = row["blocks"]
        saved = row["saved_bytes"]
        memory = [mebibytes(saved["streams"] + saved["outputs"]), mebibytes(saved["rebuilt"])] if recomputed else []
        span = f"{first}-{last}" if last > first else str(first)
        stages.add_row(str(row["stage"]), span, _join(row["ranks"]), human(row["parameters"]), *memory)
    console.print(stages)
    console.print()

    ranks = Table(
        "rank", "stages", "parameters", "micro-batches held", title="Pipeline ranks", title_justify="left", title_style="bold"
    )
    for row in plan["per_rank"]:
        ranks.add_row(str(row["rank"]), _join(row["stages"]), human(row["parameters"]), f"<= {row['live']}")
    console.print(ranks)
    for note in plan["notes"]:
        console.print()
        console.print(note, markup=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipehc.plan", description="Shows what a configuration amounts to.")
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    dry = parser.add_argument_group("dry run", "memory, time and costs of the real program, run without GPU and data")
    dry.add_argument("--dry-run", action="store_true", help="make one")
    recomputation.add_arguments(dry)
    command.add_arguments(dry)
    question.add_arguments(parser)
    args = parser.parse_intermixed_args(argv)

    def body(config: Config) -> int:
        recomputation.check(args)
        if question.asked(args):
            return _search(config, args)
        if args.dry_run:
            return _dry_run(config, args)
        result = plan(config)
        if args.json:
            print(json.dumps(result, indent=2))
        else:
            show(result, Console(highlight=False))
        return 0

    return run_with_config(args, body)


def _dry_run(config: Config, args: argparse.Namespace) -> int:
    asked = command.asked(args, config.parallel.pp, "parallel.pp")
    memory = question.memory(args)
    quiet_libraries()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: whether there is a GPU must not matter
    # Torch and Megatron take seconds to import: a wrong question should not have to wait for them.
    from pipehc.megatron import cpu

    with cpu.uncompiled():
        from pipehc.dry_run import costs_for_search, dry_runs, plain

    if args.costs is not None:
        if config.schedule.name == "auto":
            costs = costs_for_search(config, asked.hardware, asked.imbalance)
        else:
            [dry] = dry_runs([config], asked.hardware, None, asked.imbalance)
            assert dry.step is not None, "every stage was run"
            costs = dry.step.costs
        command.write_costs(costs, args.costs)
        return 0
    if args.recomputation:
        from pipehc.planning.dry_run.summary import summary

        configs = recomputation.choices(config)
        rows = recomputation.rows(configs, [*map(summary, dry_runs(configs, asked.hardware, None, asked.imbalance))], memory)
        if args.json:
            print(json.dumps({"gpu": asked.hardware.name, "choices": rows, "fastest": recomputation.best(rows)}, indent=2))
        else:
            recomputation.show(rows, asked.hardware.name, memory, command.console())
        return 0
    configs = [config] if config.residual.kind == "none" else [config, plain(config)]
    found = dry_runs(configs, asked.hardware, asked.ranks, asked.imbalance)
    command.show(found[0], found[1] if len(found) > 1 else None, args)
    return 0


def _search(config: Config, args: argparse.Namespace) -> int:
    wanted = question.question(args)
    quiet_libraries()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from pipehc.layout_search import as_data, search_layouts
    from pipehc.planning.search.report import show as show_layouts

    found = search_layouts(config, wanted)
    if args.json:
        print(json.dumps(as_data(found, wanted), indent=2))
    else:
        show_layouts(as_data(found, wanted), command.console())
    if wanted.write is not None:
        question.write(found.fitting[0].config, wanted.write)
    return 0


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


if __name__ == "__main__":
    sys.exit(main())
