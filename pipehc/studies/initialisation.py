"""Where hyper-connections start (residual.init, alpha, their learning rate and decay), and what that is worth.

The learning rate is constant after its warm-up, so the loss at an earlier step is that of a shorter training: one run, two lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipehc.studies.design import Figure, Report, Row, Scale, Statement, Study, Table
from pipehc.studies.figures import differences
from pipehc.studies.outcome import Outcome
from pipehc.studies.paired import RULE, Gap, cells, paired, shown, spread, values, where
from pipehc.studies.run import Factor, Run

KINDS = ("hc", "mhc", "isohc", "hybrid", "harmonized")
INITS = ("even", "staggered", "onehot", "scattered")
LENGTHS = ("half", "full")
# What else belongs to a start, tried with mhc at the smaller size (at others LARGER of it): name -> settings.
MORE = {
    "alpha 0.1": "residual.alpha=0.1",
    "alpha 1": "residual.alpha=1.0",
    "connection_lr 0.3": "optimizer.connection_lr=0.3",
    "connection_lr 3": "optimizer.connection_lr=3.0",
    "no connection_decay": "optimizer.connection_decay=false",
}
# Two evaluations, at half and at full length: each costs as much as ten steps.
LARGER = ("alpha 1",)
_SMALL = {
    f"w{width}": (f"model.hidden_size={width}", f"model.dense_ffn_size={3 * width}", "evaluation.interval=60") for width in (32, 64)
}
_PAPER = {"3b": "3b.yaml", "9b": "9b.yaml"}


def runs(scale: Scale, seeds: int) -> list[Run]:
    sizes = list(_SMALL if scale == "small" else _PAPER)
    return [run for seed in range(1, seeds + 1) for size in sizes for run in _of(scale, size, seed, size == sizes[0])]


def _of(scale: Scale, size: str, seed: int, with_more: bool) -> list[Run]:
    base, sized = ("small", _SMALL[size]) if scale == "small" else (_PAPER[size], ())

    def run(kind: str, init: str, more: str = "") -> Run:
        settings = [*sized, f"residual.kind={kind}", f"residual.init={init}", "optimizer.decay=[]", f"train.seed={seed}"]
        own = more.replace(" ", "_")
        name = "-".join(part for part in (kind, init if kind != "none" else "", own, size, f"seed{seed}") if part)
        factors: dict[str, Factor] = {
            "kind": kind,
            "init": init if kind != "none" else "",
            "more": more,
            "size": size,
            "seed": seed,
        }
        return Run(name, factors, (*settings, *([MORE[more]] if more else [])), base)

    found = [run("none", "even"), *(run(kind, init) for kind in KINDS for init in _inits(scale, kind, with_more))]
    return found + [run("mhc", init, more) for more in (MORE if with_more else LARGER) for init in ("even", "staggered")]


def _inits(scale: Scale, kind: str, smaller: bool) -> Sequence[str]:
    """Without Triton two kinds take three times as long as the others: on a CPU they have fewer starts."""
    if scale == "paper" or kind not in ("isohc", "hybrid"):
        return INITS
    return ("even", "staggered", "scattered") if smaller else ("even", "staggered")


def measure(outcome: Outcome) -> dict[str, float | None]:
    half = outcome.config["train"]["steps"] // 2
    return {"full": outcome.last("val_loss"), "half": outcome.at("val_loss", half)}


def summarise(rows: Sequence[Row]) -> Report:
    sizes = [str(size) for (size,) in cells(rows, "size")]
    tables = [_table(rows, size, length) for size in sizes for length in LENGTHS]
    plain = {size: where(rows, kind="none", size=size) for size in sizes}
    gaps = {
        (size, kind, init): paired(where(rows, kind=kind, init=init, more="", size=size), plain[size], "full")
        for size in sizes
        for kind in KINDS
        for init in INITS
    }
    figure = Figure(
        "init", "Validation loss less that of the plain residual, by seed", lambda f: _draw(f, sizes, gaps), (11.0, 6.0)
    )
    more = [_more(rows, size, length) for size in sizes for length in LENGTHS]
    return Report([*tables, *more], _statements(rows, sizes), [figure], [RULE, _CHOICE])


_CHOICE = (
    "The best start of a kind is the one with the lowest mean, over all sizes and lengths, of the paired difference to none: "
    "chosen among four by these same numbers, so the sentence on it flatters it. Means over sizes and lengths are taken seed by "
    "seed first, since the cells of one seed are not independent."
)


def _table(rows: Sequence[Row], size: str, length: str) -> Table:
    plain = where(rows, kind="none", size=size)
    lines = [("none", "", shown(spread(values(plain, length))), "0", "")]
    for kind in KINDS:
        even = where(rows, kind=kind, init="even", more="", size=size)
        for init in INITS:
            own = where(rows, kind=kind, init=init, more="", size=size)
            if not own:
                continue
            to_even = "" if init == "even" else shown(paired(own, even, length))
            lines.append((kind, init, shown(spread(values(own, length))), shown(paired(own, plain, length)), to_even))
    columns = ("residual", "init", "loss: mean (deviation; range)", "less none, paired, 95 %", "less even, paired, 95 %")
    return Table(f"Validation loss, size {size}, {length} length", columns, tuple(lines))


def _more(rows: Sequence[Row], size: str, length: str) -> Table:
    plain = where(rows, kind="none", size=size)
    lines = []
    for init in ("even", "staggered"):
        for more in ("", *(found for found in MORE if where(rows, more=found, size=size))):
            own = where(rows, kind="mhc", init=init, more=more, size=size)
            usual = where(rows, kind="mhc", init=init, more="", size=size)
            lines.append(
                (init, more or "as usual", shown(paired(own, plain, length)), shown(paired(own, usual, length)) if more else "")
            )
    columns = ("init", "mhc with", "less none, paired, 95 %", "less as usual, paired, 95 %")
    return Table(f"Alpha, learning rate and decay of hyper-connections, size {size}, {length} length", columns, tuple(lines))


def _statements(rows: Sequence[Row], sizes: Sequence[str]) -> list[Statement]:
    said = []
    for kind in KINDS:
        by_init = {init: _over_cells(rows, sizes, kind, init) for init in INITS}
        known = {init: found for init, found in by_init.items() if found is not None}
        if not known:
            said.append(Statement("open", f"{kind}: no start has two seeds that came to their end."))
            continue
        best = min(known, key=lambda init: known[init].mean)
        text = f"{kind}: the best start is {best}, {known[best]} against none over all sizes and lengths"
        side = known[best].side
        said.append(
            Statement(
                "agrees" if side < 0 else "differs" if side > 0 else "open",
                f"{text}: {'below' if side < 0 else 'above' if side > 0 else 'not apart from'} the plain residual"
                f"{'' if side else ' beyond chance'} (papers: hyper-connections lower the loss).",
            )
        )
        if best != "even" and (found := _over_cells(rows, sizes, kind, best, kind, "even")) is not None:
            better = "better than" if found.side < 0 else "not apart beyond chance from"
            said.append(Statement("measured", f"{kind}: {best} less even is {found}: {better} even."))
    return said


def _over_cells(
    rows: Sequence[Row], sizes: Sequence[str], kind: str, init: str, than: str = "none", than_init: str = ""
) -> Gap | None:
    """Differences of the seeds' means over sizes and lengths: cells of one seed are no independent numbers."""
    merged = []
    for k, i in ((kind, init), (than, than_init)):
        seeds: dict[Any, list[float]] = {}
        for size in sizes:
            for row in where(rows, kind=k, init=i, more="", size=size):
                seeds.setdefault(row.factors["seed"], []).extend(v for length in LENGTHS if (v := row.values[length]) is not None)
        whole = len(sizes) * len(LENGTHS)
        merged.append([Row("", {"seed": s}, {"loss": sum(v) / whole}) for s, v in seeds.items() if len(v) == whole])
    return paired(merged[0], merged[1], "loss")


def _draw(figure: Any, sizes: Sequence[str], gaps: dict[tuple[str, str, str], Gap | None]) -> None:
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes):
        found = {f"{kind} {init}": gap for kind in KINDS for init in INITS if (gap := gaps[size, kind, init]) is not None}
        differences(axes, found, "loss less none's [nats]")
        axes.set_title(f"size {size}", fontsize=9)


STUDY = Study(
    name="init",
    question="Where should hyper-connections start, and do they then lower the loss of the plain residual?",
    seeds={"small": 5, "paper": 3},
    runs=runs,
    measure=measure,
    summarise=summarise,
    parts=2,
)
