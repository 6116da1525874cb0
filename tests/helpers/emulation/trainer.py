"""The trainer on an emulated device."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tiny_model import micro_batch

from emulation import groups
from emulation.device import Device, Temper
from emulation.launch import Launches
from emulation.queue import Skip, make_queues, never
from pipehc.comm.queues import make_queues as host_queues
from pipehc.schedules import compile
from pipehc.trainer import Trainer


class EmulatedTrainer(Trainer):
    """Its groups are emulated ones (`groups.register`). Batches are random, equal for equal numbers."""

    def microbatch(self, split: Any, sampler: Any, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        return micro_batch(self.config, first)

    def compile(self, hosts_wait: bool) -> None:
        """The program for streams that share hardware queues, or for those that do not."""
        schedule = self.train_program.schedule
        self.train_program = compile(schedule, recompute=self.config.recompute.enabled, high=True, hosts_wait=hosts_wait)

    def gradients(self, launches: Launches | None, skip: Skip = never, steps: Sequence[int] = (1, 2)) -> list[dict[str, Any]]:
        """Loss, figures of the streams and gradients of some steps from the present weights, on a device, or on the host (None)."""
        if launches is None:
            self.queues = host_queues(self.device)
            return [self._gradients(step) for step in steps]
        self.queues, groups.current = make_queues(launches, skip), launches
        try:
            with launches.launching():
                return [self._gradients(step) for step in steps]
        finally:
            groups.current = None

    def _gradients(self, step: int) -> dict[str, Any]:
        self.optimizer.zero_grad()
        streams, first = self._stream_figures(), step * self.config.train.global_batch
        losses = self._execute(self.train_program, self._chains, None, None, first, streams.probes)  # type: ignore[arg-type]
        loss = torch.stack(losses).double().sum(0) if losses else torch.zeros(())  # whatever it is: compared, not refused
        for tensor in streams.tensors():
            self.queues["compute"].hold(tensor)
        streams.start(self.device)
        self.optimizer.reduce_gradients()
        seen = dict(zip(("maps of the streams", "norms of the streams"), streams.sums()))
        return {"loss": loss, **seen} | {name: gradient.clone() for name, gradient in self.optimizer.gradients().items()}


def emulated(rank: int, world_size: int, port: int) -> None:
    """Makes the default group, and all others, emulated ones."""
    groups.register()
    new_group = dist.new_group
    dist.new_group = lambda *given, **named: new_group(*given, **named | {"backend": "emulated"})
    address, limit = f"tcp://127.0.0.1:{port}", timedelta(seconds=120)
    dist.init_process_group("emulated", rank=rank, world_size=world_size, init_method=address, timeout=limit)


def launches(seed: int, **temper: Any) -> Launches:
    return Launches(Device(seed, Temper(**temper)))


def differing(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Names of what is not equal to the bit."""
    return [
        name
        for a, b in zip(found, expected, strict=True)
        for name in b
        if not (torch.equal(a[name], b[name]) if isinstance(b[name], torch.Tensor) else a[name] == b[name])
    ]
