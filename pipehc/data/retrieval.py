"""Key-value retrieval: pairs at the start, their keys again in another order at the end, whose values are to be told.

    k1 v1 k2 v2 ... k8 v8   filler ...   k5 k1 ... k3       tokens
    the labels are masked                v5 v1 ... v3       labels

After CURV Institute, "Harmonized Hyper-Connections: Stabilizing Residual Transport Through Feedback on Geometry".
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

KEYS = 128  # tokens 0 ... 127; values are 128 ... 255
VALUES = 128
FILLER = KEYS + VALUES - 1
"""What stands between pairs and queries. A value: never does it follow a key, so what follows a key is still the value of that key,
whichever it is."""

MASKED = -1
"""The label of a position that does not count."""

LENGTH = 2**40
"""Samples of an epoch: no run draws one twice."""


class Retrieval:
    """Samples (tokens, labels), int64 [sequence_length] each: functions of seed, side and index alone.

    The keys of a sample are different, its values are drawn independently. side: names the stream of samples, which has none in
    common with another's but by chance.
    """

    def __init__(self, seed: int, side: str, pairs: int, sequence_length: int) -> None:
        assert 0 < pairs <= KEYS and sequence_length >= 3 * pairs, "the schema allows nothing else"
        self.counted_per_sample = pairs
        self._stream, self._length = f"retrieval {seed} {side}", sequence_length

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < LENGTH:
            raise IndexError(f"sample {index} of {LENGTH}")
        pairs = self.counted_per_sample
        # Of a hash, as the order of samples is: on no library's random stream, hence on no version, does it depend.
        drawn = hashlib.shake_128(f"{self._stream} {index}".encode()).digest(8 * (KEYS + 2 * pairs))
        for_keys, for_values, for_order = np.split(np.frombuffer(drawn, "<u8"), [KEYS, KEYS + pairs])
        keys = for_keys.argsort(kind="stable")[:pairs]
        values = KEYS + (for_values % VALUES).astype(np.int64)
        order = for_order.argsort(kind="stable")
        tokens, labels = np.full(self._length, FILLER), np.full(self._length, MASKED)
        tokens[: 2 * pairs] = np.stack((keys, values), -1).ravel()
        tokens[-pairs:], labels[-pairs:] = keys[order], values[order]
        return torch.from_numpy(tokens), torch.from_numpy(labels)

    def digest(self) -> str:
        """Differs where the samples do: of the first one, which all that makes them has a part in."""
        return hashlib.blake2b(b"".join(part.numpy().tobytes() for part in self[0]), digest_size=16).hexdigest()
