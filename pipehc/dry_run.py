"""Runs the trainer's own step for single ranks of any job, on tensors without data, in processes without peers, and counts."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: a dry run is that of a GPU, whether there is one or not

import torch

from pipehc.comm.queues import IssueQueue
from pipehc.config.loading import check_world_size
from pipehc.config.schema import Config
from pipehc.kernels.language import noting
from pipehc.megatron import meta
from pipehc.megatron.trainer.model import StageModel
from pipehc.model.stage import ModelStage
from pipehc.planning.activations import Activations
from pipehc.planning.dry_run.operations import Operation
from pipehc.planning.dry_run.peaks import Peak, peak
from pipehc.planning.dry_run.tracker import Tracker, Where
from pipehc.schedules import Schedule
from pipehc.schedules.program import Instruction, Run
from pipehc.trainer import Trainer
from pipehc.watch.trace import Node


@dataclass(frozen=True)
class RankRun:
    """What one step did on one pipeline rank.

    peaks: the fullest moment of the pipeline and of the optimizer. launches: operations by piece of work. saved: by stage, what the
    first step of the trainer counts. persistent: bytes by category before the step.
    """

    rank: int
    stages: tuple[int, ...]
    microbatches: int
    peaks: dict[str, Peak]
    persistent: dict[str, int]
    launches: dict[Where, Counter[Operation]]
    saved: dict[int, Activations]


class _Observer:
    """Tells a tracker where the program is: in a node of an action, else in an instruction."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def begin(self, instruction: Instruction) -> None:
        if isinstance(instruction, Run):
            kind, stage, microbatch, _ = instruction.action
            self._tracker.enter(Where("B" if kind == "I" else kind, stage, microbatch))
        else:
            self._tracker.enter(Where("step", node=type(instruction).__name__))

    def end(self, instruction: Instruction) -> None:
        self._tracker.leave()

    def node(self, of: Node) -> Callable[[], None]:
        self._tracker.enter(Where(of.kind, of.stage, of.microbatch, of.name))
        return self._tracker.leave


class _Stage(ModelStage):
    """Tells its W even where it is a part of a B."""

    def backward_weight(self, microbatch: int) -> None:
        assert self._watch is not None
        ended = self._watch("W", microbatch, "", "compute")
        super().backward_weight(microbatch)
        ended()


class DryTrainer(Trainer):
    """The trainer on tensors of `tracker.device`, over the peers that `megatron.meta` stands for, without data."""

    stage_type = _Stage

    def __init__(self, config: Config, tracker: Tracker, schedule: Schedule | None = None) -> None:
        self._tracker = tracker
        super().__init__(config, schedule)
        self.queues = dict.fromkeys(("compute", "high", "communication"), IssueQueue())
        self.observers.append(_Observer(tracker))
        if self._gain is not None:  # its small product of all maps is made on the host
            finish = self._gain.finish
            self._gain.finish = lambda: self._on_host(finish)  # type: ignore[method-assign]
        self._mark_persistent()
        self.pipeline_peak = tracker.turn(Where("step"))

    def initialise(self, model: StageModel) -> None:
        if self._tracker.device.type != "meta":
            with self._tracker.off():
                super().initialise(model)

    def microbatch(self, split: Any, sampler: Any, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.config.train.micro_batch, self.config.train.sequence_length)
        tokens, labels = (torch.zeros(shape, dtype=torch.int64, device=self.device) for _ in range(2))
        return tokens, labels

    def mean_loss(self, losses: Sequence[torch.Tensor], tokens_in_all: int, step: int) -> float:
        self.pipeline_peak = self._tracker.turn(Where("optimizer"))
        return 0.0

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


def run_rank(
    config: Config, rank: int, schedule: Schedule | None = None, imbalance: float = 1.0, device: str = "meta", host: bool = False
) -> RankRun:
    """One step of pipeline rank `rank` (its first data-parallel replica). Once a process: it becomes that rank for good.

    device, host: see `Tracker`; for comparisons with real tensors.
    """
    parallel = config.parallel
    dp = parallel.dp or config.smallest_dp
    world = parallel.pp * parallel.tp * dp
    check_world_size(config, world)
    tracker = Tracker(torch.device(device), host)
    meta.install(rank * dp * parallel.tp, world, tracker.device, imbalance)
    gc.collect()
    gc.freeze()
    gc.disable()  # what a cycle holds is alive, in every run alike
    with tracker, noting(tracker.note_kernel):
        trainer = DryTrainer(config, tracker, schedule)
        persistent = Counter[str]()
        for block in tracker.history:
            if block.died is None:
                persistent[str(block.category)] += block.nbytes
        trainer.step(1, None, None)  # type: ignore[arg-type]
    moments = {"pipeline": trainer.pipeline_peak, "optimizer": tracker.peak}
    return RankRun(
        rank=rank,
        stages=tuple(sorted(stage for _, stage in trainer.models)),
        microbatches=config.microbatches(dp),
        peaks={name: peak(tracker.history, moment) for name, moment in moments.items()},
        persistent=dict(persistent),
        launches=dict(tracker.launches),
        saved=trainer.own_saved_activations(),
    )
