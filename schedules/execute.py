"""Walks one rank's compiled program. Knows nothing of models: a stage is an object with the methods of `Stage`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from pipehc.comm.messages import Mailbox
from pipehc.schedules.actions import Action
from pipehc.schedules.placement import Placement
from pipehc.schedules.program import Instruction, Post, Run, Send, Wait

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


class Observer(Protocol):
    """Told about every instruction on the thread that executes it: recorders, watchdogs, markers for profilers."""

    def begin(self, instruction: Instruction) -> None:
        """The instruction is next."""

    def end(self, instruction: Instruction) -> None:
        """It is done; not called if it raised."""


def execute(
    instructions: Sequence[Instruction],
    placement: Placement,
    stages: Mapping[tuple[int, int], Stage],
    mailbox: Mailbox,
    observers: Sequence[Observer] = (),
) -> None:
    """Runs one step of one rank.

    stages: by (lane, stage), all that the placement puts on this rank. observers: see `Observer`. Returns when every message it
    sent has been received. A full backward B is I, then W at once. Raises what a stage raises, and comm.PeerError when a peer is
    gone or too slow.
    """
    values: dict[Key, torch.Tensor | None] = {}  # inputs and output gradients that are here
    results: dict[Key, torch.Tensor | None] = {}  # computed, about to be sent

    for instruction in instructions:
        for observer in observers:
            observer.begin(instruction)
        match instruction:
            case Post(message):
                mailbox.post(message, (message.source, message.target))
            case Wait(message):
                values[message[:4]] = mailbox.wait(message)
            case Send(message):
                tensor = results.pop(message[:4])
                if tensor is None:
                    raise ValueError(f"{message}: the stage returned None, its neighbour expects a tensor")
                mailbox.send(message, (message.source, message.target), tensor)
            case Run(action):
                result = _run(action, placement, stages[action.lane, action.stage], values)
                if result is not None:
                    key, tensor = result
                    local = placement.rank(key[1], key[2]) == placement.rank(action.lane, action.stage)
                    (values if local else results)[key] = tensor
        for observer in observers:
            observer.end(instruction)
    assert not results, f"computed but never sent: {list(results)}"
    mailbox.drain()


def _run(
    action: Action, placement: Placement, stage: Stage, values: dict[Key, torch.Tensor | None]
) -> tuple[Key, torch.Tensor | None] | None:
    """Runs one action. Returns for whom its result is, and the result, if a neighbouring stage needs it."""
    kind, index, microbatch, lane = action
    if kind == "F":
        x = values.pop(("activation", lane, index, microbatch)) if index else None
        y = stage.forward(microbatch, x)
        return (("activation", lane, index + 1, microbatch), y) if index + 1 < placement.stages else None
    if kind == "R":
        stage.recompute(microbatch)
        return None
    if kind == "W":
        stage.backward_weight(microbatch)
        return None
    grad = values.pop(("gradient", lane, index, microbatch)) if index + 1 < placement.stages else None
    dx = stage.backward_input(microbatch, grad)
    if kind == "B":
        stage.backward_weight(microbatch)
    return (("gradient", lane, index - 1, microbatch), dx) if index else None
