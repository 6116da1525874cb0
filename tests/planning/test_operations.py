"""What single operations cost, and that every kernel is noted, on tensors without data as on real ones."""

import ast
from pathlib import Path

import pytest
import torch
from kernel_cases import backend, make_inputs, norm_weight

from pipehc.kernels import coefficients_pre, post_res, post_res_pre
from pipehc.kernels.language import noting
from pipehc.kernels.manifolds import Birkhoff, IdentityOffset
from pipehc.planning.dry_run.kernels import KERNELS
from pipehc.planning.dry_run.operations import operation
from pipehc.planning.dry_run.tables import actions, phase
from pipehc.planning.dry_run.tracker import Tracker, Where

ROOT = Path(__file__).parents[2]


def launched(work, device="meta"):
    """What `work` launches, by name of the operation."""
    tracker = Tracker(torch.device(device))
    with tracker, noting(tracker.note_kernel):
        work()
    return {o.name: (n, o.flops, o.bytes) for o, n in tracker.launches[Where("setup")].items()}


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype, device="meta")


def test_products_count_their_arithmetic_and_every_tensor_once():
    a, b = zeros(5, 7), zeros(7, 11)
    assert launched(lambda: a @ b) == {"aten.mm": (1, 2 * 5 * 7 * 11, 2 * (35 + 77 + 55))}


def test_views_and_empty_tensors_are_free():
    a = zeros(4, 6)
    assert launched(lambda: (a.t(), a[1:], a.view(24), torch.empty_like(a), a.new_empty(3), a.split(2))) == {}


def test_rows_that_are_not_asked_for_are_not_read():
    table, rows = zeros(1000, 8), zeros(3, dtype=torch.int64)
    assert launched(lambda: table.index_select(0, rows)) == {"aten.index_select": (1, 0.0, 2 * 3 * 8 * 2 + 3 * 8)}


def test_expanded_tensors_are_read_as_they_lie():
    row, a = zeros(1, 8), zeros(1000, 8)
    assert launched(lambda: a + row.expand(1000, 8))["aten.add"][2] == 2 * (8 + 8000 + 8000)


def test_causal_attention_counts_half_of_the_square():
    q, k, v = zeros(1, 2, 64, 24), zeros(1, 2, 64, 24), zeros(1, 2, 64, 16)
    found = launched(lambda: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True))
    [(count, flops, _)] = found.values()
    assert (count, flops) == (1, 2 * 64 * 64 * (24 + 16))


def test_memory_is_followed_to_its_end():
    tracker = Tracker(torch.device("meta"))
    with tracker:
        with tracker.entered(Where("F", 0, 1, "0.mlp")):
            a = torch.zeros(100, device="meta")
            b = a.view(10, 10) + 1
            del a
        tracker.turn(Where("step"))
        c = torch.zeros(1000, device="meta")
        del b
        del c
    assert tracker.peak.live == 4400
    assert [(block.nbytes, block.where.kind, block.died is not None) for block in tracker.history] == [
        (400, "F", True), (400, "F", True), (4000, "step", True)
    ]  # fmt: skip
    assert [o.name for o in phase(tracker.launches, "step")] == ["aten.zeros"]


def test_nodes_are_means_over_micro_batches():
    tracker = Tracker(torch.device("meta"))
    with tracker:
        x = torch.zeros(10, device="meta")
        for microbatch in (0, 1):
            with tracker.entered(Where("F", 2, microbatch, "7.mlp", "high")):
                for _ in range(1 + microbatch):
                    x.mul_(2)
    [node] = actions(tracker.launches)[2, "F"]
    assert (node.name, node.queue, list(node.work.values())) == ("7.mlp", "high", [1.5])


@pytest.mark.parametrize("manifold", [Birkhoff(2), IdentityOffset()], ids=["whole token", "per stream"])
def test_kernels_are_noted_alike_with_and_without_data(manifold):
    x, f, _, _, parameters = make_inputs(5, 3, 10, torch.float32, manifold.per_stream)
    weight = norm_weight(10)

    def work(device, normed):
        leaves = [t.detach().to(device).requires_grad_() for t in (x, f, *parameters)]

        def run():
            maps = {"manifold": manifold, **({"norm": weight.to(device).requires_grad_(), "eps": 1e-6} if normed else {})}
            y, h_post, h_res = coefficients_pre(leaves[0], *leaves[2:], **maps)
            x_next, z, h_post, h_res = post_res_pre(leaves[0], leaves[1] + y, h_post, h_res, *leaves[2:], **maps)
            post_res(x_next, z, h_post, h_res).sum().backward()

        found = launched(run, device)
        return {name: cost for name, cost in found.items() if name.startswith("pipehc.")}

    with backend("triton"):
        plain, counted = work("meta", False), work("meta", True)
        assert plain == work("cpu", False) and counted == work("cpu", True)
    assert len(plain) >= 5 and {name: cost[0] for name, cost in counted.items()} == {name: cost[0] for name, cost in plain.items()}
    for kernel in ("pipehc.map_kernel", "pipehc.map_backward_kernel", "pipehc.stream_gradient_kernel"):
        assert all(with_norm > without for with_norm, without in zip(counted[kernel][1:], plain[kernel][1:]))


def test_the_arithmetic_of_every_kernel_is_known():
    kernels = set()
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch":
                kernels.add(ast.unparse(node.args[0]))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                is_kernel = ast.unparse(node.func.value).endswith("kernel")
                assert not is_kernel or path.name == "language.py", f"{path}: kernels launch through `language.launch`"
    assert sorted(kernels) == KERNELS


@pytest.mark.parametrize(("name", "moved"), [("_allgather_base_", 800), ("_reduce_scatter_base_", 100), ("alltoall_base_", 100)])
def test_a_gather_moves_what_it_gets_and_other_collectives_what_they_are_given(name, moved):
    func, output, given = getattr(torch.ops.c10d, name).default, torch.empty(200), torch.empty(25)
    assert operation(func, (output, given), {}, output) == (f"c10d.{name}", "communication", False, 0.0, moved, 0)
