"""The head of a report: with which command, sizes, seeds and times its numbers were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipehc.studies.outcome import Outcome

_SIZES = {
    "model.hidden_size": "hidden size",
    "model.blocks": "blocks",
    "model.experts": "experts",
    "residual.streams": "streams",
    "train.sequence_length": "sequence",
    "train.global_batch": "sequences a step",
    "train.steps": "steps",
    "optimizer.lr": "learning rate",
    "train.precision": "precision",
}


def facts(command: str, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """By what they are about. Values in which runs differ are all there."""
    sizes = [f"{words} {_join([_value(o, key) for o in outcomes])}" for key, words in _SIZES.items()]
    seconds = sum(o.end.seconds for o in outcomes)
    return {
        "command": f"`{command}`",
        "sizes": "; ".join(sizes),
        "data": _join([_data(outcome) for outcome in outcomes]),
        "seeds": _join([outcome.run.factors["seed"] for outcome in outcomes if "seed" in outcome.run.factors]) or "none",
        "runs": f"{len(outcomes)}, {seconds / 60:.0f} minutes of their own time in all ({seconds / len(outcomes):.0f} s each); "
        "of a resumed run since then",
    }


def _value(outcome: Outcome, key: str) -> Any:
    section, _, name = key.partition(".")
    return outcome.config[section][name]


def _data(outcome: Outcome) -> str:
    """Without paths, which are this machine's."""
    data = outcome.config["data"]
    if data["kind"] == "text":
        source = f"{len(data['paths'])} paths" if data["paths"] else "the Python sources of the interpreter's standard library"
        return f"{source}, tokens: {'bytes' if data['tokenizer'] == 'bytes' else 'a tokenizer of its own'}"
    return str(data["kind"])


def _join(values: Sequence[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))
