"""Sub-layers, each an F inside its own residual connection, and the chain of pieces that they are for a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from pipehc.recompute import Chain, Piece
from pipehc.recompute.chain import QueueName

Coefficients = torch.Tensor | None

CONTEXT = "context"
"""A value that comes from outside the chain and is the same for all its sub-layers: masks, positions. None if there are none."""


class Connection(Protocol):
    """What joins a sub-layer F to the residual: x_{l+1} = H_res x_l + H_post^T F(H_pre x_l)."""

    track: bool  # whether it gathers figures of its maps

    def coefficients_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, Coefficients, Coefficients]:
        """[s, b, n*C] -> the input of F [s, b, C], H_post, H_res."""
        ...

    def post_res(self, x: torch.Tensor, f: torch.Tensor, h_post: Any, h_res: Any) -> torch.Tensor:
        """[s, b, n*C] and the output of F [s, b, C] -> [s, b, n*C]."""
        ...

    def post_res_pre(
        self, x: torch.Tensor, f: torch.Tensor, h_post: Any, h_res: Any, following: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Coefficients, Coefficients]:
        """`post_res`, then `coefficients_pre` of the connection of the following sub-layer."""
        ...


@dataclass(frozen=True)
class Sublayer:
    """norm: of the input of F. f: the pieces of F; they make the value `f` from the value `normed`, both [s, b, C]. Names of values
    need be unique within the sub-layer only, but for CONTEXT. post_node, post_queue: of F_post,res; node None: that of the last
    piece of F."""

    name: str
    connection: Connection
    norm: Callable[[torch.Tensor], torch.Tensor]
    f: tuple[Piece, ...]
    post_node: str | None = None
    post_queue: QueueName = "compute"


def build_chain(sublayers: Sequence[Sublayer], blocks: Sequence[range], entry: Piece | None, exit: Piece | None) -> Chain:
    """The chain of a stage: from the streams `x0` to the streams `x{number of sub-layers}`, both [s, b, n*C].

    blocks: the sub-layers of each recompute block; only inside a block is the end of a sub-layer fused with the start of the next.
    entry: makes `x0`, on the first stage. exit: takes the last streams and makes the result, on the last stage.
    """
    chain = [] if entry is None else [[replace(entry, node=sublayers[0].f[0].node)]]
    for block in blocks:
        pieces: list[Piece] = []
        for k in block:
            if k == block.start:
                pieces.append(_pre(sublayers[k], k))
            pieces += _f(sublayers[k], k)
            pieces.append(_post(sublayers[k], k) if k + 1 == block.stop else _post_pre(sublayers[k], sublayers[k + 1], k))
        chain.append(pieces)
    if exit is None:
        return Chain(chain, f"x{len(sublayers)}")
    chain[-1].append(replace(exit, node=chain[-1][-1].node))
    return Chain(chain, exit.outputs[0])


def _f(sublayer: Sublayer, k: int) -> list[Piece]:
    return [
        replace(
            piece,
            name=f"{sublayer.name}.{piece.name}",
            inputs=tuple(name if name == CONTEXT else f"{name}{k}" for name in piece.inputs),
            outputs=tuple(f"{name}{k}" for name in piece.outputs),
        )
        for piece in sublayer.f
    ]


def _pre(sublayer: Sublayer, k: int) -> Piece:
    def run(x: torch.Tensor) -> tuple[Any, ...]:
        h, h_post, h_res = sublayer.connection.coefficients_pre(x)
        return sublayer.norm(h), h_post, h_res

    def run_again(x: torch.Tensor) -> tuple[Any, ...]:
        with _untracked(sublayer.connection):
            return run(x)

    names = (f"x{k}",), _made_by_pre(k)
    return Piece(f"{sublayer.name}.pre", run, *names, sublayer.f[0].node, rebuilt=True, run_again=run_again)


def _post(sublayer: Sublayer, k: int) -> Piece:
    def run(*values: Any) -> tuple[Any, ...]:
        return (sublayer.connection.post_res(*values),)

    node = sublayer.post_node or sublayer.f[-1].node
    inputs = (f"x{k}", f"f{k}", f"h_post{k}", f"h_res{k}")
    return Piece(f"{sublayer.name}.post", run, inputs, (f"x{k + 1}",), node, True, sublayer.post_queue)


def _post_pre(sublayer: Sublayer, following: Sublayer, k: int) -> Piece:
    def run(*values: Any) -> tuple[Any, ...]:
        x, f, h_post, h_res = values
        x, h, h_post, h_res = sublayer.connection.post_res_pre(x, f, h_post, h_res, following.connection)
        return x, following.norm(h), h_post, h_res

    def run_again(*values: Any) -> tuple[Any, ...]:
        with _untracked(following.connection):
            return run(*values)

    outputs = (f"x{k + 1}", *_made_by_pre(k + 1))
    return replace(_post(sublayer, k), name=f"{sublayer.name}.post_pre", run=run, run_again=run_again, outputs=outputs)


def _made_by_pre(k: int) -> tuple[str, str, str]:
    return f"normed{k}", f"h_post{k}", f"h_res{k}"


@contextmanager
def _untracked(connection: Connection) -> Iterator[None]:
    """A map that is rebuilt was counted in the forward."""
    track, connection.track = connection.track, False
    try:
        yield
    finally:
        connection.track = track
