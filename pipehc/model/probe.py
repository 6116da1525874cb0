"""What one micro-batch shows of its streams on its way through a stage, for diagnostics.

The pieces of the chain tell a probe what they made (`sublayers.py`). It computes figures at once, on the queue of the piece, of the
first sequence alone, and keeps no streams. It changes nothing of what it looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipehc.model.hyper_connection import HyperConnection

MOST_TOKENS = 4096
"""Of a sequence: of a longer one the first are looked at. Figures take memory by the token, on every rank."""


class Maps(NamedTuple):
    """Of one sub-layer."""

    h_res: Tensor  # [s, n, n] fp32: of every token
    h_pre: Tensor  # [s, n]
    h_post: Tensor  # [s, n]


class Probe:
    """Figures of the sub-layers `first` to `stop` (not included) of the model; stop is also the place behind the last of them.

    By place (number of a sub-layer: before it; `stop`: at the end of the stage). norms: [s, n], root mean square over channels.
    similarity: [s], cosine of two streams, mean over pairs; none with one stream. gradients: [], the sum of squares of the gradient
    by the streams there. gram: [s, n, n], products over channels of the gradients by two streams, at the end of the model alone.
    """

    def __init__(self, first: int, stop: int, streams: int, ends: bool, tokens: int = MOST_TOKENS) -> None:
        """ends: whether the model ends with this stage. tokens: at most so many are looked at, of those that this rank has."""
        self._first, self._stop, self._streams, self._ends, self._tokens = first, stop, streams, ends, tokens
        self.maps: dict[int, Maps] = {}
        self.norms: dict[int, Tensor] = {}
        self.similarity: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self.gram: Tensor | None = None

    @torch.no_grad()
    def before(self, k: int, connection: Any, x: Tensor, h_post: Tensor | None, h_res: Tensor | None) -> None:
        """At the start of sub-layer k of the stage: its streams [s, b, n*C] and maps [s*b, ...]."""
        self._streams_at(k, x)
        if isinstance(connection, HyperConnection) and h_post is not None and h_res is not None:
            s, b, _ = x.shape
            h_pre = connection.h_pre(x[: self._tokens, :1])
            own = (h.detach().unflatten(0, (s, b))[: self._tokens, 0].float().clone() for h in (h_res, h_post))
            res, post = own
            self.maps[self._first + k] = Maps(res, h_pre.float(), post)

    @torch.no_grad()
    def after(self, k: int, x: Tensor) -> None:
        """At the end of sub-layer k of the stage, where no other starts: the streams that it leaves."""
        if self._ends and self._first + k + 1 == self._stop:
            self._streams_at(k + 1, x)

    def gradient(self, k: int) -> Callable[[Tensor], None]:
        """What is to be called with the gradient of the streams before sub-layer k of the stage, or behind its last: of any shape
        whose memory is that of [s, b, n*C]."""
        place = self._first + k
        if k == 0 and place:  # the stage before sees it at its end
            return lambda gradient: None

        @torch.no_grad()
        def see(gradient: Tensor) -> None:
            own = self._apart(gradient)
            self.gradients[place] = own.square().sum(dtype=torch.float64)
            if self._ends and place == self._stop:
                self.gram = own @ own.transpose(1, 2)

        return see

    def tensors(self) -> list[Tensor]:
        """All that it keeps: made on the queues of the pieces."""
        single = [*self.norms.values(), *self.similarity.values(), *self.gradients.values()]
        return [*single, *(h for maps in self.maps.values() for h in maps), *([] if self.gram is None else [self.gram])]

    def _streams_at(self, k: int, x: Tensor) -> None:
        self._shape = x.shape
        own = self._apart(x)
        n = self._streams
        gram = own @ own.transpose(1, 2)
        squares = gram.diagonal(dim1=1, dim2=2)
        self.norms[self._first + k] = (squares / own.shape[2]).sqrt()
        if n > 1:
            lengths = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            cosines = gram / lengths.unsqueeze(1) / lengths.unsqueeze(2)
            off = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
            self.similarity[self._first + k] = off / (n * (n - 1))

    def _apart(self, x: Tensor) -> Tensor:
        """The first sequence of streams, [s, n, C] fp32."""
        first = x.detach().reshape(self._shape)[: self._tokens, 0]
        return first.unflatten(-1, (self._streams, -1)).float()
