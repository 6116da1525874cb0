"""The order of samples, and batches, against plain re-computations."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import open_, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from pipehc.data.batches import Sampler, Windows, batch


@given(length=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_every_sample_once(length: int, seed: int, epoch: int) -> None:
    sampler = Sampler(length, seed)
    assert sorted(sampler.index(epoch * length + i) for i in range(length)) == list(range(length))


def test_the_order_depends_on_nothing_but_length_seed_and_number() -> None:
    sampler = Sampler(997, 3)
    forward = [sampler.index(k) for k in range(3000)]
    fresh = [Sampler(997, 3).index(k) for k in reversed(range(3000))][::-1]
    assert forward == fresh
    assert forward[:997] != forward[997:1994]  # another epoch, another order
    assert forward[:997] != [Sampler(997, 4).index(k) for k in range(997)]


def test_the_order_is_the_one_that_old_checkpoints_continue() -> None:
    assert [Sampler(10, 1234).index(k) for k in range(20)] == [8, 2, 7, 9, 1, 6, 3, 4, 0, 5, 8, 9, 2, 1, 0, 3, 4, 5, 7, 6]


def test_all_orders_of_few_samples_are_equally_likely() -> None:
    sampler = Sampler(3, 0)
    orders = Counter(tuple(sampler.index(3 * epoch + i) for i in range(3)) for epoch in range(6000))
    assert len(orders) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in orders.values()) < 25.7  # chi-square, 5 degrees of freedom, p = 1e-4


def test_neighbours_in_the_data_are_no_neighbours_in_the_run() -> None:
    order = np.array([Sampler(10_000, 5).index(k) for k in range(10_000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05  # 5 standard deviations
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # two are expected


def test_a_huge_data_set_costs_nothing() -> None:
    sampler = Sampler(10**15, 5)
    indices = [sampler.index(k) for k in range(10**14, 10**14 + 1000)]
    assert len(set(indices)) == 1000 and max(indices) < 10**15 and max(indices) > 9 * 10**14


def test_a_batch_is_the_same_whether_or_not_earlier_ones_were_drawn(tmp_path: Path) -> None:
    write_documents(tmp_path / "text")
    split = open_([tmp_path / "text"], tmp_path).train
    sampler = Sampler(len(split), 7)
    steps = 3 * len(split) // 8  # three epochs; no batch ends with an epoch
    run = [batch(split, sampler, 8 * step, 8) for step in range(steps)]
    resumed = open_([tmp_path / "text"], tmp_path).train
    for step in (0, 1, steps // 2, steps - 1):
        tokens, labels = batch(resumed, Sampler(len(resumed), 7), 8 * step, 8)
        assert torch.equal(tokens, run[step][0]) and torch.equal(labels, run[step][1])
    tokens, labels = run[0]
    assert tokens.dtype == labels.dtype == torch.int64 and tokens.shape == labels.shape == (8, 16)
    assert tokens.is_contiguous() and labels.is_contiguous()
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    together = batch(split, sampler, 3, 10)[0]  # the micro-batches of a step are slices of it
    assert torch.equal(together, torch.cat([batch(split, sampler, 3, 4)[0], batch(split, sampler, 7, 6)[0]]))


def test_windows_cover_the_stream() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    for length in (1, 2, 7, 998, 999, 1000):
        windows = Windows(tokens, length)
        assert len(windows) == 999 // length
        assert all(windows[i].tolist() == list(range(i * length, i * length + length + 1)) for i in range(len(windows)))
        for outside in (-1, len(windows)):
            with pytest.raises(IndexError):
                windows[outside]
