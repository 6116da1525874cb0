"""Recordings and profiler ranges of a job's steps, as our own trainer makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipehc.comm.messages import Mailbox
from pipehc.comm.queues import Queue
from pipehc.megatron.job.iteration import Iterations
from pipehc.schedules import Program
from pipehc.watch.markers import Markers
from pipehc.watch.trace import Recorder, save_step


@dataclass
class Tracing:
    """steps: first and last iteration of the job to record. folder: for the files. nvtx: open ranges. step: the newest one."""

    steps: tuple[int, int] | None
    folder: Path
    nvtx: bool
    step: int = 0
    iterations: Iterations = field(default_factory=Iterations)
    _markers: Markers | None = None

    def observers(
        self,
        forward_only: bool,
        rank: int,
        device: torch.device,
        queues: Mapping[str, Queue],
        held: Sequence[tuple[int, int]],
    ) -> list[Any]:
        """Those of the call that begins. held: (lane, stage) of the chunks of this rank."""
        if self.nvtx and self._markers is None:
            self._markers = Markers(held)
        found: list[Any] = [] if self._markers is None else [self._markers]
        if not forward_only:
            self.step = self.iterations.next()
            if self.steps is not None and self.steps[0] <= self.step <= self.steps[1]:
                found.append(Recorder(rank, device, queues))
        return found

    @contextmanager
    def recording(
        self, observers: Sequence[Any], mailbox: Mailbox, program: Program, pipelines: Sequence[Sequence[int]], recompute: bool
    ) -> Iterator[None]:
        """Around the call; writes a file a pipeline if it is recorded. Collective then."""
        recorder = next((o for o in observers if isinstance(o, Recorder)), None)
        if recorder is None:
            yield
            return
        with recorder.attached(mailbox):
            yield
        own = dist.get_rank()
        pipeline = next(i for i, ranks in enumerate(pipelines) if own in ranks)
        save_step(recorder, program, self.step, self.folder, (pipeline, pipelines[pipeline].index(own)), recompute=recompute)
