"""Values of options in Python: refused with a sentence before anything is built, on every rank, since all are given the same."""

from __future__ import annotations

from typing import Any


def refuse_unless(good: bool, name: str, value: Any, allowed: str) -> None:
    """ValueError naming the option, its value and what is allowed."""
    if not good:
        raise ValueError(f"{name} = {value!r}: must be {allowed}")


def is_whole(value: Any, least: int) -> bool:
    """A whole number from `least` on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_positive(value: Any) -> bool:
    """A number above 0; nan is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
