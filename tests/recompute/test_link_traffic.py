"""What a sub-layer's F, R and B move as a stage launches them, in units of T*C numbers; and nothing beside the kernels."""

import pytest
import torch
from kernel_cases import backend
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pipehc.comm.queues import IssueQueue
from pipehc.kernels.language import noting
from pipehc.model import sublayers
from pipehc.model.hyper_connection import HyperConnection
from pipehc.model.sublayers import Sublayer, build_chain
from pipehc.planning.dry_run.operations import operation
from pipehc.recompute import Pass, Piece

N = 4


class Moved(TorchDispatchMode):
    """Numbers of a token that kernels read and write, in units of C; and the operations of torch that launch anything."""

    def __init__(self, tokens, channels):
        super().__init__()
        self._tokens, self._unit = tokens, tokens * channels * 2
        self.units, self.launches, self.operations, self.tensors = 0.0, 0, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if operation(func, args, kwargs or {}, out) is not None and any(
            self._tokens in t.shape for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)
        ):
            self.operations.append(str(func))
        return out

    def kernel(self, name, args):
        """Every tensor once, as in a dry run; those without tokens, which are of phi's shape, not at all."""
        self.launches += 1
        given = [t for t in args.values() if isinstance(t, torch.Tensor)]
        self.units += sum(t.numel() * t.element_size() for t in given if t.shape[:1] == (self._tokens,)) / self._unit
        self.tensors += given
        return _disable_current_modes()


def identity(name):
    return Piece("f", lambda x: (x.view(x.shape),), ("normed",), ("f",), name)


def phases(blocks, tokens, channels, device="meta", recompute=True, kind="mhc"):
    """Moved by F, R and B of a middle stage whose norms and F's do nothing, and (x0, result, their gradients)."""
    count = sum(map(len, blocks))
    connections = [HyperConnection(channels, N, kind, iterations=2).to(device) for _ in range(count)]
    row = [Sublayer(str(i), connection, lambda h: h, (identity(str(i)),)) for i, connection in enumerate(connections)]
    chain = build_chain(row, blocks, None, None)
    x, gradient = (torch.ones(tokens, 1, N * channels, dtype=torch.bfloat16, device=device) for _ in range(2))
    moved = {}
    with backend("triton"):
        for phase in "FRB":
            with Moved(tokens, channels) as moved[phase], noting(moved[phase].kernel):
                if phase == "F":
                    run = Pass(chain, dict.fromkeys(("compute", "high"), IssueQueue()), {"x0": x}, recompute=recompute)
                    run.forward_all()
                    result = run.result()
                elif phase == "R":
                    for block in range(len(blocks)):
                        run.rebuild(block)
                else:
                    run.seed(chain.result, gradient)
                    run.backward_all()
                    d_x = run.gradient("x0")
    return moved, (x, result, d_x, gradient)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_units_of_a_sublayer(length, monkeypatch):
    """phi and its gradient aside: what cannot be avoided, and the maps, which are less than half a unit of 2560 channels."""
    tokens, channels = 4096, 2560
    found, _ = phases([range(length), range(length, 2 * length)], tokens, channels)
    units = {phase: moved.units / (2 * length) for phase, moved in found.items()}
    least = {"F": 14 + 4 / length, "R": 10 - 5 / length, "B": 28 + 4 / length}
    for phase, minimum in least.items():
        assert minimum < units[phase] < minimum + 0.5, (phase, units[phase])
    monkeypatch.setattr(sublayers, "carriers", lambda h_post, h_res: (None, None))
    apart, _ = phases([range(length), range(length, 2 * length)], tokens, channels)
    assert apart["B"].units / (2 * length) > 27 - 4 / length
    assert apart["B"].operations == ["aten.add.Tensor"] * 2  # of the gradients of a block's streams, 12 units
    assert found["B"].operations == []


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["mhc", "harmonized"])
def test_nothing_is_cast_copied_or_added_on_the_way(recompute, kind):
    """From the message to the first map and from the last one to the next message, both ways, and between the two."""
    found, (x, result, d_x, gradient) = phases([range(2), range(2, 4)], 16, 64, "cpu", recompute, kind)
    assert {phase: moved.operations for phase, moved in found.items()} == {"F": [], "R": [], "B": []}

    def taken(phase, tensor):
        return any(t.data_ptr() == tensor.data_ptr() for t in found[phase].tensors)

    assert taken("F", x) and taken("F", result) and taken("B", gradient) and taken("B", d_x)
    for message in (result, d_x):
        assert message.is_contiguous() and message.dtype == x.dtype and message.shape == x.shape
