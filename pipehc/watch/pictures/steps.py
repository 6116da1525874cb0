"""Panels over training steps: loss, its gap to the first run and gradient norm (mHC, Figure 2), gain and s (Harmonized)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipehc.watch.pictures.panel import Chosen, Curve, Panel, filled
from pipehc.watch.pictures.run import Run

_X = "training step"
_NOISY = 100  # points; beyond them a running mean is drawn over the points themselves
_MEANS = 40  # a running mean is over 1 / this of the points


def step_panels(chosen: Sequence[Chosen]) -> list[Panel]:
    """Those for which some run has figures."""
    base = chosen[0].run
    gap = [curve for one in chosen[1:] for curve in smoothed(one.number, *loss_gap(one.run, base))]
    losses = [curve for one in chosen for curve in smoothed(one.number, *over_steps(one.run, "loss"))]
    norms = [curve for one in chosen for curve in smoothed(one.number, *over_steps(one.run, "grad_norm"))]
    levels = [(one.run.target_gain, one.number, "target") for one in chosen if one.run.target_gain is not None]
    return filled(
        (
            Panel("Loss", _X, "loss", [*losses, *_evaluations(chosen)], may_be_log=False),
            Panel(f"Loss minus that of {base.name}", _X, "gap", gap, may_be_log=False, levels=[(0.0, 0, "")]),
            Panel("Gradient norm of the parameters", _X, "norm", norms),
            Panel("Composite gain of the whole depth", _X, "Amax gain", list(_whole_gains(chosen)), levels=levels),
            Panel("Harmonized: s", _X, "s", list(_diagnosed(chosen, "s")), may_be_log=False),
        )
    )


def over_steps(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and figures of metrics.jsonl."""
    pairs = [(step, value) for step, line in run.metrics.items() if (value := getattr(line, name)) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])


def loss_gap(run: Run, base: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps that both have, and the loss of `run` minus that of `base` there."""
    (steps, losses), (base_steps, base_losses) = over_steps(run, "loss"), over_steps(base, "loss")
    common, ours, theirs = np.intersect1d(steps, base_steps, return_indices=True)
    return common, losses[ours] - base_losses[theirs]


def smoothed(number: int, x: np.ndarray, y: np.ndarray) -> list[Curve]:
    """The points, and where they are many their running mean over the points in front."""
    if len(x) <= _NOISY:
        return [Curve(number, x, y)] if len(x) else []
    width = len(x) // _MEANS
    means = np.lib.stride_tricks.sliding_window_view(y, width).mean(1)
    return [Curve(number, x, y, "faint", "every step"), Curve(number, x[width - 1 :], means, "solid", f"mean of {width} steps")]


def _evaluations(chosen: Sequence[Chosen]) -> Iterator[Curve]:
    for one in chosen:
        x, y = over_steps(one.run, "val_loss")
        if len(x):
            yield Curve(one.number, x, y, "points", "validation")


def _diagnosed(chosen: Sequence[Chosen], name: str) -> Iterator[Curve]:
    for one in chosen:
        pairs = [(step, value) for step, line in one.run.lines.items() if (value := getattr(line, name)) is not None]
        if pairs:
            yield Curve(one.number, np.array([step for step, _ in pairs]), np.array([value for _, value in pairs]))


def _whole_gains(chosen: Sequence[Chosen]) -> Iterator[Curve]:
    for one in chosen:
        x, y = over_steps(one.run, "gain")
        if len(x):
            yield Curve(one.number, x, y, "faint", "of the mean maps, every step")
    for curve in _diagnosed(chosen, "whole_gain"):
        yield Curve(curve.number, curve.x, curve.y, "solid", "of a diagnosed sequence")
    for curve in _diagnosed(chosen, "gain_average"):
        yield Curve(curve.number, curve.x, curve.y, "dotted", "running average of the feedback")
