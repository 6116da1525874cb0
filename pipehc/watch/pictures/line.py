"""A line of diagnostics.jsonl and one of metrics.jsonl. What was not finite is null in the files and nan here; None is absent."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _array(value: Any) -> np.ndarray:
    try:
        return np.array(value, dtype=float)  # None becomes nan
    except (TypeError, ValueError):
        raise ValueError("must be a list of numbers, or of lists of equal length") from None


Array = Annotated[np.ndarray, BeforeValidator(_array)]
Number = Annotated[float | None, BeforeValidator(lambda value: math.nan if value is None else value)]
Count = Annotated[int, Field(ge=1)]


_NAMES = {"*": "attention", "+": "attention", "-": "FFN", "E": "FFN", "G": "GDN"}


class _Record(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True, strict=True, frozen=True)


class Metrics(_Record):
    """Of a training step, or of the evaluation after it."""

    step: int
    loss: Number = None
    grad_norm: Number = None
    val_loss: Number = None
    gain: Number = None  # composite of the mean maps


class Gains(_Record):
    """[L] each. forward: largest sum of |entries| over a row, of the signal; backward: over a column, of the gradient."""

    forward: Array
    backward: Array

    @property
    def largest(self) -> np.ndarray:
        """Of both directions, [L]."""
        return np.maximum(self.forward, self.backward)


class Distance(_Record):
    """[L] each: largest |row sum - 1|, |column sum - 1| and |(H^T H - I)_ij| of H_res."""

    rows: Array
    columns: Array
    orthogonality: Array


class Line(_Record):
    """A diagnosed step of L sub-layers over n streams; kind `none` lacks what is of maps. Of L + 1 the last is the depth's end."""

    step: int
    kind: str
    streams: Count
    sublayers: Count
    layers: str | None = None  # of a HybridModel, whose layers are single sub-layers: their symbols in Megatron's pattern
    loss: Number = None
    gain: Gains | None = None
    composite: Gains | None = None
    distance: Distance | None = None
    maps: Array | None = None  # [L, n, n]
    composite_map: Array | None = None  # [n, n]
    h_pre: Array | None = None  # [L, n]
    h_post: Array | None = None
    h_pre_norm: Array | None = None  # [L]
    h_post_norm: Array | None = None
    stream_norm: Array | None = None  # [L + 1, n]
    similarity: Array | None = None  # [L + 1]
    gradient: Array | None = None
    transported: Array | None = None
    s: Number = None
    gain_average: Number = None
    warnings: list[str] = []

    @property
    def whole_gain(self) -> float | None:
        """Composite gain of the whole depth, of the larger direction: what the feedback of harmonized holds."""
        return None if self.composite is None else float(self.composite.largest[0])

    def name_of(self, sublayer: int) -> str:
        """Without symbols, attention is sub-layer 2 * block, the feed-forward layer the next one."""
        symbol = "*-"[sublayer % 2] if self.layers is None else self.layers[sublayer]
        return _NAMES.get(symbol, symbol)

    @model_validator(mode="after")
    def _shapes(self) -> Line:
        L, n = self.sublayers, self.streams
        if self.layers is not None and len(self.layers) != L:
            raise ValueError(f"layers has {len(self.layers)} symbols: must be {L} for {L} sub-layers")
        expected = {"maps": (L, n, n), "composite_map": (n, n), "h_pre": (L, n), "h_post": (L, n), "stream_norm": (L + 1, n)}
        expected |= dict.fromkeys(("h_pre_norm", "h_post_norm"), (L,))
        expected |= dict.fromkeys(("similarity", "gradient", "transported"), (L + 1,))
        found = {name: getattr(self, name) for name in expected}
        for name in ("gain", "composite", "distance"):
            part = getattr(self, name)
            for side in type(part).model_fields if part is not None else ():
                found[f"{name}.{side}"], expected[f"{name}.{side}"] = getattr(part, side), (L,)
        for name, array in found.items():
            if array is not None and array.shape != expected[name]:
                raise ValueError(
                    f"{name} has shape {list(array.shape)}: must be {list(expected[name])} for {L} sub-layers and {n} streams"
                )
        return self
