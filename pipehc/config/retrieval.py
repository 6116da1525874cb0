"""Key-value retrieval, whose samples are made as they are drawn: which other keys it asks for, and which it has no use for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def retrieval_problems(data: Any, sequence_length: int) -> Iterator[str]:
    """What is wrong with a section `data`, a message each: of kind retrieval, or of another with keys of retrieval."""
    fields = type(data).model_fields
    if data.kind != "retrieval":
        if data.pairs != fields["pairs"].default:
            yield f"data.pairs: {data.pairs}: only retrieval takes it, but data.kind is {data.kind}"
        return
    for key in ("paths", "suffixes", "tokenizer", "end_of_document", "validation_fraction"):
        value = getattr(data, key)
        if value != fields[key].default:
            shown = list(value) if isinstance(value, tuple) else value
            yield f"data.{key}: {shown!r}: must be left out with data.kind retrieval, whose samples are made, not read"
    if sequence_length < 3 * data.pairs:
        yield (
            f"train.sequence_length: {sequence_length}: must be at least 3 x data.pairs = {3 * data.pairs} with data.kind "
            "retrieval: pairs of key and value, and the keys again"
        )
