"""How the difference between mhc and the plain residual changes with width and with tokens (mHC paper, section 5.3).

The learning rate is constant after its warm-up, so every evaluation of a run is the end of a shorter training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipehc.studies.design import Figure, Report, Row, Scale, Statement, Study, Table, Verdict
from pipehc.studies.figures import Curve, curves
from pipehc.studies.outcome import Outcome
from pipehc.studies.paired import RULE, cells, gap, judged, paired, shown, spread, values, where
from pipehc.studies.run import Run

KINDS = ("none", "mhc")
PARTS = ("1/4", "1/2", "3/4", "1/1")  # of the tokens
_LENGTH = ("train.steps=320", "evaluation.interval=80")
_SMALL = {
    f"w{w}": (f"model.hidden_size={w}", f"model.dense_ffn_size={3 * w}", f"model.kv_rank={w // 2}", *_LENGTH) for w in (32, 96)
}
_PAPER = {"3b": "3b.yaml", "9b": "9b.yaml", "27b": "27b_pp8.yaml"}


def runs(scale: Scale, seeds: int) -> list[Run]:
    found = []
    for seed in range(1, seeds + 1):
        for size in _SMALL if scale == "small" else _PAPER:
            base, sized = ("small", _SMALL[size]) if scale == "small" else (_PAPER[size], ())
            for kind in KINDS:
                settings = (*sized, f"residual.kind={kind}", "optimizer.decay=[]", f"train.seed={seed}")
                found.append(Run(f"{kind}-{size}-seed{seed}", {"kind": kind, "size": size, "seed": seed}, settings, base))
    return found


def measure(outcome: Outcome) -> dict[str, float | None]:
    steps = outcome.config["train"]["steps"]
    broke = outcome.end.broke_at is not None
    return {part: None if broke else outcome.at("val_loss", steps * int(part[0]) // int(part[2])) for part in PARTS}


def summarise(rows: Sequence[Row]) -> Report:
    sizes = [str(size) for (size,) in cells(rows, "size")]
    gaps = {
        (s, part): paired(where(rows, kind="mhc", size=s), where(rows, kind="none", size=s), part) for s in sizes for part in PARTS
    }
    lines = []
    for size in sizes:
        plain = shown(spread(values(where(rows, kind="none", size=size), PARTS[-1])))
        lines.append((size, plain, *(shown(gaps[size, part]) for part in PARTS)))
    columns = ("size", "none: loss at the end", *(f"mhc less none, {part} of the tokens" for part in PARTS))
    said = [
        Statement(*judged(gaps[size, PARTS[-1]], f"mhc less none, size {size}", -1, "the paper has mHC below at 3B, 9B and 27B"))
        for size in sizes
    ]
    first, last = (_by_seed(rows, size) for size in (sizes[0], sizes[-1]))
    change = gap([last[seed] - first[seed] for seed in last if seed in first])
    if change is not None:
        below = (gaps[sizes[-1], PARTS[-1]] or change).side < 0
        verdict: Verdict = "differs" if change.side > 0 else "agrees" if below else "open"
        said.append(
            Statement(
                verdict,
                f"From {sizes[0]} to {sizes[-1]} the difference to none changes by {change} (paper: it shrinks only a little).",
            )
        )
    figure = Figure("scaling", "mhc less none by tokens, a line a size", lambda f: _draw(f, rows, sizes))
    return Report([Table("Validation loss over width and tokens", columns, tuple(lines))], said, [figure], [RULE])


def _by_seed(rows: Sequence[Row], size: str, part: str = PARTS[-1]) -> dict[Any, float]:
    plain = {row.factors["seed"]: row.values[part] for row in where(rows, kind="none", size=size)}
    own = {row.factors["seed"]: row.values[part] for row in where(rows, kind="mhc", size=size)}
    return {seed: a - b for seed, a in own.items() if a is not None and (b := plain.get(seed)) is not None}


def _draw(figure: Any, rows: Sequence[Row], sizes: Sequence[str]) -> None:
    found: dict[str, Curve] = {
        size: {int(part[0]) / int(part[2]): list(_by_seed(rows, size, part).values()) for part in PARTS} for size in sizes
    }
    axes = figure.subplots()
    curves(axes, found, "share of the tokens", "loss of mhc less none's [nats]")
    axes.axhline(0.0, color="#555555", linewidth=0.8)


STUDY = Study(
    name="scaling",
    question="Does mhc keep its distance to the plain residual as width and tokens grow (mHC paper, Figure 6)?",
    seeds={"small": 5, "paper": 1},
    runs=runs,
    measure=measure,
    summarise=summarise,
    parts=4,
)
