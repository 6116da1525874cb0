"""Any slicing of tensors over real processes reads every other, and what cannot be one is refused."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import assert_equal, cut, held, save_all, zeroed
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks

from pipehc.checkpoint import flat_slices
from pipehc.checkpoint.flat_slices import Held, Piece, Stored, match, tile
from pipehc.checkpoint.store import Checkpoints, FlatSlice


def test_every_slicing_reads_every_other_bit_for_bit(tmp_path):
    for world, seed in [(3, 0), (1, 1)]:
        path = save_all(tmp_path / f"{world}", seed, world=world)

        def load(rank, world, seed, path=path):
            want = held(rank, world, seed)
            got = zeroed(want)
            restored = Checkpoints(path.parent, 1).load(path, got)
            assert_equal(got, want)
            return restored.step, restored.extra, restored.rank_state

        for new_world, new_seed in [(2, 2), (3, 1), (4, 0)]:
            results = run_ranks(load, new_world, new_world, new_seed)
            for step, extra, _ in results:
                assert (step, extra) == (10, {"step": 10})
        assert not dist.is_initialized()
        load(0, 1, 2)


def test_replicated_tensors_are_written_once_and_slices_by_their_holder(tmp_path):
    elements = 100_000

    def fn(rank):
        whole = torch.arange(elements, dtype=torch.float32)
        tensors: dict[str, Held] = {"w": whole, "m": cut(whole, [0, 10, elements - 5, elements], rank)}
        return Checkpoints(tmp_path, 1).save(1, tensors, {})

    path = run_ranks(fn, 3)[0]
    total = sum(file.stat().st_size for file in path.iterdir())
    assert 2 * 4 * elements < total < 2 * 4 * elements + 30_000


def test_loading_reads_only_overlapping_chunks(tmp_path):
    whole = torch.randn(90)

    def fn(rank):
        return Checkpoints(tmp_path, 1).save(1, {"m": cut(whole, [0, 30, 60, 90], rank)}, {})

    path = run_ranks(fn, 3)[0]
    # A third of the file is gone; who wants the middle alone does not notice, unless checksums are compared.
    sizes = {file: file.stat().st_size for file in path.glob("__2_*")}
    assert len(sizes) == 1
    for file, size in sizes.items():
        file.write_bytes(b"\0" * size)
    middle = FlatSlice((90,), 25, torch.zeros(30))
    Checkpoints(tmp_path, 1).load(path, {"m": middle}, verify=False)
    assert torch.equal(middle.tensor, whole[25:55])
    with pytest.raises(ValueError, match="damaged"):
        Checkpoints(tmp_path, 1).load(path, {"m": middle})


def test_targets_may_be_parameters_and_strided(tmp_path):
    weight, strided = torch.randn(4, 6), torch.randn(5, 3).t()
    path = Checkpoints(tmp_path, 1).save(1, {"weight": weight, "strided": strided, "column": weight[:, 2]}, {})
    parameter = torch.nn.Parameter(torch.zeros(4, 6))
    target, backing = torch.zeros(5, 3).t(), torch.zeros(4, 2)
    Checkpoints(tmp_path, 1).load(path, {"weight": parameter, "strided": target, "column": backing[:, 1]})
    assert torch.equal(parameter, weight) and torch.equal(target, strided)
    assert torch.equal(backing[:, 1], weight[:, 2]) and not backing[:, 0].any()


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(0, 20))
@settings(deadline=None)
def test_tile_accepts_exactly_what_covers(cuts, total):
    """Against a count of how often each element is covered."""
    edges = [0, *sorted(c for c in cuts if c <= total), total]
    ranks = [{"x": [Piece((total,), "float32", a, b - a)]} for a, b in pairwise(edges)]
    assert tile(ranks) == {"x": Stored((total,), "float32")}
    assert tile([*ranks, ranks[0]]) == {"x": Stored((total,), "float32")}  # a replica
    for drop in range(len(ranks)):
        if ranks[drop]["x"][0].length:
            with pytest.raises(ValueError, match="held by no rank"):
                tile([*ranks[:drop], {"x": [Piece((total,), "float32", 0, 0)]}, *ranks[drop + 1 :]])
    if total > 1:
        wider = {"x": [Piece((total,), "float32", 0, total - 1)]}
        pieces = [p["x"][0] for p in [*ranks, wider]]
        covered = [len({(p.start, p.length) for p in pieces if p.start <= e < p.start + p.length}) for e in range(total)]
        if all(c == 1 for c in covered):
            tile([*ranks, wider])
        else:
            with pytest.raises(ValueError, match="overlap"):
                tile([*ranks, wider])


def test_match_names_what_differs():
    stored = {"a": Stored((2, 3), "float32"), "b": Stored((4,), "bfloat16")}
    a, b = [Piece((2, 3), "float32", 0, 6)], [Piece((4,), "bfloat16", 0, 4)]
    match(stored, [{"a": a}, {"b": b}], strict=True)
    match(stored, [{"a": a}], strict=False)
    with pytest.raises(ValueError, match=r"does not have: b$"):
        match(stored, [{"a": a}], strict=True)
    with pytest.raises(ValueError, match=r"lacks c, d, e and 1 more$"):
        match(stored, [{"a": a, "b": b}, dict.fromkeys("cdef", a)], strict=False)
    with pytest.raises(ValueError, match=r"a: the checkpoint holds shape \[2, 3\] float32, the model wants shape \[3, 2\]"):
        match(stored, [{"a": [Piece((3, 2), "float32", 0, 6)], "b": b}], strict=True)
    with pytest.raises(ValueError, match=r"b: .* shape \[4\] bfloat16, the model wants shape \[4\] float32"):
        match(stored, [{"a": a, "b": [Piece((4,), "float32", 0, 4)]}], strict=True)


def test_flat_slice_refuses_ranges_outside_the_tensor():
    for start, length in [(-1, 2), (5, 2)]:
        with pytest.raises(ValueError, match=r"not inside a tensor of shape \(2, 3\) \(6 elements\)"):
            FlatSlice((2, 3), start, torch.zeros(length))
    with pytest.raises(ValueError, match="1-D"):
        FlatSlice((2, 3), 0, torch.zeros(2, 3))
    assert flat_slices.pieces({"end": FlatSlice((2, 3), 6, torch.zeros(0))}) == {"end": [Piece((2, 3), "float32", 6, 0)]}
