"""Figures of the streams of one sequence over all of the depth: what the probes of all stages saw, brought together.

One sum over all ranks brings maps and norms to rank 0, while the optimizer steps; what follows from the maps of several stages,
such as composite gains, is computed there, token by token and in fp64, on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipehc.model.probe import MOST_TOKENS, Probe

Figures = dict[str, Any]


def is_due(step: int, interval: int) -> bool:
    """Whether a training step, counted from 1, is looked at: the first, and every `interval` steps; 0: none."""
    return interval > 0 and (step == 1 or step % interval == 0)


@dataclass(frozen=True)
class Part:
    """Which of the sequence's tokens this rank has: number `index` of `count` equal parts; count 0: it has no say."""

    index: int = 0
    count: int = 1


class StreamFigures:
    """Of one step. held: the sub-layers of each (lane, stage) of this rank. sublayers, tokens: of the whole model and sequence."""

    def __init__(
        self, held: Mapping[tuple[int, int], range], sublayers: int, streams: int, tokens: int, part: Part | None = None
    ) -> None:
        self._part = Part() if part is None else part
        self._sublayers, self._streams = sublayers, streams
        parts = max(1, self._part.count)
        each = tokens // parts
        self._tokens = min(each * parts, MOST_TOKENS)  # that all ranks must agree on
        self._begin = self._part.index * each
        self._own = max(0, min(each, self._tokens - self._begin))
        seen = held if self._part.count and self._own else {}
        self.probes = {key: Probe(own.start, own.stop, streams, own.stop == sublayers, self._own) for key, own in seen.items()}
        self._sums: list[Tensor] = []
        self._work: list[Any] = []

    def tensors(self) -> list[Tensor]:
        """What the probes keep, made on other queues."""
        return [tensor for probe in self.probes.values() for tensor in probe.tensors()]

    def start(self, device: torch.device) -> None:
        """Starts the sum over all ranks. Collective, asynchronous; after the step's backward."""
        n, places = self._streams, self._sublayers + 1
        matrices = torch.zeros(places, self._tokens, n, n, device=device)
        numbers = torch.zeros(places, 3 * n + 4, device=device, dtype=torch.float64)
        for probe in self.probes.values():
            self._enter(probe, matrices, numbers)
        self._sums = [matrices, numbers]
        self._work = [dist.all_reduce(each, async_op=True) for each in self._sums]

    def sums(self) -> list[Tensor]:
        """Of all ranks, as `figures` takes them but for their dtype and device."""
        for work in self._work:
            work.wait()
        sums, self._sums, self._work = self._sums, [], []
        return sums

    def finish(self, scale: float) -> Figures | None:
        """On rank 0, figures by the names of diagnostics.jsonl; None elsewhere. scale: by which the loss was multiplied."""
        matrices, numbers = self.sums()
        return None if dist.get_rank() else figures(matrices.double(), numbers.cpu(), scale)

    def _enter(self, probe: Probe, matrices: Tensor, numbers: Tensor) -> None:
        n, begin, share = self._streams, self._begin, self._own / self._tokens

        def mean(values: Tensor) -> Tensor:
            return values.double().mean(0) * share

        for place, norms in probe.norms.items():
            numbers[place, :n] = mean(norms)
        for place, similarity in probe.similarity.items():
            numbers[place, 3 * n] = mean(similarity)
        for place, squares in probe.gradients.items():
            numbers[place, 3 * n + 1] = squares
        for place, maps in probe.maps.items():
            matrices[place, begin : begin + len(maps.h_res)] = maps.h_res  # a job's batch may be shorter than it says
            numbers[place, n : 2 * n], numbers[place, 2 * n : 3 * n] = mean(maps.h_pre), mean(maps.h_post)
            for i, h in ((2, maps.h_pre), (3, maps.h_post)):
                numbers[place, 3 * n + i] = mean(h.double().norm(dim=1))
        if probe.gram is not None:
            matrices[-1, begin : begin + len(probe.gram)] = probe.gram


def figures(matrices: Tensor, numbers: Tensor, scale: float) -> Figures:
    """By the names of diagnostics.jsonl.

    matrices [L + 1, s, n, n]: H_res of every sub-layer and token, and at last the Gram matrices of the gradient at the end, by two
    streams. numbers [L + 1, 3n + 4]: stream norms, mean H_pre, mean H_post; similarity, squared norm of the gradient, norms of
    H_pre and H_post. Both fp64. scale: of the loss.
    """
    n, h, gram = matrices.shape[-1], matrices[:-1], matrices[-1]
    norms, h_pre, h_post, rest = numbers.split([n, n, n, 4], dim=1)
    similarity, squares, pre_norm, post_norm = rest.unbind(1)
    found: Figures = {"stream_norm": norms.tolist(), "gradient": (squares.sqrt() / scale).tolist()}
    there = (h != 0).any(-1).any(-1).any(0)
    if not there.any():  # the plain residual has no maps
        return _short(found)
    h, gram = h[:, there], gram[there]
    eye = torch.eye(n, dtype=h.dtype, device=h.device)
    product, products = eye, []
    for single in h.flip(0):
        product = product @ single
        products.append(product)
    composites = torch.stack(products[::-1])
    carried = (composites.mT @ gram @ composites).diagonal(dim1=-1, dim2=-2).sum((-1, -2))
    at_the_end = gram.diagonal(dim1=-1, dim2=-2).sum()
    far = {
        "rows": (h.sum(-1) - 1).abs().amax(-1),
        "columns": (h.sum(-2) - 1).abs().amax(-1),
        "orthogonality": (h.mT @ h - eye).abs().amax((-1, -2)),
    }
    found |= {
        "gain": {"forward": gains(h, -1), "backward": gains(h, -2)},
        "composite": {"forward": gains(composites, -1), "backward": gains(composites, -2)},
        "distance": {name: of.mean(1).tolist() for name, of in far.items()},
        "maps": h.mean(1).tolist(),
        "composite_map": composites[0].mean(0).tolist(),
        "h_pre": h_pre[:-1].tolist(),
        "h_post": h_post[:-1].tolist(),
        "h_pre_norm": pre_norm[:-1].tolist(),
        "h_post_norm": post_norm[:-1].tolist(),
        "transported": (torch.cat([carried, at_the_end[None]]).clamp_min(0).sqrt() / scale).tolist(),
    }
    if n > 1:
        found["similarity"] = similarity.tolist()
    return _short(found)


def _short(value: Any) -> Any:
    """With eight digits, which is more than fp32 has: a deep model has thousands of figures."""
    match value:
        case dict():
            return {name: _short(part) for name, part in value.items()}
        case list():
            return [_short(part) for part in value]
    return float(f"{value:.8g}")


def gains(maps: Tensor, over: int) -> list[float]:
    """Amax gains of maps [L, s, n, n], means over tokens: the largest sum of absolute values of a row (over -1) or column (-2)."""
    found: list[float] = maps.abs().sum(over).amax(-1).mean(1).tolist()
    return found
