"""Searches for the fastest layout over a number of GPUs: costs composed from small dry runs, the best confirmed by whole ones."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any, NamedTuple

import torch

from pipehc.config.loading import ConfigError
from pipehc.config.schema import Config
from pipehc.dry_run import counted, dry_runs, summed_up
from pipehc.planning.dry_run.hardware import Hardware
from pipehc.planning.dry_run.summary import summary
from pipehc.planning.search.candidate import Candidate, balanced, candidate, fill_memory, fill_step, searched
from pipehc.planning.search.footprint import footprints
from pipehc.planning.search.layouts import layouts
from pipehc.planning.search.units import Composer, Unit, UnitRun, unit_config, unit_of

GIB = 2**30
LISTED = 8  # the fastest that fit, and as many that do not
CONFIRMED = 3
MARGIN = 1.05  # composed memory is near that of a dry run: this much above the limit, the dry run decides
SECONDS = 150.0  # after which no further dry run begins


class Found(NamedTuple):
    """fitting: fastest first, the confirmed ones before the others. rejected: those that seemed faster, but do not fit."""

    fitting: list[Candidate]
    rejected: list[Candidate]
    considered: int
    seconds: float


def search_layouts(
    config: Config, gpus: int, memory_gib: float, hardware: Hardware, imbalance: float = 1.0, confirmed: int = CONFIRMED
) -> Found:
    """The layouts of `config` over `gpus` GPUs with `memory_gib` GiB each.

    confirmed: how many dry runs to make of whole layouts. Raises ConfigError, with one sentence, if there is none that passes the
    checks, or none that fits.
    """
    begun = monotonic()
    wanted = list(layouts(config, gpus))
    if not wanted:
        raise ConfigError(
            f"--gpus {gpus}: no layout passes the checks of the configuration: pp x dp must be {gpus}, with pp at most "
            f"model.blocks = {config.model.blocks}, and micro_batch x dp must divide train.global_batch = {config.train.global_batch}"
        )
    candidates, rejected = _candidates(wanted, config, memory_gib, hardware, imbalance)
    fitting, full = _fitting(candidates, memory_gib, hardware)
    rejected += full
    if fitting and monotonic() - begun < SECONDS:
        fitting = _with_searched(fitting, memory_gib, hardware, candidates)
    fitting, refuted = _confirm(fitting, memory_gib, hardware, imbalance, confirmed, begun)
    rejected += refuted
    if not fitting:
        least = min(rejected, key=lambda c: c.total_bytes)
        raise ConfigError(
            f"--memory {memory_gib:g}: none of {len(wanted)} layouts over {gpus} GPUs fits: the smallest found needs "
            f"{least.total_bytes / GIB:.1f} GiB (pp {least.config.parallel.pp}, ep {least.config.parallel.ep}, "
            f"{least.config.schedule.name})"
        )
    rejected = [c for c in rejected if (c.ms or c.bound_ms) < fitting[0].ms]
    rejected.sort(key=lambda c: c.ms or c.bound_ms)
    for one in rejected[:LISTED]:
        one.ms or _try_step(one, hardware)
    return Found(fitting[:LISTED], rejected[:LISTED], len(candidates.all), monotonic() - begun)


class _Candidates(NamedTuple):
    all: list[Candidate]
    composers: dict[Unit, Composer]


def _candidates(
    wanted: Sequence[Config], config: Config, memory_gib: float, hardware: Hardware, imbalance: float
) -> tuple[_Candidates, list[Candidate]]:
    """What all layouts come to that can fit, and the others."""
    units = {unit_of(one): one for one in wanted}
    first = unit_of(config) if unit_of(config) in units else next(iter(units))
    composers = _composers(config, [first], hardware, imbalance)
    hopeless = [one for one in wanted if composers[first].persistent_bytes(one) > MARGIN * memory_gib * GIB]
    left = [one for one in wanted if one not in _Same(hopeless)]
    needed = dict.fromkeys(unit_of(one) for one in left)
    _say(f"{len(wanted)} layouts, {len(hopeless)} of them too large; dry runs of {len(needed)} small models")
    composers |= _composers(config, [unit for unit in needed if unit != first], hardware, imbalance)
    found = []
    for one in left:
        composer = composers[unit_of(one)]
        found.append(candidate(one, composer))
        if (other := balanced(found[-1], composer)) is not None:
            found.append(candidate(other, composer))
    rejected = [candidate(one, composers[first]) for one in hopeless if unit_of(one) == first] if not left else []
    for one in rejected:
        one.total_bytes, one.why = composers[first].persistent_bytes(one.config), "parameters, gradients and optimizer alone"
    if not left and not rejected:
        smallest = min(hopeless, key=composers[first].persistent_bytes)
        rejected = [Candidate(smallest, composers[first](smallest), 0.0, composers[first].persistent_bytes(smallest))]
    return _Candidates(found, composers), rejected


class _Same:
    """Membership by identity: a configuration takes long to compare."""

    def __init__(self, configs: Iterable[Config]) -> None:
        self._ids = {id(config) for config in configs}

    def __contains__(self, config: Config) -> bool:
        return id(config) in self._ids


def _composers(config: Config, units: Sequence[Unit], hardware: Hardware, imbalance: float) -> dict[Unit, Composer]:
    if not units:
        return {}
    context = multiprocessing.get_context("fork")
    with context.Pool(min(len(units), os.cpu_count() or 1), maxtasksperchild=1) as pool:
        runs = pool.map(_run_unit, [(unit_config(config, unit), imbalance) for unit in units], chunksize=1)
    return {unit: Composer(run, hardware) for unit, run in zip(units, runs)}


def _run_unit(request: tuple[Config, float]) -> UnitRun:
    torch.set_num_threads(1)
    config, imbalance = request
    run = counted(config, 0, imbalance=imbalance)
    return UnitRun(config, summed_up(config, 0, run), footprints(run.tracker.history, microbatch=1))


def _fitting(found: _Candidates, memory_gib: float, hardware: Hardware) -> tuple[list[Candidate], list[Candidate]]:
    """Those that fit, fastest first, and those that do not; from the smallest bound on, until no other can be among the best."""
    fitting: list[Candidate] = []
    full: list[Candidate] = []
    for one in sorted(found.all, key=lambda c: c.bound_ms):
        if len(fitting) >= LISTED and one.bound_ms > sorted(c.ms for c in fitting)[LISTED - 1]:
            break
        fill_memory(one, hardware)
        if one.total_bytes > MARGIN * memory_gib * GIB:
            one.why = f"rank {one.rank} needs {one.total_bytes / GIB:.1f} GiB"
            full.append(one)
        else:
            fill_step(one, hardware)
            fitting.append(one)
    _say(f"{len(fitting)} layouts simulated, {len(full)} do not fit, no other can be faster than the best {LISTED}")
    return sorted(fitting, key=lambda c: c.ms), full


def _try_step(one: Candidate, hardware: Hardware) -> None:
    fill_step(one, hardware)


def _with_searched(fitting: list[Candidate], memory_gib: float, hardware: Hardware, found: _Candidates) -> list[Candidate]:
    """With searched schedules for the best layout."""
    best = fitting[0]
    composer = found.composers[unit_of(best.config)]
    for config in searched(best, hardware, composer, min(10.0, best.config.search.time_limit)):
        one = candidate(config, composer)
        fill_memory(one, hardware)
        if one.total_bytes <= MARGIN * memory_gib * GIB:
            fill_step(one, hardware)
            fitting.append(one)
    _say("searched schedules compared for the best layout")
    return sorted(fitting, key=lambda c: c.ms)


def _confirm(
    fitting: list[Candidate], memory_gib: float, hardware: Hardware, imbalance: float, wanted: int, begun: float
) -> tuple[list[Candidate], list[Candidate]]:
    """Dry runs of the best, in their order, until `wanted` of them fit or time is up; at least one that fits."""
    sure: list[Candidate] = []
    refuted: list[Candidate] = []
    rest = list(fitting)
    while rest and len(sure) < wanted and not (sure and monotonic() - begun > SECONDS):
        one = rest.pop(0)
        auto = one.config.schedule.name == "auto"
        [dry] = dry_runs([one.config], hardware, [one.rank] if auto else None, imbalance)
        found = summary(dry)
        fullest = max(found["ranks"], key=lambda rank: rank["total_bytes"])
        one.total_bytes, one.rank, one.confirmed = fullest["total_bytes"], fullest["rank"], True
        if found["step"] is not None:
            one.ms, one.utilisation = found["step"]["ms"], found["step"]["model_flops_utilisation"]
        _say(f"dry run of {one.config.schedule.name}, pp {one.config.parallel.pp}: {one.ms:,.1f} ms simulated, "
             f"{one.total_bytes / GIB:.1f} GiB counted")  # fmt: skip
        if one.total_bytes <= memory_gib * GIB:
            sure.append(one)
        else:
            one.why = f"rank {one.rank} needs {one.total_bytes / GIB:.1f} GiB"
            refuted.append(one)
    rest = [one for one in rest if one.total_bytes <= memory_gib * GIB]
    return sorted(sure, key=lambda c: c.ms) + rest, refuted


def as_data(found: Found, gpus: int, memory_gib: float, hardware: Hardware) -> dict[str, Any]:
    """As JSON."""
    return {
        "gpu": hardware.name,
        "gpus": gpus,
        "memory_gib": memory_gib,
        "considered": found.considered,
        "seconds": found.seconds,
        "layouts": [one.row() for one in found.fitting],
        "rejected": [one.row() for one in found.rejected],
    }


def _say(text: str) -> None:
    print(f"search: {text}", file=sys.stderr, flush=True)
