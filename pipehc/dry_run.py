"""Runs the trainer's own step for single ranks of any job, on tensors without data, in processes without peers, and counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from pipehc.comm.queues import IssueQueue
from pipehc.config.loading import ConfigError, check_world_size
from pipehc.config.schema import Config
from pipehc.config.stages import build_schedule, given_costs
from pipehc.megatron import meta
from pipehc.megatron.trainer.model import StageModel
from pipehc.model.stage import ModelStage
from pipehc.planning.dry_run.counting import counting, persistent
from pipehc.planning.dry_run.hardware import Hardware
from pipehc.planning.dry_run.job import job_of
from pipehc.planning.dry_run.observer import Observer, TellingStage
from pipehc.planning.dry_run.peaks import peak
from pipehc.planning.dry_run.processes import side_by_side
from pipehc.planning.dry_run.rank_run import RankRun
from pipehc.planning.dry_run.shortened import distinct_ranks, one_each, shortened
from pipehc.planning.dry_run.summary import DryRun, assemble
from pipehc.planning.dry_run.tracker import Tracker, Where
from pipehc.schedules import Costs, Schedule, compile
from pipehc.searched import deferred_by, deferring
from pipehc.trainer import Trainer


class _Stage(TellingStage, ModelStage):
    """The trainer's."""


class DryTrainer(Trainer):
    """The trainer on tensors of `tracker.device`, over the peers that `megatron.meta` stands for, without data."""

    stage_type = _Stage

    def __init__(self, config: Config, tracker: Tracker, schedule: Schedule | None = None) -> None:
        self._tracker = tracker
        # Its hardware has links between devices; and what has no data cannot be copied to the host.
        runtime = config.runtime.model_copy(update={"transport": "device"})
        super().__init__(config.model_copy(update={"runtime": runtime}), schedule)
        if self.groups.tp_size > 1:
            tracker.tensor_parallel = self.groups.tp.group_name
        self.queues = dict.fromkeys(("compute", "high", "communication"), IssueQueue())
        self.observers.append(Observer(tracker))
        if self._gain is not None:  # its small product of all maps is made on the host
            finish = self._gain.finish
            self._gain.finish = lambda: self._on_host(finish)  # type: ignore[method-assign]
        self._mark_persistent()
        self.pipeline_peak = tracker.turn(Where("step"))

    def initialise(self, model: StageModel) -> None:
        if self._tracker.device.type != "meta":
            with self._tracker.off():
                super().initialise(model)

    def hosts_wait(self) -> bool:
        """The program of a GPU."""
        return True

    def is_diagnosed(self, step: int) -> bool:
        return False

    def microbatch(self, split: Any, sampler: Any, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.config.train.micro_batch, self.config.train.sequence_length)  # all of it, whatever tp is
        tokens, labels = (torch.zeros(shape, dtype=torch.int64, device=self.device) for _ in range(2))
        return tokens, labels

    def mean_losses(self, losses: list[torch.Tensor], counted: int, step: int, entries: int = 1) -> list[float]:
        self.pipeline_peak = self._tracker.turn(Where("optimizer"))
        return [0.0] * entries

    def _on_host(self, work: Callable[[], float]) -> float:
        with self._tracker.entered(Where("host")):
            return work()

    def _mark_persistent(self) -> None:
        mark = self._tracker.mark
        mark([[*model.parameters(), *model.buffers()] for model in self.models.values()], "parameters")
        for chunk in self.optimizer._chunks:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                mark([buffer.param_data], "parameters")
                mark([buffer.grad_data], "gradients")
        for part in self.optimizer._parts:
            mark([list(state.values()) for state in part.optimizer.state.values()], "optimizer")
            mark(part.shard_fp32_from_float16_groups, "optimizer")
        self._tracker.mark_rest("other")


class Counted(NamedTuple):
    """A step that was run. persistent: bytes by category before it."""

    tracker: Tracker
    trainer: DryTrainer
    persistent: dict[str, int]


def counted(
    config: Config, rank: int, schedule: Schedule | None = None, imbalance: float = 1.0, device: str = "meta", host: bool = False
) -> Counted:
    """One step of pipeline rank `rank` (its first data-parallel replica). Once a process: it becomes that rank for good.

    device, host: see `Tracker`; for comparisons with real tensors.
    """
    parallel = config.parallel
    dp = parallel.dp or config.smallest_dp
    world = parallel.pp * parallel.tp * dp
    check_world_size(config, world)
    tracker = Tracker(torch.device(device), host)
    meta.install(rank * dp * parallel.tp, world, tracker.device, imbalance)
    with counting(tracker):
        trainer = DryTrainer(config, tracker, schedule)
        there = persistent(tracker)
        trainer.step(1, None, None)  # type: ignore[arg-type]
    return Counted(tracker, trainer, there)


def run_rank(
    config: Config, rank: int, schedule: Schedule | None = None, imbalance: float = 1.0, device: str = "meta", host: bool = False
) -> RankRun:
    """What `counted` found, summed up."""
    return summed_up(config, rank, counted(config, rank, schedule, imbalance, device, host))


def summed_up(config: Config, rank: int, run: Counted) -> RankRun:
    tracker, trainer, persistent = run
    moments = {"pipeline": trainer.pipeline_peak, "optimizer": tracker.peak}
    return RankRun(
        rank=rank,
        stages=tuple(sorted(stage for _, stage in trainer.models)),
        microbatches=config.microbatches(config.parallel.dp or config.smallest_dp),
        peaks={name: peak(tracker.history, moment) for name, moment in moments.items()},
        persistent=persistent,
        launches=dict(tracker.launches),
        saved=trainer.own_saved_activations(),
        groups=len(tracker.groups),
    )


class Request(NamedTuple):
    """One rank to run. schedule: None for that of the configuration."""

    config: Config
    rank: int
    schedule: Schedule | None = None
    imbalance: float = 1.0


def run_ranks(requests: Sequence[Request], processes: int | None = None) -> list[RankRun]:
    """Runs each in a process of its own, as `side_by_side` does; the results in their order."""
    return side_by_side(_run, requests, processes)


def _run(request: Request) -> RankRun:
    return run_rank(*request)


def dry_runs(
    configs: Sequence[Config], hardware: Hardware, ranks: Sequence[int] | None = None, imbalance: float = 1.0
) -> list[DryRun]:
    """Dry runs of several configurations, their ranks side by side.

    ranks: pipeline ranks; None: all that differ. imbalance: see `megatron.meta.install`. Raises ConfigError for a configuration
    that does not fit its own sizes.
    """
    prepared, requests = [], []
    for config in configs:
        own = distinct_ranks(config.placement) if ranks is None else list(ranks)
        dp = config.parallel.dp or config.smallest_dp
        check_world_size(config, config.parallel.pp * config.parallel.tp * dp)
        costs = None
        if config.schedule.name == "auto" and given_costs(config) is None:
            costs = costs_for_search(config, hardware, imbalance)
        try:
            schedule = build_schedule(config, config.parallel.pp, config.microbatches(dp), costs=costs)
        except ValueError as error:
            raise ConfigError(f"search: {error}") from error
        searched = schedule if config.schedule.name == "auto" else None
        if searched is not None:
            config = deferring(config, deferred_by(config, schedule, costs))
        prepared.append((config, dp, compile(schedule, recompute=config.recompute.enabled, high=True, hosts_wait=True), len(own)))
        requests += [Request(shortened(config, dp), rank, searched, imbalance) for rank in own]
    found = iter(run_ranks(requests))
    return [assemble(job_of(config, dp), hardware, list(islice(found, count)), program) for config, dp, program, count in prepared]


def costs_for_search(config: Config, hardware: Hardware, imbalance: float = 1.0) -> Costs:
    """What every stage of a configuration with schedule.name auto costs, in ms, before there is a schedule."""
    dp = config.parallel.dp or config.smallest_dp
    check_world_size(config, config.parallel.pp * config.parallel.tp * dp)
    config = deferring(config, None)
    schedule = one_each(config.placement)
    batch = schedule.microbatches * dp * config.train.micro_batch
    short = config.model_copy(update={"train": config.train.model_copy(update={"global_batch": batch})})
    runs = run_ranks([Request(short, rank, schedule, imbalance) for rank in distinct_ranks(config.placement)])
    program = compile(schedule, recompute=config.recompute.enabled, high=True, hosts_wait=True)
    step = assemble(job_of(short, dp), hardware, runs, program).step
    assert step is not None, "every stage was run"
    return step.costs


def plain(config: Config) -> Config:
    """The same with the plain residual."""
    return config.model_copy(update={"residual": config.residual.model_copy(update={"kind": "none", "static": False, "fixed": ()})})
