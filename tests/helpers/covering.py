"""Few combinations of options that have every two values together: what breaks is nearly always a matter of one or two."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any


def covering_array(
    axes: Mapping[str, Sequence[str]], allowed: Callable[[dict[str, str]], bool] = lambda row: True
) -> list[dict[str, str]]:
    """Rows axis -> value, so that every allowed pair of values of two axes is in one of them. Greedy; always the same rows.

    allowed: asked about rows in part, whose other axes are missing; a part that is allowed must have an allowed completion.
    """
    pairs = ({a: x, b: y} for a, b in combinations(axes, 2) for x, y in product(axes[a], axes[b]))
    missing = [pair for pair in pairs if allowed(pair)]
    rows = []
    while missing:
        row: dict[str, str] = dict(missing[0])
        for axis in axes:
            if axis in row:
                continue
            choices = [row | {axis: value} for value in axes[axis] if allowed(row | {axis: value})]
            row = max(choices, key=lambda choice: sum(covers(choice, pair) for pair in missing if axis in pair))
        rows.append({axis: row[axis] for axis in axes})
        missing = [pair for pair in missing if not covers(row, pair)]
    return rows


def covers(row: Mapping[str, Any], pair: Mapping[str, Any]) -> bool:
    return all(row.get(axis) == value for axis, value in pair.items())
