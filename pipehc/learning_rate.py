"""The learning rate of a step: linear warm-up, then a staircase."""

import math
from typing import Any


def learning_rate(step: int, config: Any) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    It rises linearly and reaches `optimizer.lr` in step `warmup_steps` - 1. `optimizer.decay` lists pairs [f, m] in
    ascending order: from the fraction f of `train.steps` on, it is m times `optimizer.lr`. The paper's: 0.316 from 80 %, 0.1
    from 90 %.
    """
    optimizer, steps = config.optimizer, config.train.steps
    factor = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    begun = [multiple for fraction, multiple in optimizer.decay if step >= _first_step(fraction, steps)]
    if begun:
        factor *= begun[-1]
    return optimizer.lr * factor


def _first_step(fraction: float, steps: int) -> int:
    """The first step at or after this fraction; 0.7 of 10 is 7, although 0.7 * 10 is a little more than 7 in binary."""
    return math.ceil(round(fraction * steps, 6))
