"""Gains, gradients and breaks over depth and learning rate, for every residual (mHC Figures 2 and 3; IsoHC; Harmonized)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from pipehc.studies.design import Report, Row, Scale, Study
from pipehc.studies.outcome import Outcome
from pipehc.studies.run import Run
from pipehc.studies.stability_report import summarise

KINDS = ("none", "hc", "mhc", "isohc", "hybrid", "harmonized")
MARGIN = 1.0  # nats above the least so far, both means of SMOOTH steps: broken
SMOOTH = 5
FEEDBACK = 20  # steps that Harmonized's feedback averages over: ema <- 0.95 ema + 0.05 G
SETTLED = 5 * FEEDBACK
_SIZED = ("train.micro_batch=4", "train.global_batch=4", "evaluation.interval=60", "model.hidden_size=32", "diagnostics.interval=1",
          "model.dense_ffn_size=96", "optimizer.clip_grad=0", "optimizer.decay=[]")  # fmt: skip
_SHORT, _LONG = (60, 10), (300, 60)  # steps, warm-up; the feedback needs a hundred steps to settle
_PAPER = tuple((blocks, rate, KINDS, (30000, 2000)) for blocks in (12, 24, 48) for rate in (8.6e-4, 3e-3))
_SMALL = ((4, 1e-1, KINDS, _SHORT), (8, 3e-3, ("hc", "harmonized"), _LONG), (24, 3e-3, KINDS, _SHORT), (24, 1e-1, KINDS, _SHORT))


def runs(scale: Scale, seeds: int) -> list[Run]:
    found = []
    for seed in range(1, seeds + 1):
        for blocks, rate, kinds, (steps, warmup) in _SMALL if scale == "small" else _PAPER:
            for kind in kinds:
                settings = [f"model.blocks={blocks}", f"residual.kind={kind}", f"optimizer.lr={rate}", f"train.seed={seed}"]
                settings += [f"model.dense_blocks={blocks}", *_SIZED] if scale == "small" else []
                settings += [f"train.steps={steps}", f"optimizer.warmup_steps={warmup}"] if scale == "small" else []
                factors: dict[str, str | int | float] = {"kind": kind, "blocks": blocks, "lr": rate, "steps": steps, "seed": seed}
                base = "small" if scale == "small" else "3b.yaml"
                found.append(Run(f"{kind}-b{blocks}-lr{rate:g}-seed{seed}", factors, tuple(settings), base))
    return found


def measure(outcome: Outcome) -> dict[str, float | None]:
    """All by steps and largest values over sub-layers; see the table's columns in `stability_report.py`."""
    lines, config = outcome.diagnostics, outcome.config
    broke, shown = first_break(outcome)
    warned = next((line["step"] for line in lines if _alarming(line)), None)
    gains = [_most([*line["composite"]["forward"], *line["composite"]["backward"]]) for line in lines if "composite" in line]
    deviations = list(_off_target(outcome)) if config["residual"]["kind"] == "harmonized" else []
    return {
        "val_loss": outcome.last("val_loss"),
        "broke": broke,
        "warned": warned,
        "warned_before": float(warned is not None and warned < shown) if shown is not None else None,
        "gain_end": gains[-1] if gains else None,
        "gain_most": max(gains, default=None),
        "gradient_ratio": (ratio := _ratio(lines[-1]["gradient"]) if lines else None),
        "gradient_off": None if ratio is None else ratio - 1,
        "transported_off": max((_ratio(line["transported"]) - 1 for line in lines if "transported" in line), default=None),
        "target_off": max(deviations, default=None),
        "gain_bound": config["diagnostics"]["gain_bound"],
    }


def first_break(outcome: Outcome) -> tuple[int, int] | tuple[None, None]:
    """The step at which the loss was no finite number, or more than MARGIN above its least so far (single batches differ too much:
    means of the last SMOOTH steps). And the step at which it may have begun to show: the first of those."""
    least, losses = math.inf, deque[float](maxlen=SMOOTH)
    for line in outcome.metrics:
        if "loss" in line:
            if line["loss"] is None:
                return line["step"], line["step"]
            losses.append(line["loss"])
            if len(losses) == SMOOTH:
                mean = fmean(losses)
                if mean > least + MARGIN:
                    return line["step"], line["step"] - SMOOTH + 1
                least = min(least, mean)
    end = outcome.end.broke_at
    return (None, None) if end is None else (end, end)


def _alarming(line: Mapping[str, Any]) -> bool:
    """Whether something was warned of that runs away; streams that are copies of each other do no harm to the loss."""
    return any("copies of each other" not in text for text in line.get("warnings", ()))


def _off_target(outcome: Outcome) -> Iterator[float]:
    """How far the gain, a mean over FEEDBACK steps as the feedback sees it, is from its target, as a part of it: after twice the
    warm-up, and SETTLED steps after the gain first reached its target. Nothing where it did not."""
    target, begin = outcome.config["residual"]["target_gain"], 2 * outcome.config["optimizer"]["warmup_steps"]
    gains = [(line["step"], line["gain"]) for line in outcome.metrics if line.get("gain") is not None]
    reached = next((step for step, gain in gains if gain >= target), math.inf)
    settled = [gain for step, gain in gains if step > max(begin, reached + SETTLED)]
    for end in range(FEEDBACK, len(settled) + 1):
        yield abs(fmean(settled[end - FEEDBACK : end]) / target - 1)


def _most(values: Sequence[float | None]) -> float:
    """The largest; what is null was not finite."""
    return max(math.inf if value is None else value for value in values)


def _ratio(values: Sequence[float | None]) -> float:
    """Largest by smallest."""
    if None in values or not min(values):  # type: ignore[type-var]
        return math.inf
    return max(values) / min(values)  # type: ignore[type-var,operator]


def _summarise(rows: Sequence[Row]) -> Report:
    return summarise(rows, KINDS)


STUDY = Study(
    name="stability",
    question="At which depth and learning rate does each residual break, and do the diagnostics say so before the loss does?",
    seeds={"small": 3, "paper": 1},
    runs=runs,
    measure=measure,
    summarise=_summarise,
)
