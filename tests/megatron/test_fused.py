"""A fused function is one operation: on CPU what it says, in a dry run one launch."""

import pytest
import torch
from torch import Tensor

from pipehc.megatron.fused import fused
from pipehc.planning.dry_run.tables import phase
from pipehc.planning.dry_run.tracker import Tracker


@fused()
def scaled_and_squares(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return (x.float() + y * scale).to(x.dtype), x.float().square().mean(-1)


@fused(mutates=("x",))
def add_in_place(x: Tensor, y: Tensor) -> None:
    x.copy_(x * 2 + y)


def test_on_a_cpu_it_is_what_it_says():
    x, y = torch.randn(5, 8).bfloat16(), torch.randn(5, 8)
    sums, squares = scaled_and_squares(x, y, 0.5)
    assert torch.equal(sums, (x.float() + y * 0.5).bfloat16()) and torch.equal(squares, x.float().square().mean(-1))


def test_a_change_in_place_is_seen_by_autograd():
    weight, x = torch.ones(4, requires_grad=True), torch.randn(4)
    kept = (weight * x).sum()
    add_in_place(x, torch.ones(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_it_is_refused_where_autograd_would_record_it():
    x = torch.ones(2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="scaled_and_squares has no derivative"):
        scaled_and_squares(x, x, 1.0)
    with torch.no_grad():
        scaled_and_squares(x, x, 1.0)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_it_counts_as_one_launch_with_its_inputs_and_results(device):
    tracker = Tracker(torch.device(device), host=True)
    with tracker:
        x, y = torch.zeros(4, 6, dtype=torch.bfloat16, device=device), torch.zeros(4, 6, device=device)
        kept = [scaled_and_squares(x, y, 2.0) for _ in range(2)]
        add_in_place(x[:, :3], y[:, :3])
    counted = {o.name: (n, o.bytes, o.sort) for o, n in phase(tracker.launches, "setup").items()}
    assert counted["pipehc.scaled_and_squares"] == (2, 48 + 96 + 48 + 16, "other")
    assert counted["pipehc.add_in_place"] == (1, 2 * 24 + 48, "other")
    assert len(counted) == 3
    assert tracker.peak.live == 48 + 96 + 2 * (48 + 16) and kept
