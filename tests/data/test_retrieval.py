"""Samples of key-value retrieval: what they consist of, and what they depend on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import digest, open_

from pipehc.data.batches import Sampler, batch, counted_labels
from pipehc.data.retrieval import FILLER, LENGTH, MASKED, Retrieval

MADE: dict[str, Any] = {"kind": "retrieval", "sequence_length": 40}


@pytest.mark.parametrize(("pairs", "length"), [(8, 24), (8, 40), (1, 3), (128, 500)])
def test_queries_ask_for_the_values_of_the_pairs(pairs: int, length: int) -> None:
    split = Retrieval(5, "training", pairs, length)
    assert split.counted_per_sample == counted_labels(split) == pairs
    for index in range(20):
        tokens, labels = split[index]
        assert tokens.shape == labels.shape == (length,) and tokens.dtype == labels.dtype == torch.int64
        keys, values = tokens[: 2 * pairs : 2].tolist(), tokens[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == pairs and all(0 <= key < 128 for key in keys) and all(128 <= value < 256 for value in values)
        value_of, queries = dict(zip(keys, values)), tokens[-pairs:].tolist()
        assert sorted(queries) == sorted(keys)
        assert labels[-pairs:].tolist() == [value_of[key] for key in queries]
        assert (labels[:-pairs] == MASKED).all() and (tokens[2 * pairs : -pairs] == FILLER).all()
    for outside in (-1, LENGTH):
        with pytest.raises(IndexError):
            split[outside]


def test_keys_values_and_order_are_drawn_evenly() -> None:
    split = Retrieval(5, "training", 8, 24)
    tokens = torch.stack([split[index][0] for index in range(2000)])
    for drawn, first in ((tokens[:, :16:2], 0), (tokens[:, 1:16:2], 128)):
        counts = torch.bincount(drawn.flatten() - first, minlength=128)  # 125 of each are expected, 11 is a standard deviation
        assert counts.shape == (128,) and counts.min() > 70 and counts.max() < 180
    asked_first = (tokens[:, :16:2] == tokens[:, 16:17]).sum(0)  # 250 of each place are expected
    assert asked_first.sum() == 2000 and asked_first.min() > 190 and asked_first.max() < 310


def test_samples_are_functions_of_seed_side_and_number() -> None:
    def drawn(seed: int, side: str, **more: int) -> list[list[int]]:
        split = Retrieval(seed, side, **{"pairs": 8, "sequence_length": 24, **more})
        return [split[index][0].tolist() for index in reversed(range(200))]

    train = drawn(1, "training")
    assert train == drawn(1, "training")
    others = [drawn(1, "validation"), drawn(2, "training"), drawn(2, "validation")]
    every = [tuple(sample) for samples in (train, *others) for sample in samples]
    assert len(set(every)) == len(every)
    longer = drawn(1, "training", sequence_length=50)
    assert [sample[:16] + sample[-8:] for sample in longer] == train


def test_samples_are_those_that_old_checkpoints_continue() -> None:
    tokens, labels = Retrieval(1234, "training", 2, 7)[3]
    assert (tokens.tolist(), labels.tolist()) == ([85, 168, 4, 240, 255, 85, 4], [-1, -1, -1, -1, -1, 168, 240])


def test_batches_of_a_run(tmp_path: Path) -> None:
    splits = open_([], tmp_path, **MADE)
    assert digest(splits) == digest(open_([], tmp_path, **MADE))
    tokens, labels = batch(splits.train, Sampler(len(splits.train), 7), 3, 10)
    assert tokens.shape == labels.shape == (10, 40) and tokens.is_contiguous() and labels.is_contiguous()
    assert ((labels >= 0).sum(-1) == 8).all()
    assert torch.equal(tokens[4:], batch(splits.train, Sampler(len(splits.train), 7), 7, 6)[0])
    assert not list(tmp_path.iterdir())


def test_fingerprints_differ_where_samples_do(tmp_path: Path) -> None:
    changes = ({}, {"seed": 8}, {"sequence_length": 41}, {"pairs": 7})
    found = [open_([], tmp_path, **{**MADE, **change}).info.fingerprint for change in changes]
    assert len(set(found)) == len(found)
    assert open_([], tmp_path, **MADE, vocab_size=300, tokenizer="absent").info.fingerprint == found[0]
