"""Sub-layers, each an F inside its own residual connection, and the chain of pieces that they are for a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from pipehc.kernels.differentiation import watch_gradient
from pipehc.kernels.kept_maps import KeptMaps
from pipehc.kernels.link import carriers, join
from pipehc.model.norm import Norm
from pipehc.model.probe import Probe
from pipehc.recompute import Chain, Piece
from pipehc.recompute.chain import PROBE, QueueName

Coefficients = torch.Tensor | None

CONTEXT = "context"
"""A value that comes from outside the chain and is the same for all its sub-layers: masks, positions. None if there are none."""


class Connection(Protocol):
    """What joins a sub-layer F to the residual: x_{l+1} = H_res x_l + H_post^T F(H_pre x_l)."""

    track: bool  # whether it gathers figures of its maps

    def coefficients_pre(self, x: torch.Tensor, norm: Norm | None = None) -> tuple[torch.Tensor, Coefficients, Coefficients]:
        """[s, b, n*C] -> the input of F [s, b, C], normed if there is a norm, H_post, H_res."""
        ...

    def post_res(self, x: torch.Tensor, f: torch.Tensor, h_post: Any, h_res: Any, *, result: bool = True) -> torch.Tensor:
        """[s, b, n*C] and the output of F [s, b, C] -> [s, b, n*C]. result: False where its backward alone is wanted."""
        ...

    def post_res_pre(
        self,
        x: torch.Tensor,
        f: torch.Tensor,
        h_post: Any,
        h_res: Any,
        following: Any,
        norm: Norm | None = None,
        on_gradient: Callable[[torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Coefficients, Coefficients]:
        """`post_res`, then `coefficients_pre` of the connection of the following sub-layer. on_gradient: called in the backward
        with the whole gradient of the streams between the two, of any shape."""
        ...


@dataclass(frozen=True)
class Sublayer:
    """norm: of the input of F, which the connection does, alone or with its own work. f: the pieces of F; they make the value `f`
    from the value `normed`, both [s, b, C]. Names of values need be unique within the sub-layer only, but for CONTEXT. post_node,
    post_queue: of F_post,res; node None: that of the last piece of F."""

    name: str
    connection: Connection
    norm: Norm
    f: tuple[Piece, ...]
    post_node: str | None = None
    post_queue: QueueName = "compute"


def build_chain(sublayers: Sequence[Sublayer], blocks: Sequence[range], entry: Piece | None, exit: Piece | None) -> Chain:
    """The chain of a stage: from the streams `x0` to the streams `x{number of sub-layers}`, both [s, b, n*C].

    blocks: the sub-layers of each recompute block; only inside a block is the end of a sub-layer fused with the start of the next.
    entry: makes `x0`, on the first stage. exit: takes the last streams and makes the result, on the last stage.
    """
    chain = [] if entry is None else [[replace(_entry(entry), node=sublayers[0].f[0].node)]]
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


def _entry(entry: Piece) -> Piece:
    def run(*values: Any) -> tuple[torch.Tensor]:
        *given, probe = values
        (x,) = entry.run(*given)
        _watch(probe, 0, x)
        return (x,)

    return replace(entry, run=run, inputs=(*entry.inputs, PROBE))


def _pre(sublayer: Sublayer, k: int) -> Piece:
    def run(x: torch.Tensor, probe: Probe | None) -> tuple[Any, ...]:
        h, h_post, h_res = sublayer.connection.coefficients_pre(x, sublayer.norm)
        if probe is not None:
            probe.before(k, sublayer.connection, x, h_post, h_res)
        return h, h_post, h_res, *carriers(h_post, h_res)

    def run_again(x: torch.Tensor, probe: Probe | None) -> tuple[Any, ...]:
        with _untracked(sublayer.connection):
            return run(x, None)

    names = (f"x{k}", PROBE), _made_by_pre(k)
    node = sublayer.f[0].node
    return Piece(f"{sublayer.name}.pre", run, *names, node, rebuilt=True, run_again=run_again, notes=KeptMaps)


def _post(sublayer: Sublayer, k: int) -> Piece:
    def run(*values: Any, result: bool = True) -> tuple[Any, ...]:
        *given, probe = values
        x = sublayer.connection.post_res(*_joined(*given), result=result)
        _watch(probe, k + 1, x)
        if probe is not None and result:
            probe.after(k, x)
        return (x,)

    node = sublayer.post_node or sublayer.f[-1].node
    inputs = (f"x{k}", f"f{k}", *_coefficients(k), PROBE)
    without_result = partial(run, result=False)
    name = f"{sublayer.name}.post"
    return Piece(name, run, inputs, (f"x{k + 1}",), node, True, sublayer.post_queue, for_backward=without_result)


def _post_pre(sublayer: Sublayer, following: Sublayer, k: int) -> Piece:
    def run(*values: Any, again: bool = False) -> tuple[Any, ...]:
        *given, probe = values
        see = None if probe is None else probe.gradient(k + 1)
        x, h, h_post, h_res = sublayer.connection.post_res_pre(*_joined(*given), following.connection, following.norm, see)
        if probe is not None and not again:
            probe.before(k + 1, following.connection, x, h_post, h_res)
        return x, h, h_post, h_res, *carriers(h_post, h_res)

    def run_again(*values: Any) -> tuple[Any, ...]:
        with _untracked(following.connection):
            return run(*values, again=True)

    outputs = (f"x{k + 1}", *_made_by_pre(k + 1))
    name = f"{sublayer.name}.post_pre"
    end = _post(sublayer, k)
    return replace(end, name=name, run=run, run_again=run_again, for_backward=None, notes=KeptMaps, outputs=outputs)


def _watch(probe: Probe | None, k: int, x: torch.Tensor) -> None:
    """Shows the probe the gradient of streams that nothing else in their graph uses."""
    watch_gradient(x, None if probe is None else probe.gradient(k))


def _made_by_pre(k: int) -> tuple[str, ...]:
    return f"normed{k}", *_coefficients(k)


def _coefficients(k: int) -> tuple[str, ...]:
    """The maps of a sub-layer; and what carries to their maker the gradients that the sub-layer's end leaves (kernels/link.py)."""
    return f"h_post{k}", f"h_res{k}", f"x_carrier{k}", f"f_carrier{k}"


def _joined(
    x: torch.Tensor, f: torch.Tensor, h_post: Any, h_res: Any, *carried: Any
) -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
    """The arguments of a sub-layer's end, from the values of its piece."""
    join(x, h_post, h_res, *carried)
    return x, f, h_post, h_res


@contextmanager
def _untracked(connection: Connection) -> Iterator[None]:
    """A map that is rebuilt was counted in the forward."""
    track, connection.track = connection.track, False
    try:
        yield
    finally:
        connection.track = track
