"""What a job is told at its first step: that pipehc is on, with what, and what is off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from pipehc.megatron.layer import hyper_connection_layers
from pipehc.schedules import Program
from pipehc.schedules.program import Run


def announce(text: str) -> None:
    """One line in the log, from rank 0."""
    if dist.get_rank() == 0:
        print(f"pipehc: {text}", flush=True)


@dataclass
class Setup:
    """How a `ForwardBackward` runs a program. See `forward_backward_func` for what the fields mean.

    asked: the schedule's name as the job gave it. origin: where it comes from, in words, or empty. message: of a stage, in words.
    """

    program: Program
    asked: str
    origin: str
    message: str
    recompute_block: int | None
    overlap: bool
    trace_steps: tuple[int, int] | None
    trace_folder: Any
    nvtx: bool
    timeout_s: float
    watchdog_folder: Any
    diagnostics_interval: int
    diagnostics_folder: Any

    def text(self, chunks: Sequence[nn.Module]) -> str:
        """chunks: this rank's."""
        on, off = [self._schedule(), residual(chunks)], []
        program = self.program
        runs = [i for rows in program.instructions for i in rows if isinstance(i, Run)]
        if any(run.action.kind == "R" for run in runs):
            block = "all sub-layers of a chunk" if self.recompute_block is None else f"{self.recompute_block} sub-layers"
            on.append(f"recomputation in blocks of {block}")
        else:
            off.append("recomputation")
        if not any(run.pair is not None for run in runs):
            off.append("overlapped pairs (this schedule has none)")
        elif self.overlap:
            on.append("overlapped pairs")
        else:
            off.append("overlapped pairs (overlap = False)")
        on.append(self.message)
        if self.trace_steps is None:
            off.append("traces (trace_steps)")
        else:
            on.append(f"traces of iterations {self.trace_steps[0]} to {self.trace_steps[1]} in {self.trace_folder}/")
        if self.diagnostics_interval:
            on.append(f"figures of the streams every {self.diagnostics_interval} iterations in {self.diagnostics_folder}/")
        else:
            off.append("figures of the streams (diagnostics_interval)")
        (on if self.nvtx else off).append("profiler ranges (nvtx)")
        on.append(f"reports of waits over {self.timeout_s:g} s in {self.watchdog_folder}/")
        return f"on; {'; '.join(on)}" + (f". Off: {', '.join(off)}" if off else "")

    def _schedule(self) -> str:
        schedule = self.program.schedule
        placement = schedule.placement
        directions = " in two directions" if placement.lanes == 2 else ""
        origin = f" ({self.origin})" if self.origin else ""
        what = "evaluation under schedule" if schedule.forward_only else "schedule"
        return (
            f"{what} {self.asked}{origin}, {placement.stages} stages{directions} over {placement.ranks} ranks, "
            f"{schedule.microbatches} micro-batches a step"
        )


def megatrons_own(ranks: int, virtual_stages: int | None, chunks: Sequence[nn.Module]) -> str:
    """The text where Megatron's own schedule runs."""
    kind = "no pipeline" if ranks == 1 else "1F1B" if virtual_stages is None else f"interleaved, {virtual_stages} stages a rank"
    layers = hyper_connection_layers(chunks)
    wide = f", stage messages {layers[0].streams} times as wide" if layers and ranks > 1 else ""
    return (
        f"on; Megatron's own schedule ({kind}) over {ranks} ranks{wide}; {residual(chunks)}. Off: our schedules, and with them "
        "recomputation, overlapped pairs, traces, profiler ranges and reports of waits"
    )


def residual(chunks: Sequence[nn.Module]) -> str:
    layers = hyper_connection_layers(chunks)
    if not layers:
        return "residual connections as the job has them"
    return f"residual {layers[0].residual.kind}, {layers[0].streams} streams"
