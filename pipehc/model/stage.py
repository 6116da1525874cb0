"""A stage as the schedule's executor sees it: forward, input gradient, weight gradient, per micro-batch; and pairs of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from pipehc.comm.queues import Queue
from pipehc.model.overlap import Half, overlap
from pipehc.model.probe import Probe
from pipehc.model.sublayers import CONTEXT
from pipehc.model.wgrad import WeightGradStore
from pipehc.recompute import Chain, Exchange, Pass, SavedBytes
from pipehc.recompute.chain import QueueName
from pipehc.schedules.pair_order import WEIGHTED, kind_of

Batch = Callable[[int], tuple[torch.Tensor, torch.Tensor]]

# Told that work of a node starts: its action, micro-batch, BLOCK.KIND, and where it runs; `high` for the first or last piece of an
# action that has that queue. Returns what is called when the work has ended.
NodeWatch = Callable[[Literal["F", "B", "R", "W"], int, str, QueueName], Callable[[], None]]


@dataclass
class Live:
    """One micro-batch between its forward and its backward."""

    store: WeightGradStore
    run: Pass


class ChainStage(ABC):
    """Runs a chain for the micro-batches of one step; implements `pipehc.schedules.execute.OverlapStage`.

    Its programs are compiled with `high`: the end of the last FFN, in both directions, is on that queue.
    chain: of the stage. queues: see `comm.queues.make_queues`. recompute: drop after the forward what hyper-connections can
    rebuild. watch: see NodeWatch. count: counts what is kept for the first micro-batch. probe: looks at micro-batch 0, if it
    comes this way. at_once: kinds of nodes whose weight gradients `backward_input` computes itself, rather than leave them to
    `backward_weight`. With gradients switched off, only `forward` may be called.
    """

    def __init__(
        self,
        chain: Chain,
        queues: Mapping[str, Queue],
        recompute: bool,
        watch: NodeWatch | None,
        count: SavedBytes | None,
        probe: Probe | None = None,
        at_once: Collection[str] = (),
    ) -> None:
        self._at_once = at_once
        self.chain, self._queues, self._recompute, self._watch, self._count = chain, queues, recompute, watch, count
        self._probe = probe
        self._live: dict[int, Any] = {}
        self._deferred: dict[int, WeightGradStore] = {}

    @abstractmethod
    def run_forward(self, microbatch: int, x: torch.Tensor | None, issue: Callable[[Pass], None]) -> torch.Tensor | None:
        """Makes the pass of a micro-batch, lets `issue` run all of its forward, and returns what the next stage gets."""

    @abstractmethod
    def start_backward(self, microbatch: int, grad: torch.Tensor | None) -> Live:
        """A pass that has the gradient of its result. Its weight gradients are owed until `backward_weight`."""

    @abstractmethod
    def end_backward(self, live: Any) -> torch.Tensor | None:
        """What the stage before gets, once all of the backward is issued."""

    def forward(self, microbatch: int, x: torch.Tensor | None) -> torch.Tensor | None:
        return self.run_forward(microbatch, x, Pass.forward_all)

    def backward_input(self, microbatch: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        live = self.start_backward(microbatch, grad)
        if not self._at_once:
            live.run.backward_all()
            return self.end_backward(live)
        live.store.around, pieces = self.around(microbatch), self.chain.pieces
        for index in reversed(range(len(pieces))):
            live.run.backward(index)
            if not index or not isinstance(pieces[index - 1], Exchange):  # beside the all-to-all that its node ends with
                live.store.compute(lambda node: kind_of(node) in self._at_once)
        return self.end_backward(live)

    def backward_weight(self, microbatch: int) -> None:
        store = self._deferred.pop(microbatch)
        store.around = self.around(microbatch)
        store.flush(self._queues["compute"].hold)

    def around(self, microbatch: int) -> Callable[[str], AbstractContextManager[object]]:
        """What weight gradients that no turn of a pair computes are computed in, by node."""
        return nullcontext

    def recompute(self, microbatch: int) -> None:
        self._live[microbatch].run.rebuild()

    def overlap(
        self, microbatch: int, x: torch.Tensor | None, other: ChainStage, other_microbatch: int, grad: torch.Tensor | None
    ) -> Overlapped:
        return Overlapped(self, microbatch, x, other, other_microbatch, grad)

    def flush(self, microbatch: int, store: WeightGradStore, node: str) -> None:
        """Computes the weight gradients owed so far by a node, and by those that have no turn of their own."""
        ended = None if self._watch is None else self._watch("W", microbatch, node, "compute")
        store.compute(lambda owed: owed == node or kind_of(owed) not in WEIGHTED)
        if ended is not None:
            ended()

    def _pass(self, microbatch: int, given: Mapping[str, Any], store: WeightGradStore) -> Pass:
        watch = None if self._watch is None else partial(self._piece, self._watch, microbatch)
        count, self._count = self._count, None
        scopes: dict[str, Any] = {"scope": store.deferring, "backward_scope": store.receiving}
        probe = self._probe if microbatch == 0 else None
        return Pass(self.chain, self._queues, given, recompute=self._recompute, **scopes, count=count, watch=watch, probe=probe)

    def _piece(self, watch: NodeWatch, microbatch: int, kind: Literal["F", "B", "R"], index: int) -> Callable[[], None]:
        piece, last = self.chain.pieces[index], self.chain.nodes[-1]
        at_an_end = kind != "R" and last.start <= index
        queue: QueueName = "compute" if piece.queue == "high" and not at_an_end else piece.queue
        return watch(kind, microbatch, piece.node, queue)


class ModelStage(ChainStage):
    """A stage of our trainer's model.

    chain: of a StageModel; its result is the streams, or what the last stage makes: the summed loss, that and those of depths, or
    that and hits. batch: micro-batch -> (tokens, labels), both int64 [b, s]; asked by the first and the last stage alone.
    loss_scale: the factor of the losses in the backward, for example 1 / labels of the global batch that count.
    """

    def __init__(
        self,
        chain: Chain,
        queues: Mapping[str, Queue],
        batch: Batch,
        loss_scale: float,
        *,
        recompute: bool = False,
        watch: NodeWatch | None = None,
        count: SavedBytes | None = None,
        probe: Probe | None = None,
        at_once: Collection[str] = (),
    ) -> None:
        super().__init__(chain, queues, recompute, watch, count, probe, at_once)
        self._batch, self._loss_scale = batch, loss_scale
        needed = {name for piece in chain.pieces for name in piece.inputs}
        self._wanted = needed & {"tokens", "labels"}
        self._first, self._last = "x0" in chain.maker, "labels" in needed
        self.losses: dict[int, torch.Tensor] = {}  # micro-batch -> the last stage's result, unscaled

    def run_forward(self, microbatch: int, x: torch.Tensor | None, issue: Callable[[Pass], None]) -> torch.Tensor | None:
        given: dict[str, Any] = {CONTEXT: None}
        if x is not None:
            given["x0"] = x
        if self._wanted:
            batch = dict(zip(("tokens", "labels"), self._batch(microbatch), strict=True))
            given |= {name: batch[name] for name in self._wanted}
        store = WeightGradStore()
        live = Live(store, self._pass(microbatch, given, store))
        issue(live.run)
        y: torch.Tensor = live.run.result("compute" if self._last else "high")
        if torch.is_grad_enabled():
            self._live[microbatch] = live
        if self._last:
            self.losses[microbatch] = y
            return None
        return y

    def start_backward(self, microbatch: int, grad: torch.Tensor | None) -> Live:
        live: Live = self._live.pop(microbatch)
        if self._last:
            grad = torch.full_like(self.losses[microbatch], self._loss_scale)
        assert grad is not None
        live.run.seed(self.chain.result, grad, "compute" if self._last else "high")
        self._deferred[microbatch] = live.store
        return live

    def end_backward(self, live: Live) -> torch.Tensor | None:
        return None if self._first else live.run.gradient("x0")


class Overlapped:
    """A forward on one stage and the backward of another micro-batch on a stage of this rank, interleaved."""

    def __init__(
        self,
        stage: ChainStage,
        microbatch: int,
        x: torch.Tensor | None,
        other: ChainStage,
        other_microbatch: int,
        grad: torch.Tensor | None,
    ) -> None:
        self._forward = partial(stage.run_forward, microbatch, x, self._interleave)
        self._stage, self._other, self._other_microbatch = stage, other, other_microbatch
        self._back = other.start_backward(other_microbatch, grad)
        self._steps: Iterator[str] | None = None
        self._issued: set[str] = set()
        self._output: torch.Tensor | None = None

    def output(self) -> torch.Tensor | None:
        """Goes on until the forward's result is there, and returns it."""
        self._begin()
        output, self._output = self._output, None
        return output

    def input_gradient(self) -> torch.Tensor | None:
        """Goes on until the input gradient is there, and returns it."""
        self._begin()
        self._until("gradient")
        return self._other.end_backward(self._back)

    def finish(self) -> None:
        """Does the rest. Weight gradients that are still owed then are left to `backward_weight`."""
        self._begin()
        self._until("end")

    def _begin(self) -> None:
        if self._steps is None:
            self._output = self._forward()

    def _interleave(self, run: Pass) -> None:
        halves = Half(self._stage.chain, run), Half(self._other.chain, self._back.run)
        self._steps = overlap(*halves, partial(self._other.flush, self._other_microbatch, self._back.store))
        self._until("output")

    def _until(self, what: str) -> None:
        assert self._steps is not None
        while what not in self._issued:
            self._issued.add(next(self._steps))
