"""The two pictures that studies draw: differences with their spread, and curves with a band over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pipehc.studies.paired import Gap

COLORS = {
    "none": "#555555", "hc": "#d1495b", "mhc": "#2f6fbd", "isohc": "#12805c", "hybrid": "#a14fb0", "harmonized": "#e08e0b",
}  # fmt: skip
_ORDER = ("#2f6fbd", "#d1495b", "#12805c", "#e08e0b", "#a14fb0", "#555555", "#7b97bd", "#c9b458")

Curve = Mapping[float, Sequence[float]]  # x -> a value a seed


def differences(axes: Any, found: Mapping[str, Gap | None], label: str) -> None:
    """A line a row: every seed a dot, the mean with its 95 % interval; zero is the reference."""
    names = list(found)
    for y, name in enumerate(names):
        gap = found[name]
        if gap is not None:
            axes.plot(gap.single, [y] * len(gap.single), ".", color="#b0b8c4", markersize=5)
            axes.errorbar(
                gap.mean, y, xerr=gap.half, fmt="o", color=COLORS.get(name.split()[0], _ORDER[0]), capsize=3, markersize=5
            )
    axes.axvline(0.0, color="#555555", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", linewidth=0.3)


def curves(axes: Any, found: Mapping[str, Curve], x: str, y: str, log: str = "") -> None:
    """A line a name: means over seeds, and a band from the least to the largest. log: axes that are logarithmic, as 'xy'."""
    for k, (name, curve) in enumerate(found.items()):
        points = sorted(point for point, seeds in curve.items() if seeds)
        if not points:
            continue
        color = COLORS.get(name.split()[0], _ORDER[k % len(_ORDER)])
        axes.plot(
            points,
            [fmean(curve[p]) for p in points],
            marker="o" if len(points) < 12 else None,
            color=color,
            label=name,
            lw=1.4,
            ms=4,
        )
        axes.fill_between(points, [min(curve[p]) for p in points], [max(curve[p]) for p in points], color=color, alpha=0.15, lw=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.grid(linewidth=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
