"""What a dry run has to know of a job beside what it counts."""

from __future__ import annotations

from typing import NamedTuple

from pipehc.config.schema import Config
from pipehc.schedules import Placement
from pipehc.schedules.deferral import at_once


class Job(NamedTuple):
    """processes: in all. experts: neighbouring processes that share the experts of a layer. microbatches: of one pipeline's step.
    tokens: of a step of all. message_bytes: of a stage message of one micro-batch. half: whether it computes in 16 bits.
    at_once: see `Costs`."""

    residual: str
    schedule: str
    placement: Placement
    processes: int
    experts: int
    microbatches: int
    tokens: int
    message_bytes: int
    half: bool
    at_once: tuple[str, ...] = ()

    @property
    def replicas(self) -> int:
        """Processes that share a stage."""
        return self.processes // self.placement.ranks * self.placement.lanes

    @property
    def mirrored(self) -> bool:
        """Whether mirrored ranks hold the same stages, and do the same."""
        return self.placement.lanes == 2 and self.placement.ranks > 1


def job_of(config: Config, dp: int) -> Job:
    """That of a configuration."""
    parallel, train = config.parallel, config.train
    return Job(
        residual=config.residual.kind,
        schedule=config.schedule.name,
        placement=config.placement,
        processes=parallel.pp * parallel.tp * dp,
        experts=parallel.ep,
        microbatches=config.microbatches(dp),
        tokens=train.global_batch * train.sequence_length,
        message_bytes=config.stage_message_bytes(),
        half=train.precision == "bf16",
        at_once=at_once(config.schedule.deferred),
    )
