"""What a dry run of one rank found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipehc.planning.activations import Activations
from pipehc.planning.dry_run.operations import Operation
from pipehc.planning.dry_run.peaks import Peak
from pipehc.planning.dry_run.tracker import Where


@dataclass(frozen=True)
class RankRun:
    """What one step did on one pipeline rank.

    peaks: the fullest moment of the pipeline and of the optimizer. launches: operations by piece of work. saved: by stage, what the
    first step of the trainer counts. persistent: bytes by category before the step. groups: process groups that it talked over.
    """

    rank: int
    stages: tuple[int, ...]
    microbatches: int
    peaks: dict[str, Peak]
    persistent: dict[str, int]
    launches: dict[Where, Counter[Operation]]
    saved: dict[int, Activations]
    groups: int

    @property
    def peak(self) -> Peak:
        """The fullest moment of the step."""
        return max(self.peaks.values(), key=lambda peak: peak.total)
