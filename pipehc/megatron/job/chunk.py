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
from megatron.core.utils import make_viewless_tensor, unwrap_model
from torch import nn

from pipehc.comm.queues import Queue
from pipehc.megatron.connection import PlainConnection
from pipehc.megatron.job.batches import Batches, OneItem
from pipehc.megatron.job.flags import LAYOUT
from pipehc.megatron.job.grad_sync import finish_gathers
from pipehc.megatron.job.models import LAYERS, HybridStack, final_norm, hands_on
from pipehc.megatron.job.position import acting_at
from pipehc.megatron.layer import HyperConnectionLayer, refuse_layer
from pipehc.megatron.nodes import CONTEXT_ARGUMENTS, LayerNodes, node_blocks
from pipehc.model.probe import Probe
from pipehc.model.stage import ChainStage, NodeWatch
from pipehc.model.sublayers import CONTEXT, Sublayer, build_chain
from pipehc.model.wgrad import WeightGradStore
from pipehc.recompute import Chain, Pass, Piece, cut
from pipehc.recompute.chain import QueueName
from pipehc.recompute.graph import run_backward

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
class ChunkLive:
    """One micro-batch between its forward and its backward."""

    store: WeightGradStore
    run: Pass = field(init=False)
    head: torch.Tensor | None = None  # what the decoder took from the embedding, with its graph
    leaf: torch.Tensor | None = None  # what the decoder's chain made: the start of the tail's graph
    tail: torch.Tensor | None = None  # what came of it: the loss, or the message if something was done to it


def wrappers(chunk: nn.Module) -> Iterator[nn.Module]:
    """DDP and mixed-precision wrappers around the model, from outside."""
    while chunk is not unwrap_model(chunk):
        yield chunk
        chunk = chunk.module  # type: ignore[assignment]


def decoder_chain(decoder: Any, block: int | None) -> Chain:
    """The layers of a decoder, in recompute blocks of at most `block` sub-layers (None: all of them one block).

    Raises ValueError for layers that it cannot take apart, or if there are none.
    """
    if not decoder.layers:
        raise ValueError(f"a model chunk without transformer layers: every stage needs at least one; change {LAYOUT}")
    for layer in decoder.layers:
        if not isinstance(layer, HyperConnectionLayer) and type(layer) not in LAYERS:
            raise ValueError(f"{type(layer).__name__}: our schedules take TransformerLayer apart, and no other class of layers")
    sublayers: list[Sublayer] = []
    for layer, block_of_nodes in zip(decoder.layers, node_blocks(decoder.layers)):
        if isinstance(layer, HyperConnectionLayer):
            sublayers += layer.sublayers(block_of_nodes)
        else:
            refuse_layer(layer)
            nodes = LayerNodes(layer, single=isinstance(decoder, HybridStack))
            sublayers += nodes.sublayers([PlainConnection() for _ in nodes.kinds], block_of_nodes)
    first, last = decoder.layers[0], decoder.layers[-1]
    expand = getattr(first, "expand", lambda x: x)
    entry = Piece("expand", lambda x: (expand(x),), (INPUT,), ("x0",))
    streams = f"x{len(sublayers)}"
    exit = None
    if getattr(last, "contracts", False):
        exit = Piece("contract", lambda x: (last.contract(x),), (streams,), ("contracted",))
    return build_chain(sublayers, cut(len(sublayers), block), entry, exit)


class ChunkStage(ChainStage):
    """The micro-batches of one call on one chunk.

    chunk: the model as the job has it, in its wrappers. place: (pipeline rank, vp_stage) that Megatron's own rule gives to the
    stage. ends: whether it is the first, whether the last.
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
        watch: NodeWatch | None,
        probe: Probe | None = None,
    ) -> None:
        super().__init__(chain, queues, recompute, watch, None, probe)
        self.chunk, self.step = chunk, step
        self._model: Any = unwrap_model(chunk)
        self.decoder: Any = self._model.decoder
        self._position, self._vp_stage = place
        self._first, self._last = ends
        self._batches = batches
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

    # -- forward

    def run_forward(self, microbatch: int, x: torch.Tensor | None, issue: Callable[[Pass], None]) -> torch.Tensor | None:
        """Runs the job's forward step; inside, the decoder hands its pass to `issue`. Returns the message, complete for `high`."""
        step, report = self.step, self.reported.setdefault(microbatch, [])
        live = ChunkLive(WeightGradStore())
        self._current = microbatch, live, issue
        iterator = None if self._batches is None else OneItem(self._batches, microbatch)
        first = schedules.check_first_val_step(step.first_val_step, step.forward_only, self._started == 0)
        if self._started == 0 and not step.forward_only:
            finish_gathers(self.chunk)
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
        leaf = live.leaf
        if leaf is not None and output is leaf:
            live.leaf = None
            return leaf.detach()
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
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name not in CONTEXT_ARGUMENTS:
                raise ValueError(f"{name}: must be None under our schedules, which do not hand it to the decoder's layers")
        microbatch, live, issue = self._current
        decoder = self.decoder
        x = hidden_states if decoder.pre_process else decoder.input_tensor
        if decoder.pre_process and x.requires_grad:
            live.head = x
        context = {"attention_mask": attention_mask, **given}
        values = {INPUT: x.detach(), CONTEXT: context}
        live.run = self._pass(microbatch, values, live.store)
        issue(live.run)
        leaf: torch.Tensor = live.run.result("high" if self._untouched else "compute").detach().requires_grad_()
        live.leaf = leaf
        norm = final_norm(decoder)
        if norm is None:
            return leaf
        normed = norm(leaf)
        return make_viewless_tensor(inp=normed, requires_grad=True, keep_graph=True)

    @property
    def _untouched(self) -> bool:
        """Whether nothing is done to the decoder's result but sending it: then it need not wait for the compute queue."""
        return not self._last and final_norm(self.decoder) is None and hands_on(self._model)

    # -- backward

    def start_backward(self, microbatch: int, grad: torch.Tensor | None) -> Any:
        live: ChunkLive = self._live.pop(microbatch)
        queue: QueueName = "high"
        if live.tail is not None:
            tail, live.tail = live.tail, None
            if self._last and self.step.config.grad_scale_func is not None:
                tail = self.step.config.grad_scale_func(tail)
            if grad is not None:  # complete for the high-priority queue
                self._queues["compute"].wait(self._queues["high"].event())
                self._queues["compute"].hold(grad)
            run_backward(tail, grad)
            live.store.compute()  # the output layer's: to defer it would keep the gradient of the logits
            assert live.leaf is not None
            # A loss may not depend on the model: an empty batch.
            grad = torch.zeros_like(live.leaf) if live.leaf.grad is None else live.leaf.grad
            live.leaf, queue = None, "compute"
        assert grad is not None
        live.run.seed(self.chain.result, grad, queue)
        self._deferred[microbatch] = live.store
        return live

    def end_backward(self, live: ChunkLive) -> torch.Tensor | None:
        gradient = live.run.gradient(INPUT)
        if not self._first:
            return gradient
        if live.head is not None:
            run_backward(live.head, gradient)
        return None
