"""What the figures of the stability study say: tables by depth and learning rate, and sentences by stated bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipehc.studies.design import Figure, Report, Row, Statement, Table
from pipehc.studies.figures import COLORS, Curve, curves
from pipehc.studies.paired import cells, values, where

MHC_GAIN, ISO_OFF, TARGET_OFF = 2.0, 0.05, 0.2
RULES = (
    "A loss has broken when it is not finite or, as the mean of five steps, 1 nat above its least so far. A warning came before "
    "that when it came before the first of the five.",
    "The composite gain is the largest over sub-layers, forward and backward. Warnings that streams are copies of each other do "
    "not count: they announce no break.",
    f"Bounds, which must hold in every run: mhc's composite gain under {MHC_GAIN:g} at every diagnosed step; the norm of isohc's "
    f"gradient, largest by smallest over depth, within {ISO_OFF:.0%} at the end, and that of what the residual path alone carries "
    f"of it, at every diagnosed step; harmonized's gain, a mean over the twenty steps of its feedback, within {TARGET_OFF:.0%} of "
    "its target after twice the warm-up, and a hundred steps after it first reached it (shorter runs say nothing about it).",
)


def summarise(rows: Sequence[Row], kinds: Sequence[str]) -> Report:
    tables = []
    for blocks, lr, steps in cells(rows, "blocks", "lr", "steps"):
        cell = where(rows, blocks=blocks, lr=lr, steps=steps)
        lines = [_line(kind, found) for kind in kinds if (found := where(cell, kind=kind))]
        title = f"{blocks} blocks ({2 * int(blocks)} sub-layers), learning rate {lr:g}, {steps} steps"
        tables.append(Table(title, _COLUMNS, tuple(lines)))
    caption = "Largest composite gain over depth, a picture a learning rate and length"
    figure = Figure("stability", caption, lambda f: _draw(f, rows, kinds), (11.0, 4.0))
    return Report(tables, _statements(rows), [figure], RULES)


_COLUMNS = (
    "residual", "runs", "broke", "at steps", "warned before", "warned, not broken", "validation loss", "composite gain, end",
    "composite gain, most", "gradient norm over depth", "transported, off", "gain off target",
)  # fmt: skip


def _line(kind: str, rows: Sequence[Row]) -> tuple[str, ...]:
    broke = values(rows, "broke")
    early = sum(warned_before(row) for row in rows)
    return (
        kind,
        str(len(rows)),
        str(len(broke)),
        ", ".join(f"{step:.0f}" for step in sorted(broke)),
        f"{early} of {len(broke)}" if broke else "",
        str(sum(row.values["warned"] is not None and row.values["broke"] is None for row in rows)),
        _range(rows, "val_loss", "{:.3f}".format),
        _range(rows, "gain_end", "{:.3g}".format),
        _range(rows, "gain_most", "{:.3g}".format),
        _range(rows, "gradient_ratio", "{:.2f}".format),
        _range(rows, "transported_off", "{:.1%}".format),
        _range(rows, "target_off", "{:.0%}".format),
    )


def warned_before(row: Row) -> bool:
    """Whether the first warning came before the break may have begun to show in the loss."""
    return bool(row.values.get("warned_before"))


def _range(rows: Sequence[Row], key: str, show: Callable[[float], str]) -> str:
    found = values(rows, key)
    if not found:
        return ""
    return show(found[0]) if len(found) == 1 else f"{show(min(found))} to {show(max(found))}"


def _statements(rows: Sequence[Row]) -> list[Statement]:
    return [
        _gain_of_hc(rows),
        _warnings(rows),
        _bound(where(rows, kind="mhc"), "gain_most", MHC_GAIN, "mhc: composite gain", "{:.2f}".format),
        _bound(
            where(rows, kind="isohc"), "gradient_off", ISO_OFF, "isohc: norm of the gradient over depth, off by", "{:.0%}".format
        ),
        _bound(
            where(rows, kind="isohc"),
            "transported_off",
            ISO_OFF,
            "isohc: norm of the transported gradient over depth, off by",
            "{:.1%}".format,
        ),
        _bound(where(rows, kind="harmonized"), "target_off", TARGET_OFF, "harmonized: gain off its target by", "{:.0%}".format),
        _breaks(rows),
    ]


def _gain_of_hc(rows: Sequence[Row]) -> Statement:
    hc = where(rows, kind="hc")
    found, bound = values(hc, "gain_most"), next(iter(values(hc, "gain_bound")), 0.0)
    if not found:
        return Statement("open", "hc: no diagnostics, so no composite gain.")
    cell = next(
        (c for c in cells(hc, "blocks", "lr") if all(v > bound for v in _of(hc, c, "gain_most")) and _of(hc, c, "gain_most")), None
    )
    text = f"hc: the composite gain reaches {max(found):.3g}"
    if cell is None:
        return Statement(
            "differs", f"{text}; it leaves the bound of {bound:g} in all seeds nowhere (mHC paper: up to 3000 at 27B)."
        )
    return Statement(
        "agrees", f"{text}; it leaves the bound of {bound:g} in all seeds with {cell[0]} blocks and learning rate {cell[1]:g}."
    )


def _of(rows: Sequence[Row], cell: tuple[Any, ...], key: str) -> list[float]:
    return values(where(rows, blocks=cell[0], lr=cell[1]), key)


def _warnings(rows: Sequence[Row]) -> Statement:
    broke = [row for row in rows if row.values["broke"] is not None and row.factors["kind"] != "none"]
    if not broke:
        return Statement("open", "No run with streams broke, so no warning could come before a break.")
    early = [row for row in broke if warned_before(row)]
    late = ", ".join(row.name for row in broke if row not in early)
    text = f"A warning came before the break in {len(early)} of {len(broke)} runs with streams that broke"
    return Statement("differs" if late else "agrees", text + (f"; not in {late}" if late else "") + _alarms(rows))


def _alarms(rows: Sequence[Row]) -> str:
    whole = [row for row in rows if row.values["broke"] is None]
    return f". {len(values(whole, 'warned'))} of {len(whole)} runs that did not break were warned of, too."


def _bound(rows: Sequence[Row], key: str, bound: float, subject: str, show: Callable[[float], str]) -> Statement:
    found = values(rows, key)
    if not found:
        return Statement("open", f"{subject}: nothing was measured.")
    worst = max(found)
    inside = sum(value <= bound for value in found)
    text = f"{subject} {show(worst)} at most; within {show(bound)} in {inside} of {len(found)} runs"
    holds = [cell for cell in cells(rows, "blocks", "lr") if all(v <= bound for v in _of(rows, cell, key)) and _of(rows, cell, key)]
    if 0 < inside < len(found) and holds:
        text += ", in all with " + " and ".join(f"{blocks} blocks and learning rate {lr:g}" for blocks, lr in holds)
    text += "."
    return Statement("agrees" if inside == len(found) else "differs", text)


def _breaks(rows: Sequence[Row]) -> Statement:
    counts = {str(kind): len(values(where(rows, kind=kind), "broke")) for (kind,) in cells(rows, "kind")}
    text = "Runs that broke: " + ", ".join(f"{kind} {count} of {len(where(rows, kind=kind))}" for kind, count in counts.items())
    if not counts.get("hc"):
        return Statement(
            "open", f"{text}. hc did not break here, so that others do not proves nothing (papers: hc breaks past 20 blocks)."
        )
    held = counts.get("isohc") == 0 and counts.get("mhc", 0) < counts["hc"]
    return Statement("agrees" if held else "differs", f"{text} (papers: hc breaks past 20 blocks, isohc never, mhc is in between).")


def _draw(figure: Any, rows: Sequence[Row], kinds: Sequence[str]) -> None:
    lengths = cells(rows, "lr", "steps")
    for axes, (lr, steps) in zip(figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0], lengths):
        found: dict[str, Curve] = {}
        for kind in kinds:
            if kind in COLORS and kind != "none":
                cell = where(rows, kind=kind, lr=lr, steps=steps)
                found[kind] = {2 * int(b): _finite(where(cell, blocks=b)) for (b,) in cells(cell, "blocks")}
        curves(axes, found, "sub-layers", "largest composite gain", "xy")
        axes.set_title(f"learning rate {lr:g}, {steps} steps", fontsize=9)


def _finite(rows: Sequence[Row]) -> list[float]:
    return [min(value, 1e9) for value in values(rows, "gain_most")]  # what was not finite is drawn at the edge
