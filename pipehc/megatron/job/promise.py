"""What `enable` promised for every loop of the process, and every forward-backward function of ours keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from pipehc.config.schema import ResidualConfig
from pipehc.megatron.job.refusals import refuse_unconverted, refusing_everywhere


class Promise:
    """residual: of all models; None if none was promised. running: whether a function of ours runs."""

    def __init__(self) -> None:
        self.make(None)
        self.running = False

    def make(self, residual: ResidualConfig | None) -> None:
        self.residual = residual
        self._kept: set[nn.Module] = set()

    def check(self, chunks: list[nn.Module]) -> None:
        """ValueError, on every rank, for a model that was built without what was promised. Collective for chunks not seen yet."""
        if self.residual is None or self._kept.issuperset(chunks):
            return
        with refusing_everywhere():
            refuse_unconverted(chunks, self.residual)
        self._kept.update(chunks)


PROMISE = Promise()


def keeping_promise(call: Callable[..., list]) -> Callable[..., list]:
    """Around a method with the contract of Megatron's schedules."""

    @functools.wraps(call)
    def kept(self: Any, **arguments: Any) -> list:
        model = arguments["model"]
        PROMISE.check(model if isinstance(model, list) else [model])
        before, PROMISE.running = PROMISE.running, True
        try:
            return call(self, **arguments)
        finally:
            PROMISE.running = before

    return kept
