"""Searches for the fastest layout over a number of GPUs: costs composed from small dry runs, the best confirmed by whole ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from time import monotonic
from typing import Any, NamedTuple

from pipehc.config.loading import ConfigError
from pipehc.config.schema import Config
from pipehc.dry_run import counted, dry_runs, summed_up
from pipehc.planning.dry_run.hardware import Hardware
from pipehc.planning.dry_run.processes import side_by_side
from pipehc.planning.dry_run.summary import summary
from pipehc.planning.search.candidate import Candidate, balanced, candidate, fill_memory, fill_step, searched
from pipehc.planning.search.footprint import footprints
from pipehc.planning.search.layouts import layouts, same_layout
from pipehc.planning.search.question import Question
from pipehc.planning.search.units import Composer, Unit, UnitRun, unit_config, unit_of

GIB = 2**30
LISTED = 8  # the fastest that fit, and as many that do not
CONFIRMED = 3
MARGIN = 1.05  # composed memory is near that of a dry run: this much above the limit, the dry run decides
SECONDS = 200.0  # after which no further dry run begins


class Found(NamedTuple):
    """fitting: fastest first, the confirmed ones before the others. rejected: those that seemed faster, but do not fit. own: the
    layout of the configuration itself, if it is one over as many GPUs."""

    fitting: list[Candidate]
    rejected: list[Candidate]
    own: Candidate | None
    considered: int
    seconds: float


def search_layouts(config: Config, wanted: Question, confirmed: int = CONFIRMED) -> Found:
    """The layouts of `config` that were asked for.

    confirmed: how many dry runs to make of whole layouts. Raises ConfigError, with one sentence, if there is none that passes the
    checks, or none that fits.
    """
    begun, gpus, memory_gib, hardware = monotonic(), wanted.gpus, wanted.memory_gib, wanted.hardware
    there, tp = list(layouts(config, gpus)), config.parallel.tp
    if not there:
        sizes = "pp x dp" if tp == 1 else f"pp x dp x {tp} (parallel.tp)"
        raise ConfigError(
            f"--gpus {gpus}: no layout passes the checks of a configuration: {sizes} must be {gpus}, pp at most model.blocks = "
            f"{config.model.blocks}, and micro_batch x dp must divide train.global_batch = {config.train.global_batch}"
        )
    candidates, rejected = _candidates(there, config, wanted)
    fitting, full = _fitting(candidates, memory_gib, hardware)
    rejected += full
    if fitting and monotonic() - begun < SECONDS:
        fitting = _with_searched(fitting, memory_gib, hardware, candidates)
    fitting, refuted = _confirm(fitting, wanted, confirmed, begun)
    rejected += refuted
    if not fitting:
        least = min(rejected, key=lambda c: c.total_bytes)
        raise ConfigError(
            f"--memory {memory_gib:g}: none of {len(there)} layouts over {gpus} GPUs fits: the smallest found needs "
            f"{least.total_bytes / GIB:.1f} GiB ({least.why}; pp {least.config.parallel.pp}, ep {least.config.parallel.ep})"
        )
    rejected = sorted((c for c in rejected if c.bound_ms < fitting[0].ms), key=lambda c: c.bound_ms)[:LISTED]
    for one in rejected:
        if not one.ms:
            fill_step(one, hardware)
    rejected = sorted((c for c in rejected if c.ms < fitting[0].ms), key=lambda c: c.ms)
    own = next((c for c in candidates.all if same_layout(c.config, config)), None)
    if own is not None and not own.ms:
        fill_memory(own, hardware)
        fill_step(own, hardware)
    return Found(fitting[:LISTED], rejected, own, len(candidates.all), monotonic() - begun)


class _Candidates(NamedTuple):
    all: list[Candidate]
    composers: dict[Unit, Composer]


def _candidates(there: Sequence[Config], config: Config, wanted: Question) -> tuple[_Candidates, list[Candidate]]:
    """What all layouts come to; where even parameters are too much in all of them, the smallest instead."""
    units = dict.fromkeys(unit_of(one) for one in there)
    first = unit_of(config) if unit_of(config) in units else next(iter(units))
    composers = _composers(config, [first], wanted)
    persistent = [composers[first].persistent_bytes(one) for one in there]
    left = [one for one, size in zip(there, persistent) if size <= wanted.memory_gib * GIB]
    _say(f"{len(there)} layouts, {len(there) - len(left)} of them too large even without activations")
    if not left:
        smallest = persistent.index(min(persistent))
        least = candidate(there[smallest], composers[first])
        least.total_bytes, least.why = persistent[smallest], "parameters, gradients and optimizer alone"
        return _Candidates([], composers), [least]
    needed = dict.fromkeys(unit_of(one) for one in left)
    _say(f"dry runs of {len(needed)} small models")
    composers |= _composers(config, [unit for unit in needed if unit != first], wanted)
    found = []
    for one in left:
        composer = composers[unit_of(one)]
        found.append(candidate(one, composer))
        if (other := balanced(found[-1], composer)) is not None:
            found.append(candidate(other, composer))
    return _Candidates(found, composers), []


def _composers(config: Config, units: Sequence[Unit], wanted: Question) -> dict[Unit, Composer]:
    if not units:
        return {}
    runs = side_by_side(_run_unit, [(unit_config(config, unit), wanted.imbalance) for unit in units])
    return {unit: Composer(run, wanted.hardware) for unit, run in zip(units, runs)}


def _run_unit(request: tuple[Config, float]) -> UnitRun:
    config, imbalance = request
    run = counted(config, 0, imbalance=imbalance)
    return UnitRun(config, summed_up(config, 0, run), footprints(run.tracker.history, microbatch=1))


def _fitting(found: _Candidates, memory_gib: float, hardware: Hardware) -> tuple[list[Candidate], list[Candidate]]:
    """Those that fit, fastest first, and those that do not; from the smallest bound on, until no other can be among the best."""
    fitting: list[Candidate] = []
    full: list[Candidate] = []
    limit = memory_gib * GIB
    for one in sorted(found.all, key=lambda c: c.bound_ms):
        sure = sorted(c.ms for c in fitting if MARGIN * c.total_bytes <= limit)
        if len(sure) >= LISTED and one.bound_ms > sure[LISTED - 1]:
            break
        fill_memory(one, hardware)
        if one.total_bytes > MARGIN * limit:
            one.why = f"rank {one.rank} needs {one.total_bytes / GIB:.1f} GiB"
            full.append(one)
        else:
            fill_step(one, hardware)
            fitting.append(one)
    _say(f"{len(fitting)} layouts simulated, {len(full)} do not fit, no other can be faster than the best {LISTED}")
    return sorted(fitting, key=lambda c: c.ms), full


def _with_searched(fitting: list[Candidate], memory_gib: float, hardware: Hardware, found: _Candidates) -> list[Candidate]:
    """With searched schedules for the best layout."""
    best = fitting[0]
    if best.config.parallel.pp == 1:
        return fitting
    composer = found.composers[unit_of(best.config)]
    for config in searched(best, hardware, composer, min(10.0, best.config.search.time_limit)):
        one = candidate(config, composer)
        fill_memory(one, hardware)
        if one.total_bytes <= MARGIN * memory_gib * GIB:
            fill_step(one, hardware)
            fitting.append(one)
    _say("searched schedules compared for the best layout")
    return sorted(fitting, key=lambda c: c.ms)


def _confirm(fitting: list[Candidate], wanted: Question, count: int, begun: float) -> tuple[list[Candidate], list[Candidate]]:
    """Dry runs of the best, in their order, until `count` of them fit or time is up; at least one that fits."""
    sure: list[Candidate] = []
    refuted: list[Candidate] = []
    rest = list(fitting)
    while rest and len(sure) < count and not (sure and monotonic() - begun > SECONDS):
        one = rest.pop(0)
        auto = one.config.schedule.name == "auto"
        [dry] = dry_runs([one.config], wanted.hardware, [one.rank] if auto else None, wanted.imbalance)
        found = summary(dry)
        fullest = max(found["ranks"], key=lambda rank: rank["total_bytes"])
        one.total_bytes, one.rank, one.confirmed = fullest["total_bytes"], fullest["rank"], True
        if found["step"] is not None:
            one.ms, one.utilisation = found["step"]["ms"], found["step"]["model_flops_utilisation"]
        _say(f"dry run of {one.config.schedule.name}, pp {one.config.parallel.pp}: {one.ms:,.1f} ms simulated, "
             f"{one.total_bytes / GIB:.1f} GiB counted")  # fmt: skip
        if one.total_bytes <= wanted.memory_gib * GIB:
            sure.append(one)
        else:
            one.why = f"rank {one.rank} needs {one.total_bytes / GIB:.1f} GiB"
            refuted.append(one)
    rest = [one for one in rest if one.total_bytes <= wanted.memory_gib * GIB]
    return sorted(sure, key=lambda c: c.ms) + rest, refuted


def as_data(found: Found, wanted: Question) -> dict[str, Any]:
    """As JSON."""
    return {
        "gpu": wanted.hardware.name,
        "gpus": wanted.gpus,
        "memory_gib": wanted.memory_gib,
        "considered": found.considered,
        "seconds": found.seconds,
        "layouts": [one.row() for one in found.fitting],
        "rejected": [one.row() for one in found.rejected],
        "own": None if found.own is None else found.own.row(),
    }


def _say(text: str) -> None:
    print(f"search: {text}", file=sys.stderr, flush=True)
