"""A model chunk of a Megatron job as a stage of our schedules.

Its own forward runs as the user wrote it; what lies between the ends of its decoder is a chain of nodes, which can be rebuilt,
deferred and interleaved.

    embedding -> | decoder: the chain | -> final norm, output head, loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from torch import nn

from pipehc.comm.queues import Queue
from pipehc.megatron.batches import Batches, OneItem
from pipehc.megatron.connection import PlainConnection
from pipehc.megatron.layer import HyperConnectionLayer, refuse_layer
from pipehc.megatron.nodes import LayerNodes
from pipehc.megatron.position import acting_at
from pipehc.overlap import Half, overlap
from pipehc.recompute import Chain, Pass, Piece, cut
from pipehc.recompute.chain import QueueName
from pipehc.sublayers import CONTEXT, Sublayer, build_chain
from pipehc.wgrad import WeightGradStore

INPUT = "hidden"
"""The chain's value that comes from the embedding or the stage before, [s, b, C] or [s, b, n*C]."""


@dataclass
class ForwardStep:
    """What one call of a forward-backward function gives to its stages, by Megatron's names."""

    function: Callable[..., Any]
    config: Any
    num_microbatches: int
    cp_size: int
    collect_non_loss_data: bool
    first_val_step: bool | None
    forward_only: bool


@dataclass
class Live:
    """One micro-batch between its forward and its backward."""

    store: WeightGradStore
    run: Pass = field(init=False)
    head: torch.Tensor | None = None  # what the decoder took from the embedding, with its graph
    leaf: torch.Tensor | None = None  # what the decoder's chain made: the start of the tail's graph
    tail: torch.Tensor | None = None  # what came of it: the loss, or the message if something was done to it


def unwrap(chunk: nn.Module) -> Any:
    """The model inside DDP and mixed-precision wrappers."""
    while not hasattr(chunk, "decoder") and hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def decoder_chain(decoder: TransformerBlock, block: int | None) -> Chain:
    """The layers of a decoder, in recompute blocks of at most `block` sub-layers (None: all of them one block).

    Raises ValueError for layers that it cannot take apart, or if there are none.
    """
    if not decoder.layers:
        raise ValueError("a model chunk without transformer layers: every stage needs at least one; change the pipeline layout")
    sublayers: list[Sublayer] = []
    for layer in decoder.layers:
        if isinstance(layer, HyperConnectionLayer):
            sublayers += layer.sublayers()
        elif isinstance(layer, TransformerLayer) and type(layer).__name__ in ("TransformerLayer", "MoETransformerLayer"):
            refuse_layer(layer)
            sublayers += LayerNodes(layer).sublayers(PlainConnection(), PlainConnection())
        else:
            raise ValueError(f"{type(layer).__name__}: our schedules take TransformerLayer apart, and no other class of layers")
    first, last = decoder.layers[0], decoder.layers[-1]
    expand = getattr(first, "expand", lambda x: x)
    entry = Piece("expand", lambda x: (expand(x),), (INPUT,), ("x0",))
    streams = f"x{len(sublayers)}"
    exit = None
    if getattr(last, "contracts", False):
        exit = Piece("contract", lambda x: (last.contract(x),), (streams,), ("contracted",))
    return build_chain(sublayers, cut(len(sublayers), block), entry, exit)


class ChunkStage:
    """Implements `pipehc.schedules.execute.OverlapStage`, for the micro-batches of one call.

    chunk: the model as the job has it, in its wrappers. place: (pipeline rank, vp_stage) that Megatron's own rule gives to the
    stage. Programs are compiled with `high`: what the decoder makes is complete for the high-priority queue, and for the compute
    queue where anything is done to it afterwards.
    """

    def __init__(
        self,
        chunk: nn.Module,
        chain: Chain,
        place: tuple[int, int | None],
        ends: tuple[bool, bool],
        queues: Mapping[str, Queue],
        step: ForwardStep,
        batches: Batches | None,
        *,
        recompute: bool,
    ) -> None:
        self.chunk, self.chain, self.step = chunk, chain, step
        self.decoder: Any = unwrap(chunk).decoder
        self._position, self._vp_stage = place
        self._first, self._last = ends
        self._queues, self._batches, self._recompute = queues, batches, recompute
        self._live: dict[int, Live] = {}
        self._deferred: dict[int, WeightGradStore] = {}
        self._started = 0
        self.reported: dict[int, list[Any]] = {}  # micro-batch -> what the loss function reports, on the last stage
        self.tokens: Any = 0

    @contextmanager
    def intercepted(self) -> Iterator[None]:
        """Inside, the decoder's forward is the chain of whatever micro-batch is on its way."""
        if self.step.forward_only:
            yield
            return
        self.decoder.forward = self._decode
        try:
            yield
        finally:
            del self.decoder.forward

    # -- what the executor calls

    def forward(self, microbatch: int, x: torch.Tensor | None) -> torch.Tensor | None:
        return self._forward(microbatch, x, Pass.forward_all)

    def backward_input(self, microbatch: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        live = self.start_backward(microbatch, grad)
        live.run.backward_all()
        return self.end_backward(live)

    def backward_weight(self, microbatch: int) -> None:
        self._deferred.pop(microbatch).flush()

    def recompute(self, microbatch: int) -> None:
        self._live[microbatch].run.rebuild()

    def overlap(
        self, microbatch: int, x: torch.Tensor | None, other: ChunkStage, other_microbatch: int, grad: torch.Tensor | None
    ) -> OverlappedChunks:
        return OverlappedChunks(self, microbatch, x, other, other_microbatch, grad)

    # -- forward

    def _forward(self, microbatch: int, x: torch.Tensor | None, issue: Callable[[Pass], None]) -> torch.Tensor | None:
        """Runs the job's forward step; inside, the decoder hands its pass to `issue`. Returns the message, complete for `high`."""
        step, report = self.step, self.reported.setdefault(microbatch, [])
        live = Live(WeightGradStore())
        self._current = live, issue
        iterator = None if self._batches is None else OneItem(self._batches, microbatch)
        first = schedules.check_first_val_step(step.first_val_step, step.forward_only, self._started == 0)
        self._started += 1
        with acting_at(self._position), live.store.deferring():
            output, tokens = schedules.forward_step(
                step.function, iterator, self.chunk, step.num_microbatches, x, report, step.config,
                step.cp_size, step.collect_non_loss_data, None, first, current_microbatch=microbatch,
                vp_stage=self._vp_stage, is_last_stage=self._last,
            )  # fmt: skip
        self.tokens = self.tokens + tokens
        if step.forward_only:
            return None if self._last else self._for_high(output.detach())
        self._live[microbatch] = live
        if self._last:
            live.tail = output
            return None
        if output is live.leaf:
            live.leaf = None
            message: torch.Tensor = output.detach()
            return message
        live.tail = output
        return self._for_high(output.detach())

    def _for_high(self, message: torch.Tensor) -> torch.Tensor:
        """A message made on the compute queue, for what is issued to the high-priority queue from now on."""
        high = self._queues["high"]
        high.wait(self._queues["compute"].event())
        high.hold(message)
        return message

    def _decode(self, hidden_states: Any, attention_mask: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
        """In the place of the decoder's forward."""
        unknown = [name for name in ("inference_context", "inference_params", "extract_layer_indices") if given.get(name)]
        if unknown:
            raise ValueError(f"{unknown[0]}: is not supported under our schedules in training")
        live, issue = self._current
        decoder = self.decoder
        x = hidden_states if decoder.pre_process else decoder.input_tensor
        if decoder.pre_process and x.requires_grad:
            live.head = x
        context = {"attention_mask": attention_mask, **{name: value for name, value in given.items() if value is not None}}
        values = {INPUT: x.detach(), CONTEXT: context}
        live.run = Pass(self.chain, self._queues, values, recompute=self._recompute, scope=live.store.deferring)
        issue(live.run)
        leaf: torch.Tensor = live.run.result("high" if self._untouched else "compute").detach().requires_grad_()
        live.leaf = leaf
        if decoder.final_layernorm is None:
            return leaf
        normed = decoder.final_layernorm(leaf)
        return make_viewless_tensor(inp=normed, requires_grad=True, keep_graph=True)

    @property
    def _untouched(self) -> bool:
        """Whether nothing is done to the decoder's result but sending it: then it need not wait for the compute queue."""
        return not self._last and self.decoder.final_layernorm is None and type(unwrap(self.chunk)).__name__ == "GPTModel"

    # -- backward

    def start_backward(self, microbatch: int, grad: torch.Tensor | None) -> Live:
        """A pass that has the gradient of its result. Its weight gradients are owed until `backward_weight`."""
        live = self._live.pop(microbatch)
        queue: QueueName = "high"
        if live.tail is not None:
            tail, live.tail = live.tail, None
            if self._last and self.step.config.grad_scale_func is not None:
                tail = self.step.config.grad_scale_func(tail)
            torch.autograd.backward(tail, grad)
            assert live.leaf is not None
            # A loss may not depend on the model: an empty batch.
            grad = torch.zeros_like(live.leaf) if live.leaf.grad is None else live.leaf.grad
            live.leaf, queue = None, "compute"
        assert grad is not None
        live.run.seed(self.chain.result, grad, queue)
        self._deferred[microbatch] = live.store
        return live

    def end_backward(self, live: Live) -> torch.Tensor | None:
        """What the stage before gets, once all of the backward is issued."""
        gradient = live.run.gradient(INPUT)
        if not self._first:
            return gradient
        if live.head is not None:
            torch.autograd.backward(live.head, gradient)
        return None


class OverlappedChunks:
    """A forward on one chunk and the backward of another micro-batch on a chunk of this rank, interleaved inside the decoders."""

    def __init__(
        self,
        stage: ChunkStage,
        microbatch: int,
        x: torch.Tensor | None,
        other: ChunkStage,
        other_microbatch: int,
        grad: torch.Tensor | None,
    ) -> None:
        self._stage, self._microbatch, self._x, self._other = stage, microbatch, x, other
        self._back = other.start_backward(other_microbatch, grad)
        self._steps: Iterator[str] | None = None
        self._issued: set[str] = set()
        self._output: torch.Tensor | None = None

    def output(self) -> torch.Tensor | None:
        """Goes on until the forward's result is there, and returns it."""
        if self._steps is None:
            self._output = self._stage._forward(self._microbatch, self._x, self._interleave)
        output, self._output = self._output, None
        return output

    def input_gradient(self) -> torch.Tensor | None:
        """Goes on until the input gradient is there, and returns it."""
        assert self._steps is not None, "the forward of a pair comes first"
        self._until("gradient")
        return self._other.end_backward(self._back)

    def finish(self) -> None:
        """Does the rest. Weight gradients that are still owed then are left to `backward_weight`."""
        self._until("end")

    def _interleave(self, run: Pass) -> None:
        halves = Half(self._stage.chain, run), Half(self._other.chain, self._back.run)
        self._steps = overlap(*halves, self._back.store.flush)
        self._until("output")

    def _until(self, what: str) -> None:
        assert self._steps is not None
        while what not in self._issued:
            self._issued.add(next(self._steps))
