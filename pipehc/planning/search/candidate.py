"""One layout: what its step and its memory come to, from composed costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pipehc.config.schema import Config
from pipehc.config.stages import build_schedule
from pipehc.planning.dry_run.hardware import Hardware
from pipehc.planning.dry_run.step import model_flops, stepped
from pipehc.planning.search.layouts import changed, with_blocks
from pipehc.planning.search.stage_costs import stage_costs
from pipehc.planning.search.units import Composed, Composer
from pipehc.planning.search.walk import Outline, activations_peak, outlines
from pipehc.schedules import Costs, Program, build, compile
from pipehc.schedules.auto import SEARCHED
from pipehc.schedules.deferral import at_once

GIB = 2**30


@dataclass
class Candidate:
    """bound_ms: no schedule of these stages is faster. Then, once known: total_bytes, of the fullest rank `rank`, and ms, of the
    simulated step. confirmed: by a dry run of the whole layout; of the fullest rank alone where the schedule is searched."""

    config: Config
    composed: Composed
    bound_ms: float
    total_bytes: float = 0.0
    rank: int = 0
    ms: float = 0.0
    utilisation: float = 0.0
    confirmed: bool = False
    why: str = ""

    def row(self) -> dict[str, Any]:
        """As JSON."""
        config, parallel = self.config, self.config.parallel
        return {
            "pp": parallel.pp, "tp": parallel.tp, "ep": parallel.ep, "dp": parallel.dp,
            "blocks_per_stage": [len(blocks) for blocks in config.stage_blocks()],
            "schedule": config.schedule.name, "chunks": config.schedule.chunks,
            "placement": config.search.placement if config.schedule.name == "auto" else None,
            "micro_batch": config.train.micro_batch, "microbatches": config.microbatches(parallel.dp or 1),
            "recompute": config.recompute.enabled, "recompute_block": config.recompute.block,
            "ms": self.ms or None, "at_least_ms": self.bound_ms, "model_flops_utilisation": self.utilisation or None,
            "tokens_per_s": config.train.global_batch * config.train.sequence_length / self.ms * 1e3 if self.ms else None,
            "total_bytes": round(self.total_bytes), "fullest_rank": self.rank,
            "source": "dry run" if self.confirmed else "composed", "why": self.why,
        }  # fmt: skip


def candidate(config: Config, composer: Composer) -> Candidate:
    composed = composer(config)
    pairs = config.schedule.name.startswith("dualpipe")
    return Candidate(config, composed, max(_rank_ms(config, composed, exchange=not pairs)) + composed.optimizer_ms)


def balanced(found: Candidate, composer: Composer) -> Config | None:
    """Blocks moved from the busiest ranks to the idlest, while that helps; None if it does not."""
    config = found.config
    sizes = [len(blocks) for blocks in config.stage_blocks()]
    load = _rank_ms(config, found.composed)
    placement, each = config.placement, composer.block_ms * config.microbatches(config.parallel.dp or 1) / config.lanes
    ranks = [[rank for rank in range(config.parallel.pp) if s in _held(placement, rank)] for s in range(len(sizes))]
    start = list(sizes)
    for _ in range(config.model.blocks):
        heavy = max(range(len(sizes)), key=lambda s: (max(load[r] for r in ranks[s]) if sizes[s] > 1 else 0.0, sizes[s]))
        light = min(range(len(sizes)), key=lambda s: (max(load[r] for r in ranks[s]), sizes[s]))
        if sizes[heavy] < 2 or max(load[r] for r in ranks[light]) + each >= max(load[r] for r in ranks[heavy]) - 1e-9:
            break
        for stage, sign in ((heavy, -1), (light, 1)):
            sizes[stage] += sign
            for rank in ranks[stage]:
                load[rank] += sign * each
    return with_blocks(config, sizes) if sizes != start else None


def searched(best: Candidate, hardware: Hardware, composer: Composer, time_limit: float) -> list[Config]:
    """The same layout with searched schedules, for the placements that can be, which are told the composed times in ms."""
    found = []
    for placement in SEARCHED:
        try:
            config = changed(
                best.config,
                parallel={"blocks_per_stage": None},
                schedule={"name": "auto", "chunks": None},
                search={"placement": placement, "max_live": None, "time_limit": time_limit},
            )
        except ValueError:
            continue
        composed = composer(config)
        costs = _costs(composed, config, hardware)
        values = {"f": costs.f, "b": costs.b, "w": costs.w, "r": costs.r, "link": costs.link, "latency": costs.latency}
        found.append(changed(config, search=values))
    return found


def _costs(composed: Composed, config: Config, hardware: Hardware) -> Costs:
    return stage_costs(config.placement, composed.table, config.stage_message_bytes(), hardware.link(_processes(config)))


def fill_memory(found: Candidate, hardware: Hardware) -> None:
    """total_bytes and rank. Raises ValueError where a schedule cannot be built."""
    config, composed, outlined = found.config, found.composed, outlines_of(found.config)
    sizes = []
    for rank, outline in enumerate(outlined):
        persistent = sum(composed.persistent[rank].values())
        moving = activations_peak(outline, composed.memory)
        moving += outline.buffers * config.stage_message_bytes()
        moving = max(moving, composed.optimizer_over)
        reserved = hardware.reserved
        groups = composed.groups + 1 + outline.neighbours if config.parallel.pp > 1 else composed.groups
        more = reserved.context_gib * GIB + groups * reserved.group_mib * 2**20 + reserved.allocator * moving
        sizes.append(persistent + moving + more)
    found.total_bytes = max(sizes)
    found.rank = sizes.index(found.total_bytes)


def fill_step(found: Candidate, hardware: Hardware) -> None:
    """ms and utilisation."""
    config, composed = found.config, found.composed
    costs = replace(_costs(composed, config, hardware), at_once=at_once(config.schedule.deferred))
    found.ms = stepped(program_of(config), costs, composed.sums_ms, composed.optimizer_ms).ms
    peak = hardware.matmul.bf16_tflops if config.train.precision == "bf16" else hardware.matmul.fp32_tflops
    work = model_flops(composed.table) * config.microbatches(config.parallel.dp or 1)
    found.utilisation = work / (config.parallel.pp * config.parallel.tp) / (1e-3 * found.ms) / (1e12 * peak)


def program_of(config: Config) -> Program:
    """As the trainer would compile it."""
    microbatches, recompute = config.microbatches(config.parallel.dp or 1), config.recompute.enabled
    if config.schedule.name == "auto":  # `auto` keeps what it found
        return compile(build_schedule(config, config.parallel.pp, microbatches), recompute=recompute, high=True, hosts_wait=True)
    return _program(config.schedule.name, config.parallel.pp, microbatches, config.schedule.chunks, recompute)


def outlines_of(config: Config) -> list[Outline]:
    schedule, microbatches = config.schedule, config.microbatches(config.parallel.dp or 1)
    if schedule.name == "auto":
        return outlines(program_of(config), config.runtime.overlap)
    recompute, overlap = config.recompute.enabled, config.runtime.overlap
    return _outlines(schedule.name, config.parallel.pp, microbatches, schedule.chunks, recompute, overlap)


@lru_cache(maxsize=512)
def _outlines(name: str, ranks: int, microbatches: int, chunks: int | None, recompute: bool, overlap: bool) -> list[Outline]:
    return outlines(_program(name, ranks, microbatches, chunks, recompute), overlap)


@lru_cache(maxsize=512)
def _program(name: str, ranks: int, microbatches: int, chunks: int | None, recompute: bool) -> Program:
    return compile(build(name, ranks, microbatches, chunks=chunks), recompute=recompute, high=True, hosts_wait=True)


def _rank_ms(config: Config, composed: Composed, exchange: bool = False) -> list[float]:
    """What every rank does in a step, without waiting. exchange: with all-to-alls, which only pairs hide."""
    placement = config.placement
    count = config.microbatches(config.parallel.dp or 1) / placement.lanes
    of_stage = [0.0] * config.stages
    for (stage, _), found in composed.table.items():
        of_stage[stage] += found.ms - (0.0 if exchange else found.exchange_ms)
    return [count * sum(of_stage[s] for s in _held(placement, rank)) for rank in range(config.parallel.pp)]


def _held(placement: Any, rank: int) -> Sequence[int]:
    return [stage for _, stage in placement.held(rank)]


def _processes(config: Config) -> int:
    return config.parallel.pp * config.parallel.tp * (config.parallel.dp or 1)
