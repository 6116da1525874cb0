"""Panels by depth, of one step of every run: gains (mHC, Figures 3 and 7), similarity and gradient norms (IsoHC)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipehc.watch.pictures.panel import Chosen, Curve, Panel, filled

_X = "sub-layer"


def depth_panels(chosen: Sequence[Chosen]) -> list[Panel]:
    """Those for which some run has figures."""
    return filled(
        (
            Panel("Gain of single maps", _X, "Amax gain", list(_gains(chosen, "gain"))),
            Panel("Composite gain from there to the end", _X, "Amax gain of the product", list(_gains(chosen, "composite"))),
            Panel("Similarity of streams", _X, "cosine, mean over pairs", list(_by_depth(chosen, "similarity")), may_be_log=False),
            Panel("Gradient norm of streams", _X, "norm", list(_gradients(chosen))),
            Panel("Norm of streams", _X, "root mean square over channels", list(_norms(chosen))),
        )
    )


def _gains(chosen: Sequence[Chosen], name: str) -> Iterator[Curve]:
    for one in chosen:
        gains = getattr(one.line, name)
        if gains is not None:
            x = np.arange(one.line.sublayers)
            yield Curve(one.number, x, gains.forward, "solid", "forward (rows)")
            yield Curve(one.number, x, gains.backward, "dashed", "backward (columns)")


def _by_depth(chosen: Sequence[Chosen], name: str) -> Iterator[Curve]:
    for one in chosen:
        values = getattr(one.line, name)
        if values is not None:
            yield Curve(one.number, np.arange(len(values)), values)


def _gradients(chosen: Sequence[Chosen]) -> Iterator[Curve]:
    for one in chosen:
        x = np.arange(one.line.sublayers + 1)
        if one.line.gradient is not None:
            yield Curve(one.number, x, one.line.gradient, "solid", "gradient")
        if one.line.transported is not None:
            yield Curve(one.number, x, one.line.transported, "dotted", "transported by the residual path alone")


def _norms(chosen: Sequence[Chosen]) -> Iterator[Curve]:
    for one in chosen:
        norms = one.line.stream_norm
        if norms is None:
            continue
        x = np.arange(one.line.sublayers + 1)
        yield Curve(one.number, x, norms.mean(1), "solid", "mean of streams")
        if one.line.streams > 1:
            yield Curve(one.number, x, norms.min(1), "faint", "smallest and largest")
            yield Curve(one.number, x, norms.max(1), "faint", "smallest and largest")
