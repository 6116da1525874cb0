"""Table 1 of the mHC paper: which of the three maps lowers the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipehc.studies.design import Figure, Report, Row, Scale, Statement, Study, Table, Verdict
from pipehc.studies.figures import differences
from pipehc.studies.outcome import Outcome
from pipehc.studies.paired import RULE, Gap, judged, paired, shown, spread, values, where
from pipehc.studies.run import Run

# Maps that are learned -> what the paper's table has for them. The others are fixed: H_pre = 1/n, H_post = 1, H_res = I.
MAPS: dict[str, float | None] = {
    "res": -0.022,
    "res+pre": -0.025,
    "res+pre+post": -0.027,
    "pre": None,
    "post": None,
    "pre+post": None,
}
KINDS = ("hc", "mhc")  # the paper's table is of HC
_ALL = ("pre", "post", "res")
_SMALL = ("train.steps=240", "evaluation.interval=60")


def runs(scale: Scale, seeds: int) -> list[Run]:
    base = "small" if scale == "small" else "27b_pp8.yaml"
    found = []
    for seed in range(1, seeds + 1):
        found.append(_run(base, "none", "", seed))
        found += [_run(base, kind, maps, seed) for kind in KINDS for maps in MAPS]
    return found


def _run(base: str, kind: str, maps: str, seed: int) -> Run:
    fixed = [name for name in _ALL if maps and name not in maps.split("+")]
    name = "-".join([kind, *maps.split("+")] if maps else [kind])
    settings = (
        f"residual.kind={kind}",
        f"residual.fixed=[{', '.join(fixed)}]",
        f"train.seed={seed}",
        *(_SMALL if base == "small" else ()),
    )
    return Run(f"{name}-seed{seed}", {"kind": kind, "maps": maps or "none", "seed": seed}, settings, base)


def measure(outcome: Outcome) -> dict[str, float | None]:
    return {"val_loss": outcome.last("val_loss")}


def summarise(rows: Sequence[Row]) -> Report:
    plain = where(rows, kind="none")
    gaps = {(kind, maps): paired(where(rows, kind=kind, maps=maps), plain, "val_loss") for kind in KINDS for maps in MAPS}
    lines = [("none", "", shown(spread(values(plain, "val_loss"))), "0", "", "")]
    for (kind, maps), found in gaps.items():
        losses = values(where(rows, kind=kind, maps=maps), "val_loss")
        published = MAPS[maps] if kind == "hc" else None
        ranged = f"{min(found.single):+.4f} to {max(found.single):+.4f}" if found else ""
        lines.append((kind, maps, shown(spread(losses)), shown(found), ranged, "" if published is None else f"{published:+.3f}"))
    table = Table(
        "Validation loss by the maps that are learned",
        ("residual", "learned", "loss: mean (deviation; range)", "less none, paired, 95 %", "range", "paper, 27B"),
        tuple(lines),
    )
    drawn = {f"{kind} {maps}": found for (kind, maps), found in gaps.items()}
    figure = Figure("ablation", "Validation loss less that of the plain residual, by seed", lambda f: _draw(f, drawn), (8.0, 4.4))
    return Report([table], _statements(gaps), [figure], [RULE])


def _statements(gaps: dict[tuple[str, str], Gap | None]) -> list[Statement]:
    said = [
        Statement(*judged(gaps["hc", maps], f"hc, {maps} learned, against none", -1, f"the paper has {published:+.3f}"))
        for maps, published in MAPS.items()
        if published is not None
    ]
    res, full = gaps["hc", "res"], gaps["hc", "res+pre+post"]
    if res and full and full.side == -1:
        share = res.mean / full.mean
        verdict: Verdict = "agrees" if share > 0.5 else "differs"
        said.append(Statement(verdict, f"H_res alone brings {100 * share:.0f} % of what all three maps bring (paper: 81 %)."))
    else:
        said.append(
            Statement(
                "open", "All three maps of hc lower no loss beyond chance here, so none has a share in it (paper: H_res 81 %)."
            )
        )
    alone = gaps["mhc", "res"]
    if alone is not None:
        most = max(map(abs, alone.single))
        text = "mhc with H_res alone can be no more than the plain residual: read and written alike, its streams stay copies"
        said.append(Statement("measured", f"{text}; rounding makes a difference of {most:.1e} at most."))
    return said


def _draw(figure: Any, drawn: dict[str, Gap | None]) -> None:
    differences(figure.subplots(), drawn, "validation loss less none's [nats], same seed")


STUDY = Study(
    name="ablation",
    question="Which of the three maps of a hyper-connection lowers the loss (mHC paper, Table 1)?",
    seeds={"small": 6, "paper": 1},
    runs=runs,
    measure=measure,
    summarise=summarise,
)
