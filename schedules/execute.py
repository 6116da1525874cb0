"""Walks one rank's compiled program. Knows nothing of models: a stage is an object with the methods of `Stage`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from pipehc.comm.messages import Mailbox
from pipehc.comm.queues import HostQueue, Queue, join
from pipehc.schedules.actions import Action
from pipehc.schedules.placement import Placement
from pipehc.schedules.program import Instruction, Post, Run, Send, Wait, inputs_first

Key = tuple[str, int, int, int]  # activation or gradient, lane, receiving stage, micro-batch


class Stage(Protocol):
    """What the executor calls. Tensors are stage messages; None is the first stage's input and the last one's gradient."""

    def forward(self, microbatch: int, x: torch.Tensor | None) -> torch.Tensor | None:
        """Runs the stage and keeps what its backward needs. Returns the message for the next stage; on the last stage None."""

    def backward_input(self, microbatch: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        """I: the gradient of the input (None on the first stage), weight gradients deferred until `backward_weight`."""

    def backward_weight(self, microbatch: int) -> None:
        """W: accumulates the weight gradients that I deferred."""

    def recompute(self, microbatch: int) -> None:
        """R: rebuilds what the forward dropped."""


class Overlapped(Protocol):
    """A pair on its way: each method goes on until its result is there."""

    def output(self) -> torch.Tensor | None:
        """What `Stage.forward` would return."""

    def input_gradient(self) -> torch.Tensor | None:
        """What `Stage.backward_input` would return."""

    def finish(self) -> None:
        """The rest; weight gradients that it does not compute are left to `Stage.backward_weight`."""


@runtime_checkable
class OverlapStage(Stage, Protocol):
    """A stage that can interleave its forward with the backward of another one."""

    def overlap(
        self, microbatch: int, x: torch.Tensor | None, other: Any, other_microbatch: int, grad: torch.Tensor | None
    ) -> Overlapped:
        """Begins a pair: the forward of `microbatch` here, the backward of `other_microbatch` on `other`, a stage of this rank."""


class Observer(Protocol):
    """Told about every instruction on the thread that executes it: recorders, watchdogs, markers for profilers."""

    def begin(self, instruction: Instruction) -> None:
        """The instruction is next."""

    def end(self, instruction: Instruction) -> None:
        """It is done; not called if it raised."""


class _Value(NamedTuple):
    """A stage message and the queue that it is complete on; the program's events say when others may use it."""

    tensor: torch.Tensor | None
    queue: Queue

    def on(self, queue: Queue) -> torch.Tensor | None:
        """The message, about to be used on `queue`."""
        if queue is not self.queue and self.tensor is not None:
            queue.hold(self.tensor)
        return self.tensor


def execute(
    instructions: Sequence[Instruction],
    placement: Placement,
    stages: Mapping[tuple[int, int], Stage],
    mailbox: Mailbox,
    observers: Sequence[Observer] = (),
    overlap: bool = True,
    queues: Mapping[str, Queue] | None = None,
) -> None:
    """Runs one step of one rank.

    stages: by (lane, stage), all that the placement puts on this rank. observers: see `Observer`. overlap: interleave pairs if all
    stages can; else the forward of a pair runs before its backward. queues: `compute` and `high`; those that stages use. A stage's
    input is complete for what is issued to the queue `entry` of the instruction that runs it, and its result for the queue `exit`.
    Returns when every message it sent has been received; `compute` then waits for the other queues. A full backward B is I, then W
    at once. Raises what a stage raises, and comm.PeerError when a peer is gone or too slow.
    """
    queues = queues or dict.fromkeys(("compute", "high"), HostQueue(late=False))
    overlap = overlap and all(isinstance(stage, OverlapStage) for stage in stages.values())
    backwards = {i.pair: i for i in instructions if isinstance(i, Run) and i.pair is not None and i.action.kind in "BI"}
    pairs: dict[int, Overlapped] = {}
    values: dict[Key, _Value] = {}  # inputs and output gradients that are here
    results: dict[Key, _Value] = {}  # computed, about to be sent
    edges: dict[tuple[type, int, int], Queue] = {}  # what sends, and what posts receives, of each edge
    runs: dict[int, tuple[Queue, Any]] = {}  # the program's events that runs record
    sends: dict[int, Callable[[], torch.Tensor]] = {}  # and those of sends: what waits for one
    before = queues["compute"].event()

    def take(run: Run) -> torch.Tensor | None:
        """The message that an action needs, or what the neighbouring stage on this rank left for it."""
        key = _source(run.action, placement)
        return None if key is None else values.pop(key).on(queues[run.entry])

    def start_after(queue: Queue, events: Sequence[int]) -> None:
        for number in events:
            if number in sends:
                queue.hold(_issue(queue, sends.pop(number)))
            elif runs[number][0] is not queue:
                queue.wait(runs[number][1])

    def edge_queue(transfer: Post | Send) -> Queue:
        key = type(transfer), transfer.message.source, transfer.message.target
        if key not in edges:
            edges[key] = queues["compute"].beside(key)
            edges[key].wait(before)  # the step before this one may be using the buffers still
        start_after(edges[key], transfer.after)
        return edges[key]

    for instruction in inputs_first(instructions) if overlap else instructions:
        for observer in observers:
            observer.begin(instruction)
        match instruction:
            case Post(message, slot):
                queue = edge_queue(instruction)
                _issue(queue, partial(mailbox.post, message, (message.source, message.target), slot))
            case Wait(message, queue):
                arrived = _issue(queues[queue], partial(mailbox.wait, message))
                values[message[:4]] = _Value(arrived, queues[queue])
            case Send(message, slot):
                edge, queue = (message.source, message.target), edge_queue(instruction)
                tensor = results.pop(message[:4]).on(queue)
                if tensor is None:
                    raise ValueError(f"{message}: the stage returned None, its neighbour expects a tensor")
                _issue(queue, partial(mailbox.send, message, edge, tensor, slot))
                if instruction.event is not None:
                    sends[instruction.event] = partial(mailbox.delivered, edge, slot)
            case Run(action, pair):
                stage = stages[action.lane, action.stage]
                start_after(queues[instruction.entry], instruction.after)
                if pair is None or not overlap or action.kind == "R":
                    result = _run(action, stage, take(instruction))
                else:
                    if action.kind == "F":
                        x, backward = take(instruction), backwards[pair]
                        start_after(queues[backward.entry], [event for event in backward.after if event in runs])
                        other, grad = stages[backward.action.lane, backward.action.stage], take(backward)
                        assert isinstance(stage, OverlapStage)
                        pairs[pair] = stage.overlap(action.microbatch, x, other, backward.action.microbatch, grad)
                    result = _run_in_pair(action, stage, pairs[pair])
                    if action.kind in "BW":
                        del pairs[pair]
                if (key := _target(action, placement)) is not None:
                    local = placement.rank(key[1], key[2]) == placement.rank(action.lane, action.stage)
                    (values if local else results)[key] = _Value(result, queues[instruction.exit])
                if instruction.event is not None:
                    runs[instruction.event] = queues[instruction.exit], queues[instruction.exit].event()
        for observer in observers:
            observer.end(instruction)
    assert not results, f"computed but never sent: {list(results)}"
    join(queues)
    for tensor in _issue(queues["compute"], mailbox.drain):
        queues["compute"].hold(tensor)


def _issue(queue: Queue, work: Callable[[], Any]) -> Any:
    """Issues host-side work on tensors of a queue, and does not leave it lying there."""
    result = []
    queue.run(lambda: result.append(work()))
    queue.push()
    return result[0]


def _run(action: Action, stage: Stage, given: torch.Tensor | None) -> torch.Tensor | None:
    """Runs one action on what is given for it, returns what `_target` says who needs."""
    if action.kind == "F":
        return stage.forward(action.microbatch, given)
    if action.kind == "R":
        stage.recompute(action.microbatch)
        return None
    result = stage.backward_input(action.microbatch, given) if action.kind in "BI" else None
    if action.kind in "BW":
        stage.backward_weight(action.microbatch)
    return result


def _run_in_pair(action: Action, stage: Stage, pair: Overlapped) -> torch.Tensor | None:
    """The same for an action of a pair that has begun: it goes on with both halves until this one's result is there."""
    if action.kind == "F":
        return pair.output()
    result = pair.input_gradient() if action.kind in "BI" else None
    if action.kind in "BW":
        pair.finish()
        stage.backward_weight(action.microbatch)
    return result


def _source(action: Action, placement: Placement) -> Key | None:
    """What an action needs of a neighbouring stage."""
    kind, index, microbatch, lane = action
    if kind == "F" and index:
        return "activation", lane, index, microbatch
    if kind in "BI" and index + 1 < placement.stages:
        return "gradient", lane, index, microbatch
    return None


def _target(action: Action, placement: Placement) -> Key | None:
    """For whom the result of an action is, if a neighbouring stage needs it."""
    kind, index, microbatch, lane = action
    if kind == "F" and index + 1 < placement.stages:
        return "activation", lane, index + 1, microbatch
    if kind in "BI" and index:
        return "gradient", lane, index - 1, microbatch
    return None
