"""Schedulers that can be timed: ours here, rivals in `rivals`. Each sets up one rank and runs steps of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from schedule_bench.sleeping import Chain, SleepingStage, Work

from pipehc.comm.groups import edge_groups
from pipehc.comm.messages import Mailbox
from pipehc.schedules import Program, compile
from pipehc.schedules.execute import execute
from pipehc.schedules.schedule import Schedule


@dataclass(frozen=True)
class Job:
    """What is timed: `rank` of `ranks`, `microbatches` a step, `work` of a rank. sources: folders of rivals that no index has."""

    rank: int
    ranks: int
    microbatches: int
    work: Work
    sources: dict[str, str]


class Contender(Protocol):
    """One scheduler, set up on one rank."""

    chains: list[Chain]
    replicas: int  # of the model: each sees microbatches / replicas

    def prepare(self) -> None:
        """Makes the inputs of a step; not timed."""

    def step(self) -> None:
        """One training step. Returns when all work of this rank is done and all its messages have been received."""

    def theory(self) -> Program | None:
        """Its order as our simulator takes it, or None where that has no faithful form."""


Build = Callable[[Job], Contender]


class Ours:
    """A schedule of ours, through our executor. The schedule comes as a CSV file: every rank reads the same."""

    def __init__(self, job: Job, schedule: Schedule) -> None:
        self.program = compile(schedule)
        placement = schedule.placement
        self.replicas = placement.lanes
        work = job.work.split(placement.stages // job.ranks)
        stages = {key: Chain(work, key[1], placement.stages) for key in placement.held(job.rank)}
        self.chains = list(stages.values())
        self.stages = {key: SleepingStage(chain) for key, chain in stages.items()}
        groups = edge_groups([list(range(job.ranks))], self.program.edges())
        self.mailbox = Mailbox(groups, (1, work.numel), torch.float32, timeout_s=60)
        self.instructions = self.program.instructions[job.rank]
        self.observers: list = []

    def prepare(self) -> None: ...

    def step(self) -> None:
        execute(self.instructions, self.program.schedule.placement, self.stages, self.mailbox, self.observers)

    def theory(self) -> Program:
        return self.program
