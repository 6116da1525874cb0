"""The trainer's schedule: a family's, or one that rank 0 searches, for costs that are given or come from a dry run."""

from __future__ import annotations

import tempfile
from typing import NamedTuple

import torch

from pipehc.comm.first import from_first
from pipehc.config.loading import ConfigError, to_yaml
from pipehc.config.schema import Config
from pipehc.config.stages import build_schedule, given_costs
from pipehc.planning.dry_run.cached_costs import NoCosts, cached_costs, gpu_here
from pipehc.planning.dry_run.hardware import load_hardware
from pipehc.schedules import Costs, Schedule, compile
from pipehc.schedules.deferral import parts_to_defer

# Of these sections and keys the costs of a stage are made.
_DEPENDS = ("model", "residual", "parallel", "schedule", "recompute", "runtime")


class Found(NamedTuple):
    """origin: where a searched schedule comes from, in words; else empty. deferred: see `schedules.deferral`."""

    schedule: Schedule
    origin: str
    deferred: tuple[str, ...] | None


def training_schedule(config: Config, microbatches: int, dp: int) -> Found:
    """The schedule of a training step. Collective, if it is searched: that ends by the clock, so rank 0 does it for all.

    Raises ConfigError on all ranks where nothing can be found.
    """
    ranks = config.parallel.pp
    if config.schedule.name != "auto":
        return Found(build_schedule(config, ranks, microbatches), "", config.schedule.deferred)

    def search() -> Found:
        costs, origin = _costs(config, dp)
        schedule = build_schedule(config, ranks, microbatches, costs=costs)
        deferred = deferred_by(config, schedule, costs)
        left = "" if deferred is None else f"; split backwards defer the weight gradients of {' and '.join(deferred) or 'nothing'}"
        return Found(schedule, f"searched for {origin}{left}", deferred)

    try:
        return from_first(search)
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith("search.") else f"search: {text}") from error


def deferred_by(config: Config, schedule: Schedule, costs: Costs | None) -> tuple[str, ...] | None:
    """What split backwards of a searched schedule defer: what the configuration says, else what pays by the costs of nodes."""
    if config.schedule.deferred is not None or costs is None or not costs.nodes:
        return config.schedule.deferred
    return parts_to_defer(compile(schedule, recompute=config.recompute.enabled, high=True), costs)


def deferring(config: Config, deferred: tuple[str, ...] | None) -> Config:
    """The configuration with another `schedule.deferred`."""
    return config.model_copy(update={"schedule": config.schedule.model_copy(update={"deferred": deferred})})


def _costs(config: Config, dp: int) -> tuple[Costs | None, str]:
    """With where they come from, in words."""
    if given_costs(config) is not None:
        return None, "the costs of the section search"
    gpu = config.search.gpu or gpu_here(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    hardware = load_hardware(gpu, "search.gpu:")
    single = config.model_copy(update={"parallel": config.parallel.model_copy(update={"dp": dp})})
    single = deferring(single, None)
    data = single.model_dump(mode="json")
    train = {key: data["train"][key] for key in ("micro_batch", "sequence_length", "precision")}
    identity = {name: data[name] for name in _DEPENDS}
    identity |= {"placement": config.search.placement, "train": train, "gpu": hardware.model_dump(), "kind": "trainer"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(to_yaml(single))
        file.flush()
        arguments = ["-m", "pipehc.plan", "--config", file.name, "--dry-run", "--gpu", gpu]
        try:
            return cached_costs(arguments, identity), f"the costs of its own dry run on {gpu} (modelled)"
        except NoCosts as error:
            return None, f"costs of 1 for F, B and W each, since its dry run failed: {error}"
