"""A dry run as plain data: memory by rank, costs by action, the simulated step, and what to worry about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipehc.planning.dry_run.hardware import Hardware
from pipehc.planning.dry_run.job import Job
from pipehc.planning.dry_run.operations import Operation
from pipehc.planning.dry_run.rank_run import RankRun
from pipehc.planning.dry_run.roofline import Cost, collectives, cost, device_ms
from pipehc.planning.dry_run.shares import shares
from pipehc.planning.dry_run.step import Step, model_flops, simulated
from pipehc.planning.dry_run.tables import Key, NodeWork, actions, phase
from pipehc.planning.dry_run.warnings import warnings
from pipehc.schedules import Program

GIB = 2**30
ORDER = "FRBW"


class DryRun(NamedTuple):
    """Of one job. runs: of the ranks that were run. nodes: what their stages launch. step: None where they do not hold all
    stages between them."""

    job: Job
    hardware: Hardware
    runs: Sequence[RankRun]
    program: Program
    nodes: Mapping[Key, Sequence[NodeWork]]
    table: Mapping[Key, Cost]
    step: Step | None


def assemble(job: Job, hardware: Hardware, runs: Sequence[RankRun], program: Program) -> DryRun:
    """program: of the whole step, with all its micro-batches."""
    nodes: dict[Key, tuple[NodeWork, ...]] = {}
    for run in runs:
        nodes |= actions(run.launches)
    costs = {
        key: [(node.name, node.queue, cost(node.work, hardware, job.experts)) for node in found]
        for key, found in sorted(nodes.items(), key=lambda item: (item[0][0], ORDER.index(item[0][1])))
    }
    table = {key: sum_of([part for _, _, part in found]) for key, found in costs.items()}
    step = None
    if {stage for stage, _ in table} >= set(range(job.placement.stages)):
        link = hardware.link(job.processes)
        optimizer = max(_optimizer_ms(run, job, hardware) for run in runs)
        sums = max(_sums_ms(run, job, hardware) for run in runs)
        step = simulated(program, costs, job.message_bytes, link, sums, optimizer, job.at_once)
    return DryRun(job, hardware, runs, program, nodes, table, step)


def sum_of(costs: Sequence[Cost]) -> Cost:
    total = Cost()
    for part in costs:
        total = total.plus(part)
    return total


def _optimizer_ms(run: RankRun, job: Job, hardware: Hardware) -> float:
    """The device's and the links' time, not the host's: CUDA's AdamW launches one kernel for many parameters, this one many."""
    work, replicas = phase(run.launches, "optimizer"), job.replicas
    own = cost(work, hardware, 1)
    return own.device_ms + own.share_ms + collectives(work, replicas, hardware.link(replicas))[1]


def _sums_ms(run: RankRun, job: Job, hardware: Hardware) -> float:
    """How long a rank's gradients take to be summed over the replicas of its stages, on idle links."""
    total: Counter[Operation] = Counter()
    for where, counts in run.launches.items():
        if where.kind == "step" or where.stage >= 0:
            total.update(counts)
    return collectives(total, job.replicas, hardware.link(job.replicas))[1]


def summary(dry: DryRun) -> dict[str, Any]:
    """As JSON: bytes, FLOPs, ms and shares. All times are modelled or simulated."""
    job, hardware, step = dry.job, dry.hardware, dry.step
    result: dict[str, Any] = {
        "gpu": hardware.name,
        "residual": job.residual,
        "schedule": job.schedule,
        "microbatches": job.microbatches,
        "microbatches_run": dry.runs[0].microbatches,
        "processes": job.processes,
        "ranks": [_rank(run, dry) for run in dry.runs],
        "actions": [{"stage": stage, "action": kind, **_cost(found)} for (stage, kind), found in dry.table.items()],
        "shares": [{"stage": stage, **found._asdict()} for stage, found in shares(dry.nodes, hardware).items()],
        "operations": _operations(dry),
        "step": None if step is None else _step(dry, step),
    }
    result["warnings"] = warnings(result, hardware)
    return result


def _rank(run: RankRun, dry: DryRun) -> dict[str, Any]:
    reserved, found = dry.hardware.reserved, run.peak
    comes_and_goes = found.total - sum(run.persistent.values())
    more = {
        "context": round(reserved.context_gib * GIB),
        "groups": round(reserved.group_mib * 2**20 * run.groups),
        "allocator": round(reserved.allocator * comes_and_goes),
    }
    total = found.total + sum(more.values())
    where = found.at
    return {
        "rank": run.rank,
        "mirror": dry.job.placement.ranks - 1 - run.rank if dry.job.mirrored else None,
        "stages": list(run.stages),
        "peak_bytes": found.total,
        "bytes": found.bytes,
        "estimated_bytes": more,
        "total_bytes": total,
        "fits": total <= dry.hardware.memory_gib * GIB,
        "at": where.kind if where.stage < 0 else f"{where.kind}{where.stage}.{where.microbatch} {where.node}".strip(),
        "makers": [{"category": c, "node": n, "operation": o, "bytes": b} for (c, n, o), b in found.makers],
        "saved": {stage: saved._asdict() for stage, saved in run.saved.items()},
    }


def _cost(found: Cost) -> dict[str, float]:
    return {
        "flops": found.flops,
        "bytes": found.bytes,
        "launches": found.launches,
        "all_to_all_bytes": found.exchanged,
        "device_ms": found.device_ms,
        "host_ms": found.host_ms,
        "all_to_all_ms": found.exchange_ms,
        "tensor_parallel_bytes": found.shared,
        "tensor_parallel_ms": found.share_ms,
    }


def _operations(dry: DryRun, most: int = 12) -> list[dict[str, Any]]:
    """The operations that keep the device longest in a step of a rank, over all its micro-batches."""
    run = max(dry.runs, key=lambda run: sum(dry.table[key].device_ms for key in dry.table if key[0] in run.stages))
    share = dry.job.microbatches / run.microbatches
    totals: Counter[str] = Counter()
    sums: dict[str, list[float]] = {}
    for where, counts in run.launches.items():
        if where.stage >= 0:
            for operation, n in counts.items():
                _add(totals, sums, operation, n * share, dry.hardware)
    whole = sum(totals.values())
    return [
        {"operation": name, "rank": run.rank, "launches": sums[name][0], "flops": sums[name][1], "bytes": sums[name][2],
         "device_ms": ms, "share": ms / whole}
        for name, ms in totals.most_common(most)
    ]  # fmt: skip


def _add(totals: Counter[str], sums: dict[str, list[float]], operation: Operation, n: float, hardware: Hardware) -> None:
    if operation.sort in ("communication", "tensor parallel"):
        return
    totals[operation.name] += n * device_ms(operation, hardware)  # type: ignore[assignment]
    entry = sums.setdefault(operation.name, [0.0, 0.0, 0.0])
    for k, value in enumerate((1, operation.flops, operation.bytes)):
        entry[k] += n * value


def _step(dry: DryRun, step: Step) -> dict[str, Any]:
    job, result = dry.job, step.pipeline
    seconds = 1e-3 * step.ms
    peak = dry.hardware.matmul.bf16_tflops if job.half else dry.hardware.matmul.fp32_tflops
    own_flops = model_flops(dry.table) * job.microbatches / job.placement.ranks  # the table is of single ranks: tp has cut it
    return {
        "ms": step.ms,
        "tokens_per_s": job.tokens / seconds,
        "model_flops_utilisation": own_flops / seconds / (1e12 * peak),
        "pipeline_ms": result.makespan,
        "bubble_ms": result.bubble,
        "bubble": result.bubble / result.makespan,
        "exposed_messages_ms": max(result.exposed_comm),
        "exposed_all_to_alls_ms": max(result.exposed_all_to_all),
        "hidden_recomputation_ms": max(result.hidden_recompute),
        "message_ms": step.costs.link,
        "optimizer_ms": step.optimizer_ms,
        "gradient_sums_ms": max(_sums_ms(run, job, dry.hardware) for run in dry.runs),
        "exposed_gradient_sums_ms": step.sums_ms,
    }
