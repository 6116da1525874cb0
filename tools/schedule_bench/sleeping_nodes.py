"""Stages of blocks with experts whose nodes sleep, or compute, and one rank that records its steps, for `check_simulator`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipehc.comm.groups import edge_groups
from pipehc.comm.messages import Mailbox
from pipehc.comm.queues import make_queues
from pipehc.model.stage import ModelStage
from pipehc.model.wgrad import Accumulate, linear
from pipehc.recompute import Chain, Exchange, Piece
from pipehc.schedules import Schedule, compile
from pipehc.schedules.execute import execute
from pipehc.watch.trace import Recorder, node_watch, save_step


@dataclass(frozen=True)
class Work:
    """ms of a forward, and of each half of a backward, on stage 0; `slope`: how much longer each stage takes than the one before.

    compute: at work all the time, rather than asleep; all-to-alls always sleep, beside whatever else there is.
    """

    blocks: int = 2
    attention: float = 5.0
    mlp: float = 6.0
    move: float = 2.0
    post: float = 0.6
    slope: float = 0.05
    compute: bool = False

    def chain(self, stage: int, stages: int) -> Chain:
        factor = 1e-3 * (1 + self.slope * stage)
        pieces: list[Piece] = []
        for block in range(self.blocks):
            names = {name: f"{block}.{name}" for name in ("attention", "dispatch", "mlp", "combine", "mlp_post")}
            x, a, b, c, d, y = _values(block)
            pieces += [
                Piece("attention", self._work(self.attention * factor), (x,), (a,), names["attention"]),
                self._exchange(names["dispatch"], a, b),
                Piece("mlp", self._work(self.mlp * factor), (b,), (c,), names["mlp"]),
                self._exchange(names["combine"], c, d),
                Piece("post", self._post(self.post * factor), (d,), (y,), names["mlp_post"], queue="high"),
            ]
        last, result = pieces[-1], f"x{self.blocks}"
        if stage == 0:
            pieces.insert(0, Piece("embedding", lambda tokens: (tokens.clone(),), ("tokens",), ("x0",), pieces[0].node))
        if stage == stages - 1:
            pieces.append(Piece("loss", lambda x, labels: ((x * labels).sum(),), (result, "labels"), ("loss",), last.node))
        return Chain([pieces], "loss" if stage == stages - 1 else result)

    def _spend(self, seconds: float) -> None:
        if self.compute:
            end, a = time.perf_counter() + seconds, torch.ones(32, 32)
            while time.perf_counter() < end:
                a = (a @ a).clamp(max=1.0)
        else:
            time.sleep(seconds)

    def _work(self, seconds: float) -> Callable[[torch.Tensor], tuple[torch.Tensor]]:
        weight = torch.ones(1, 1, requires_grad=True)
        spend = self._spend

        def run(x: torch.Tensor) -> tuple[torch.Tensor]:
            return (linear(_Spent.apply(x, seconds, spend), weight, Accumulate(lambda gradient: spend(seconds))),)

        return run

    def _post(self, seconds: float) -> Callable[[torch.Tensor], tuple[torch.Tensor]]:
        return lambda x: (_Spent.apply(x, seconds, self._spend),)

    def _exchange(self, node: str, source: str, target: str) -> Exchange:
        def start(values: Sequence[torch.Tensor]) -> Callable[[], tuple[Any, ...]]:
            there = time.monotonic() + 1e-3 * self.move
            found = tuple(value.clone() for value in values)

            def end() -> tuple[Any, ...]:
                time.sleep(max(0.0, there - time.monotonic()))
                return found

            return end

        return Exchange(
            node, lambda *values: start(values), (source,), (target,), node, queue="communication",
            run_backward=lambda gradients: start(gradients),
        )  # fmt: skip


def _values(block: int) -> tuple[str, ...]:
    """Names of the values of a block, from its input to its output."""
    return f"x{block}", f"a{block}", f"b{block}", f"c{block}", f"d{block}", f"x{block + 1}"


class _Spent(torch.autograd.Function):
    """The identity, which takes `seconds` in both directions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float, spend: Callable[[float], None]) -> torch.Tensor:
        ctx.seconds, ctx.spend = seconds, spend
        spend(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        ctx.spend(ctx.seconds)
        return dy.clone(), None, None


def record(rank: int, store: str, schedules: dict[str, Schedule], work: Work, steps: int, folder: Path, realtime: bool) -> None:
    """One rank: runs every schedule, once to warm up and then `steps` times; files are folder/NAME/step-NNNNNN.json."""
    torch.set_num_threads(1)
    ranks = next(iter(schedules.values())).ranks
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    if realtime:
        with contextlib.suppress(PermissionError):
            for thread in os.listdir("/proc/self/task"):
                os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(1))
    queues, one = make_queues(torch.device("cpu")), torch.ones(1, 1)
    for name, schedule in schedules.items():
        program, placement = compile(schedule, high=True), schedule.placement
        mailbox = Mailbox(edge_groups([list(range(ranks))], program.edges()), (1, 1), torch.float32, timeout_s=60)
        for step in range(1 + steps):
            recorder = Recorder(rank, torch.device("cpu"), {})
            stages = {
                key: ModelStage(
                    work.chain(key[1], placement.stages), queues, lambda m: (one, one), 1.0, watch=node_watch([recorder], *key)
                )
                for key in placement.held(rank)
            }
            dist.barrier()
            with recorder.attached(mailbox):
                execute(program.instructions[rank], placement, stages, mailbox, [recorder], True, queues)
            if step:
                save_step(recorder, program, step, folder / name, (0, rank), recompute=False)
    dist.barrier()
    dist.destroy_process_group()
