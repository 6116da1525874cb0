"""What each residual costs in time and memory at the papers' sizes: dry runs on one GPU's hardware file, nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipehc.studies.design import Figure, Report, Row, Scale, Statement, Study, Table
from pipehc.studies.figures import COLORS
from pipehc.studies.outcome import Outcome
from pipehc.studies.paired import where
from pipehc.studies.run import Run

KINDS = ("hc", "mhc", "isohc", "hybrid", "harmonized")
SIZES = {"3b": "3b.yaml", "9b": "9b.yaml", "27b": "27b_pp8.yaml"}
PAPER_MHC = 6.7  # % of step time at 27B, n = 4
_GIB = 2**30


def runs(scale: Scale, seeds: int) -> list[Run]:
    return [Run(f"{kind}-{size}", {"kind": kind, "size": size}, (f"residual.kind={kind}",), file)
            for size, file in SIZES.items() for kind in KINDS]  # fmt: skip


def measure(outcome: Outcome) -> dict[str, float | None]:
    """Of the step and of the fullest rank; `plain_` is the same with the plain residual, which every dry run adds."""
    own, plain = outcome.answer, outcome.answer["plain_residual"]
    return {
        "step_ms": own["step"]["ms"],
        "plain_ms": plain["step"]["ms"],
        "memory_gib": max(rank["peak_bytes"] for rank in own["ranks"]) / _GIB,
        "plain_gib": max(rank["peak_bytes"] for rank in plain["ranks"]) / _GIB,
        "message_ms": own["step"]["message_ms"],
        "exposed_messages_ms": own["step"]["exposed_messages_ms"],
    }


def summarise(rows: Sequence[Row]) -> Report:
    lines: list[tuple[str, ...]] = []
    for size in SIZES:
        for row in where(rows, size=size):
            v = row.values
            if not lines or lines[-1][0] != size:
                lines.append((size, "none", f"{v['plain_ms']:,.0f}", "0", f"{v['plain_gib']:.2f}", "0"))
            more = f"{v['memory_gib'] - v['plain_gib']:+.2f} ({100 * (v['memory_gib'] / v['plain_gib'] - 1):+.1f} %)"  # type: ignore[operator]
            lines.append(
                (size, str(row.factors["kind"]), f"{v['step_ms']:,.0f}", f"{slower(row):+.1f} %", f"{v['memory_gib']:.2f}", more)
            )
    columns = ("size", "residual", "step, simulated [ms]", "less none", "fullest rank, counted [GiB]", "less none")
    table = Table("Time and memory of each residual", columns, tuple(lines), "Times are modelled and simulated, none is measured.")
    figure = Figure("overhead", "Step time more than with the plain residual", lambda f: _draw(f, rows))
    return Report([table], _statements(rows), [figure], [_RULE])


_RULE = (
    "A time agrees with a published one when it is between half and twice of it; one kind is dearer than another when its step is "
    "longer."
)


def slower(row: Row) -> float:
    """% of step time more than with the plain residual."""
    step, plain = row.values["step_ms"], row.values["plain_ms"]
    assert step is not None and plain is not None
    return 100 * (step / plain - 1)


def _statements(rows: Sequence[Row]) -> list[Statement]:
    by_kind = {str(row.factors["kind"]): slower(row) for row in where(rows, size="27b")}
    mhc, iso = by_kind["mhc"], by_kind["isohc"]
    near = PAPER_MHC / 2 <= mhc <= 2 * PAPER_MHC
    return [
        Statement(
            "agrees" if near else "differs", f"mhc takes {mhc:+.1f} % of step time at 27B (paper: +{PAPER_MHC} %, measured)."
        ),
        Statement(
            "agrees" if iso <= mhc else "differs",
            f"isohc takes {iso:+.1f} %, mhc {mhc:+.1f} % at 27B (IsoHC's text: about 1.5 against 2 %).",
        ),
    ]


def _draw(figure: Any, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    sizes = list(SIZES)
    for k, kind in enumerate(KINDS):
        bars = [slower(where(rows, size=size, kind=kind)[0]) for size in sizes]
        axes.bar([i + (k - 2) * 0.15 for i in range(len(sizes))], bars, 0.14, color=COLORS[kind], label=kind)
    axes.axhline(PAPER_MHC, color="#555555", linewidth=0.8, linestyle="--", label="mHC paper, 27B")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_ylabel("% of step time")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, frameon=False)


STUDY = Study(
    name="overhead",
    question="What do streams cost in step time and memory from 3B to 27B parameters (mHC paper, section 4.3: 6.7 % at 27B)?",
    seeds={"small": 0, "paper": 0},
    runs=runs,
    measure=measure,
    summarise=summarise,
    command="plan",
    side_by_side=False,
)
