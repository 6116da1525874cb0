"""One micro-batch on its way through a chain of pieces: forward, rebuilding what was dropped, and backward, piece by piece.

With recomputation the rebuilt pieces run without autograd in the forward. What stays is where rebuilding starts from (block
inputs and the outputs of F), notes that make it cheaper, and what F saves for itself, except where that is the result of a
rebuilt piece: there F's graph keeps its name instead of the tensor, which is looked up when the backward unpacks it. `rebuild`
runs the cheap pieces again, now with autograd and their notes, never F. The backward is the same with and without recomputation,
so its results are equal to the bit.

Pieces run on the queues that they name; every value and gradient carries the event that it is complete after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch

from pipehc.comm.queues import Queue, Work
from pipehc.recompute.chain import PROBE, Chain, Exchange, Notes, Piece, QueueName, Watch
from pipehc.recompute.graph import Graph, record, without
from pipehc.recompute.order import Made, Order
from pipehc.recompute.saved import SavedBytes


class Pass:
    """One micro-batch in a chain. Gradients are on or off as when it is made.

    queues: one of each name that the chain's pieces use. given: the values that no piece makes, complete for what is issued to
    `compute` from now on. recompute: drop what can be rebuilt. scope: entered around each piece that runs with autograd, for
    example to open a store of weight gradients; backward_scope: around the backward of each, called with its node. count: where to
    count the bytes that are kept. watch: told when pieces really run. probe: the value PROBE.
    """

    def __init__(
        self,
        chain: Chain,
        queues: Mapping[str, Queue],
        given: Mapping[str, Any],
        *,
        recompute: bool = False,
        scope: Callable[[], AbstractContextManager[Any]] = nullcontext,
        backward_scope: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        count: SavedBytes | None = None,
        watch: Watch | None = None,
        probe: Any = None,
    ) -> None:
        self._chain, self._queues, self._scope, self._count, self._watch = chain, queues, scope, count, watch
        self._backward_scope = backward_scope
        self._grad = torch.is_grad_enabled()
        self._recompute = recompute and self._grad
        self._values: dict[str, Any] = {**given, PROBE: probe}  # those that the forward still needs
        self._uses = dict(chain.uses)
        self._kept_uses = dict(chain.kept_uses) if self._recompute else {}
        self._kept: dict[str, Any] = {}  # where rebuilding starts from
        self._notes: dict[int, Notes] = {}
        self._rebuilt: dict[str, Any] = {}
        self._rebuilt_uses: dict[str, int] = {}
        self._built: set[int] = set()  # blocks whose cheap pieces have graphs
        self._graphs: dict[int, Graph] = {}
        self._gradients: dict[str, list[torch.Tensor | None]] = {}
        self._order = Order()
        self._ended: dict[QueueName, Made] = {}  # what the backward issued last to each queue
        self._again: dict[str, Made] = {}  # as `_made`, of rebuilt values
        self._owed: dict[str, list[Made]] = {}  # where the parts of a gradient were made
        self._made = dict.fromkeys(given, self._order.mark(queues["compute"]))
        for name, value in self._values.items():
            self._keep(name, value)

    @property
    def host_ahead(self) -> bool:
        """Whether pieces are issued long before they run, as on CUDA."""
        return self._queues["compute"].ahead

    # -- forward

    def forward(self, index: int) -> None:
        """Issues one piece. Pieces come in the order of the chain."""
        piece = self._chain.pieces[index]
        block = self._chain.block_of[index]
        queue = self._queues[piece.queue]
        crossing = self._order.after(queue, [self._made.get(name) for name in piece.inputs])

        def work() -> Callable[[], None] | None:
            inputs = self._take(queue, piece, crossing)
            if isinstance(piece, Exchange):
                if self._grad:
                    self._graphs[index] = Graph((), [], tuple(v for v in inputs if not isinstance(v, torch.Tensor)))
                end = piece.run(*inputs)
                return lambda: self._put(piece, end())
            if not self._grad or not piece.differentiable or (self._recompute and piece.rebuilt):
                with torch.no_grad(), self._taking_notes(index):
                    outputs = piece.run(*inputs)
            else:
                dropped = {}
                if self._recompute:
                    dropped = {
                        value.untyped_storage()._cdata: name
                        for name, value in zip(piece.inputs, inputs)
                        if isinstance(value, torch.Tensor) and value.numel() and self._chain.is_rebuilt(name, block)
                    }
                outputs = self._record(index, piece.run, inputs, dropped)
            self._put(piece, outputs)
            return None

        self._run(queue, "F", index, work)
        made = self._order.mark(queue)
        self._made.update((name, made) for name in piece.outputs)

    def forward_all(self) -> None:
        for index in range(len(self._chain.pieces)):
            self.forward(index)

    def result(self, queue: QueueName = "compute") -> Any:
        """The chain's result, once, complete for what is issued to `queue` from now on. Without autograd: it is detached."""
        name, to = self._chain.result, self._queues[queue]
        [crosses] = self._order.after(to, [self._made[name]])
        to.push()
        assert name in self._values, f"{name} is asked for before it is there: no event orders them"
        value = self._values.pop(name)
        if crosses and isinstance(value, torch.Tensor):
            to.hold(value)
        return value

    # -- backward

    def seed(self, name: str, gradient: torch.Tensor, queue: QueueName = "compute") -> None:
        """Gives the gradient of a value, complete for what is issued to `queue` from now on."""
        self._queues[queue].hold(gradient)
        self._gradients.setdefault(name, []).append(gradient)
        self._owed.setdefault(name, []).append(self._order.mark(self._queues[queue]))

    def rebuild(self, block: int | None = None) -> None:
        """Issues what a block (None: the last, where the backward begins) dropped; nothing if it was not dropped or is back."""
        block = self._chain.block_of[-1] if block is None else block
        if not self._recompute or block in self._built:
            return
        self._built.add(block)
        if self._count is not None:
            self._count.start_block()
        for index in self._chain.rebuilt(block):
            self._rebuild_piece(index, block)

    def backward(self, index: int) -> None:
        """Issues the backward of one piece. Pieces come in reverse order; the first of a block to come rebuilds it if need be."""
        block = self._chain.block_of[index]
        self.rebuild(block)
        piece = self._chain.pieces[index]
        if not piece.differentiable:
            return
        queue = self._queues[piece.queue]
        parts = {name: self._owed.pop(name, []) for name in piece.outputs}
        dropped = [name for name in piece.inputs if self._recompute and not piece.rebuilt and self._chain.is_rebuilt(name, block)]
        sources = [made for owed in parts.values() for made in owed] + [self._again[name] for name in dropped]
        crosses_all = iter(self._order.after(queue, sources))
        crossing = {name: [next(crosses_all) for _ in owed] for name, owed in parts.items()}
        held = list(crosses_all)

        def work() -> Callable[[], None] | None:
            gradients = tuple(self._sum(queue, name, crossing[name]) for name in piece.outputs)
            graph = self._graphs.pop(index)
            for name, crosses in zip(dropped, held):
                if crosses:
                    queue.hold(self._rebuilt[name])
            if isinstance(piece, Exchange):
                end = piece.run_backward(gradients, *graph.constants)
                return lambda: self._give(piece, end())
            with self._backward_scope(piece.node):
                found = graph.backward(gradients)
            for name in dropped:
                self._use_rebuilt(name)
            self._give(piece, found)
            return None

        self._run(queue, "B", index, work)
        made = self._ended[piece.queue] = self._order.mark(queue)
        for name in piece.inputs:
            self._owed.setdefault(name, []).append(made)
        if index == 0:  # W, on `compute`, adds gradients that other queues computed
            self._order.after(self._queues["compute"], list(self._ended.values()))

    def backward_all(self) -> None:
        for index in reversed(range(len(self._chain.pieces))):
            self.backward(index)

    def gradient(self, name: str) -> torch.Tensor | None:
        """The gradient of a given value, complete for what is issued to `compute` from now on."""
        queue = self._queues["compute"]
        return self._sum(queue, name, self._order.after(queue, self._owed.pop(name, [])))

    def _run(self, queue: Queue, kind: Literal["F", "B", "R"], index: int, work: Work) -> None:
        watch = self._watch
        if watch is None:
            queue.run(work)
            return

        def watched() -> Callable[[], None] | None:
            ended = watch(kind, index)
            rest = work()
            if rest is None:
                ended()
                return None

            def finish(rest: Callable[[], None] = rest) -> None:
                rest()
                ended()

            return finish

        queue.run(watched)

    # -- values

    def _take(self, queue: Queue, piece: Piece, crossing: list[bool]) -> list[Any]:
        """The inputs of a piece; those that nobody else needs are forgotten."""
        inputs = []
        for name, crosses in zip(piece.inputs, crossing):
            assert name in self._values, f"{piece.name} starts before its input {name} is there: no event orders them"
            inputs.append(self._values[name])
            if crosses and isinstance(inputs[-1], torch.Tensor):
                queue.hold(inputs[-1])
            self._uses[name] -= 1
            if not self._uses[name]:
                del self._values[name]
        return inputs

    def _put(self, piece: Piece, outputs: tuple[Any, ...]) -> None:
        for name, value in zip(piece.outputs, outputs, strict=True):
            if self._uses.get(name):
                self._values[name] = value.detach() if isinstance(value, torch.Tensor) else value
                self._keep(name, self._values[name])

    def _keep(self, name: str, value: Any) -> None:
        if name not in self._kept_uses:
            return
        self._kept[name] = value
        if self._count is None or not isinstance(value, torch.Tensor):
            return
        if self._chain.enters(name):
            self._count.inputs += self._count.new(value)
        else:
            self._count.outputs += self._count.new(value)

    # -- graphs

    def _record(self, index: int, run: Callable[..., Any], inputs: list[Any], dropped: dict[int, str]) -> tuple[Any, ...]:
        """Runs a piece with autograd, in a graph of its own. dropped: storages that it must not keep."""
        count = None if self._count is None else partial(self._count_saved, self._count, self._chain.pieces[index].rebuilt)
        saving = without(dropped, self._rebuilt.__getitem__, count)
        outputs, self._graphs[index] = record(run, inputs, saving, self._scope())
        return outputs

    def _count_saved(self, count: SavedBytes, rebuilt: bool, tensor: torch.Tensor) -> None:
        if not rebuilt:
            count.by_f += count.new(tensor)
        elif self._recompute:
            count.add_transient(tensor)
        else:
            count.by_rebuilt += count.new(tensor)

    # -- recomputation

    def _rebuild_piece(self, index: int, block: int) -> None:
        piece = self._chain.pieces[index]
        queue = self._queues[piece.queue]
        own = [self._chain.is_rebuilt(name, block) for name in piece.inputs]
        crossing = self._order.after(queue, [(self._again if again else self._made).get(n) for n, again in zip(piece.inputs, own)])

        def work() -> None:
            inputs = []
            for name, again, crosses in zip(piece.inputs, own, crossing):
                value = self._use_rebuilt(name) if again else self._use_kept(name)
                if crosses and isinstance(value, torch.Tensor):
                    queue.hold(value)
                inputs.append(value)
            with self._notes.pop(index, nullcontext()):
                outputs = self._record(index, self._chain.again(index), inputs, {})
            for name, value in zip(piece.outputs, outputs, strict=True):
                uses = self._chain.uses_in_block(name, block)
                if not uses:
                    continue
                self._rebuilt[name], self._rebuilt_uses[name] = value, uses
                if isinstance(value, torch.Tensor):
                    self._rebuilt[name] = value.detach()
                    if self._count is not None:
                        self._count.add_transient(value)

        self._run(queue, "R", index, work)
        made = self._order.mark(queue)
        self._again.update((name, made) for name in piece.outputs)

    @contextmanager
    def _taking_notes(self, index: int) -> Iterator[None]:
        make = self._chain.pieces[index].notes
        if make is None or not self._recompute:
            yield
            return
        notes = self._notes[index] = make()
        with notes:
            yield
        if self._count is not None:
            self._count.by_rebuilt += sum(map(self._count.new, notes.tensors()))

    def _use_kept(self, name: str) -> Any:
        value = self._kept[name]
        self._kept_uses[name] -= 1
        if not self._kept_uses[name]:
            del self._kept[name]
        return value

    def _use_rebuilt(self, name: str) -> Any:
        assert name in self._rebuilt, f"{name} is used before it is rebuilt: no event orders them"
        value = self._rebuilt[name]
        self._rebuilt_uses[name] -= 1
        if not self._rebuilt_uses[name]:
            del self._rebuilt[name]
        return value

    # -- gradients

    def _sum(self, queue: Queue, name: str, crossing: list[bool]) -> torch.Tensor | None:
        """The gradient of a value: the sum over its uses, latest use first."""
        parts = self._gradients.pop(name, [])
        assert len(parts) == len(crossing), f"the gradient of {name} is used before it is there: no event orders them"
        total: torch.Tensor | None = None
        for part, crosses in zip(parts, crossing):
            if part is None:
                continue
            if crosses:
                queue.hold(part)
            total = part if total is None else total + part
        return total

    def _give(self, piece: Piece, gradients: Any) -> None:
        for name, gradient in zip(piece.inputs, gradients, strict=True):
            self._gradients.setdefault(name, []).append(gradient)
