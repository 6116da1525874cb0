"""`auto` as the source of a job's schedule: rank 0 searches it, for costs that are given or come from a dry run of the job."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipehc.comm.first import from_first
from pipehc.config.strict_yaml import ConfigError
from pipehc.megatron.job.option_values import is_positive, is_whole, refuse_unless
from pipehc.planning.dry_run.cached_costs import NoCosts, cached_costs, gpu_here
from pipehc.planning.dry_run.hardware import load_hardware
from pipehc.schedules import Costs, Placement, Schedule
from pipehc.schedules.auto import SEARCHED, AutoReport, auto_report
from pipehc.schedules.families.forward import forward_only as forward_rows


class _Found(NamedTuple):
    report: AutoReport
    costs: str  # where they come from, in words


class Searched:
    """Over one placement. The clock may end a search, so the other ranks take what rank 0 found."""

    name = "auto"

    def __init__(
        self,
        costs: Costs | None = None,
        gpu: str | None = None,
        placement: str = "linear",
        max_live: float | None = None,
        time_limit: float = 10.0,
        seed: int = 0,
    ) -> None:
        refuse_unless(costs is None or isinstance(costs, Costs), "costs", costs, "a Costs of pipehc.schedules, or None")
        refuse_unless(gpu is None or isinstance(gpu, str), "gpu", gpu, "a hardware file's name or path, or None")
        known = isinstance(placement, str) and placement in SEARCHED
        refuse_unless(known, "placement", placement, f"one of {', '.join(SEARCHED)}")
        refuse_unless(max_live is None or is_positive(max_live), "max_live", max_live, "a number above 0, or None")
        refuse_unless(is_positive(time_limit), "time_limit", time_limit, "a number of seconds above 0")
        refuse_unless(is_whole(seed, 0), "seed", seed, "a whole number from 0 on")
        if gpu is not None:
            refuse_unless(costs is None, "gpu", gpu, "None beside costs: it is for a dry run, which finds them")
            try:
                load_hardware(gpu, "gpu =")
            except ConfigError as error:
                raise ValueError(str(error)) from error
        self.costs, self._gpu, self._placement = costs, gpu, placement
        self._options: dict[str, Any] = {"max_live": max_live, "time_limit": time_limit, "seed": seed}
        self._found: dict[int, _Found] = {}  # by micro-batches

    def placement(self, ranks: int) -> Placement:
        return SEARCHED[self._placement](ranks)

    def build(self, ranks: int, microbatches: int, forward_only: bool) -> Schedule:
        if forward_only:
            placement = self.placement(ranks)
            return Schedule(self.name, placement, microbatches, forward_rows(placement, microbatches), forward_only=True)
        if microbatches not in self._found:
            try:
                self._found[microbatches] = from_first(lambda: self._search(ranks, microbatches))
            except ValueError as error:
                raise ValueError(f"schedule = 'auto': {error}") from error
        return self._found[microbatches].report.schedule

    def check(self, ranks: int, microbatches: int) -> None:
        auto_report(ranks, microbatches, Costs(), placements=(self._placement,), **self._options | {"time_limit": 0.01})

    def search(self, ranks: int, microbatches: int, costs: Costs) -> AutoReport:
        return auto_report(ranks, microbatches, costs, placements=(self._placement,), **self._options)

    def origin(self, microbatches: int) -> str:
        if microbatches not in self._found:
            return ""
        report, costs = self._found[microbatches]
        bound = "proven the best" if report.optimal else f"at most {report.gap:.1%} from the best possible"
        named = "no named schedule fits"
        if report.named is not None:
            named = f"{report.named_makespan / report.makespan - 1:.1%} faster than {report.named}"
        if report.schedule.name == report.named:
            named = f"it is {report.named}"
        return f"searched over the {self._placement} placement from {costs}: {named}, {bound}"

    def _search(self, ranks: int, microbatches: int) -> _Found:
        if self.costs is not None:
            return _Found(self.search(ranks, microbatches, self.costs), f"costs {_values(self.costs)}")
        gpu = self._gpu or gpu_here(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
        try:
            costs, words = _of_dry_run(gpu), f"the costs of the job's own dry run on {gpu} (modelled)"
        except NoCosts as error:
            costs = Costs()
            words = f"costs {_values(costs)}, a guess (costs=Costs(...) gives others; no dry run: {error})"
        return _Found(self.search(ranks, microbatches, costs), words)


def _of_dry_run(gpu: str) -> Costs:
    """Of the script that runs here, which must be one of megatron.training. Raises NoCosts."""
    script = Path(sys.argv[0])
    training = sys.modules.get("megatron.training.global_vars")
    if training is None or training._GLOBAL_ARGS is None or script.suffix != ".py" or not script.is_file():
        raise NoCosts("this is no script that calls megatron.training's pretrain()")
    world = dist.get_world_size()
    arguments = ["-m", "pipehc.megatron.job.dry_run", "--gpu", gpu, "--nproc-per-node", str(world), *sys.argv]
    identity = {
        "kind": "job", "script": str(script.resolve()), "text": hashlib.sha256(script.read_bytes()).hexdigest(),
        "arguments": sys.argv[1:], "world": world, "gpu": load_hardware(gpu).model_dump(),
    }  # fmt: skip
    return cached_costs(arguments, identity)


def _values(costs: Costs) -> str:
    if costs.by_stage:
        return f"of {costs.stages} stages, as given"
    return ", ".join(
        f"{f.name} = {_short(getattr(costs, f.name))}"
        for f in fields(costs)
        if f.name in ("f", "b", "w") or getattr(costs, f.name) != f.default
    )


def _short(value: Any) -> str:
    """Four digits of a number, or of each in nested tuples."""
    return f"({', '.join(map(_short, value))})" if isinstance(value, tuple) else f"{value:.4g}"
