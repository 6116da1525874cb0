"""Checkpoints over real processes: any slicing reads any other, commits are atomic, damage is found."""

import errno
import json
import logging
import math
import os
import random
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks
from torch.distributed.checkpoint import FileSystemWriter

from pipehc.checkpoint import flat_slices, manifest
from pipehc.checkpoint.flat_slices import Held, Piece, Stored, match, tile
from pipehc.checkpoint.store import Checkpoints, FlatSlice

SHAPES = {
    "master": ((7, 5), torch.float32),
    "weight": ((6, 11), torch.bfloat16),
    "counts": ((13,), torch.int64),
    "scalar": ((), torch.float32),
    "none": ((0, 4), torch.float32),
    "cube": ((3, 4, 5), torch.float64),
}



class Opaque:
    """What torch.load with weights_only refuses, whatever other libraries have declared safe (Megatron: paths)."""


def reference(name: str, seed: int = 0) -> torch.Tensor:
    shape, dtype = SHAPES[name]
    generator = torch.Generator().manual_seed(seed * 100 + list(SHAPES).index(name))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-(2**62), 2**62, shape, generator=generator, dtype=dtype)


def cut(tensor: torch.Tensor, bounds: list[int], rank: int) -> FlatSlice:
    start, stop = bounds[rank], bounds[rank + 1]
    return FlatSlice(tuple(tensor.shape), start, tensor.reshape(-1)[start:stop].clone())


def bounds(name: str, world: int, seed: int) -> list[int]:
    """Uneven cuts, some of them empty."""
    total = math.prod(SHAPES[name][0])
    inner = sorted(random.Random(f"{name}{world}{seed}").choices(range(total + 1), k=world - 1))
    return [0, *inner, total]


def held(rank: int, world: int, seed: int) -> dict[str, Held]:
    """A layout: some tensors sliced over all ranks, some whole everywhere, some whole on one rank only."""
    result: dict[str, Held] = {}
    for i, name in enumerate(SHAPES):
        kind = (i + seed) % 3
        if kind == 0:
            result[name] = cut(reference(name), bounds(name, world, seed), rank)
        elif kind == 1 or rank == i % world:
            result[name] = reference(name)
    return result


def zeroed(tensors):
    def zero(t):
        return FlatSlice(t.shape, t.start, torch.zeros_like(t.tensor)) if isinstance(t, FlatSlice) else torch.zeros_like(t)

    return {name: zero(tensor) for name, tensor in tensors.items()}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        a, b = got[name], want[name]
        if isinstance(b, FlatSlice):
            a, b = a.tensor, b.tensor
        assert a.dtype == b.dtype and torch.equal(a, b), name


def newest_name(checkpoints):
    newest = checkpoints.newest()
    return newest and newest.name


def save_all(folder, seed=0, step=10, keep=2, layout="", world=None):
    """Save the reference tensors from `world` ranks."""

    def fn(rank):
        checkpoints = Checkpoints(folder, keep, layout)
        return str(checkpoints.save(step, held(rank, world, seed), {"step": step}, {"rng": torch.tensor([rank, 7])}))

    if world is None:
        world = 1
        return Path(fn(0))
    return Path(run_ranks(fn, world)[0])


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


def test_nan_and_extra_come_back_exactly(tmp_path):
    values = torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=torch.float64)
    extra = {"lr": 0.1 + 0.2, "position": [3, 2**60], "name": "ä", "nested": {"none": None}}
    path = Checkpoints(tmp_path, 1).save(3, {"v": values}, extra)
    got = torch.zeros_like(values)
    assert Checkpoints(tmp_path, 1).load(path, {"v": got}).extra == extra
    assert torch.equal(got.view(torch.int64), values.view(torch.int64))


def test_rank_state_returns_only_to_the_same_layout(tmp_path, caplog):
    path = save_all(tmp_path, layout="dualpipe pp4", world=2)

    def load(rank, world, layout):
        state = Checkpoints(tmp_path, 1, layout).load(path, zeroed(held(rank, world, 0))).rank_state
        return state and state["rng"].tolist()

    assert run_ranks(load, 2, 2, "dualpipe pp4") == [[0, 7], [1, 7]]
    assert run_ranks(load, 2, 2, "1f1b pp2") == [None, None]
    with caplog.at_level(logging.INFO):
        assert load(0, 1, "dualpipe pp4") is None
    assert "RNG) not restored: written by 2 ranks with layout 'dualpipe pp4', read by 1" in caplog.text


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(0, 20))
@settings(deadline=None)
def test_tile_accepts_exactly_what_covers(cuts, total):
    """Against a count of how often each element is covered."""
    edges = [0, *sorted(c for c in cuts if c <= total), total]
    ranks = [{"x": Piece((total,), "float32", a, b - a)} for a, b in pairwise(edges)]
    assert tile(ranks) == {"x": Stored((total,), "float32")}
    assert tile([*ranks, ranks[0]]) == {"x": Stored((total,), "float32")}  # a replica
    for drop in range(len(ranks)):
        if ranks[drop]["x"].length:
            with pytest.raises(ValueError, match="held by no rank"):
                tile([*ranks[:drop], {"x": Piece((total,), "float32", 0, 0)}, *ranks[drop + 1 :]])
    if total > 1:
        wider = {"x": Piece((total,), "float32", 0, total - 1)}
        pieces = [p["x"] for p in [*ranks, wider]]
        covered = [len({(p.start, p.length) for p in pieces if p.start <= e < p.start + p.length}) for e in range(total)]
        if all(c == 1 for c in covered):
            tile([*ranks, wider])
        else:
            with pytest.raises(ValueError, match="overlap"):
                tile([*ranks, wider])


def test_match_names_what_differs():
    stored = {"a": Stored((2, 3), "float32"), "b": Stored((4,), "bfloat16")}
    a, b = Piece((2, 3), "float32", 0, 6), Piece((4,), "bfloat16", 0, 4)
    match(stored, [{"a": a}, {"b": b}], strict=True)
    match(stored, [{"a": a}], strict=False)
    with pytest.raises(ValueError, match=r"does not have: b$"):
        match(stored, [{"a": a}], strict=True)
    with pytest.raises(ValueError, match=r"lacks c, d, e and 1 more$"):
        match(stored, [{"a": a, "b": b}, dict.fromkeys("cdef", a)], strict=False)
    with pytest.raises(ValueError, match=r"a: the checkpoint holds shape \[2, 3\] float32, the model wants shape \[3, 2\]"):
        match(stored, [{"a": Piece((3, 2), "float32", 0, 6), "b": b}], strict=True)
    with pytest.raises(ValueError, match=r"b: .* shape \[4\] bfloat16, the model wants shape \[4\] float32"):
        match(stored, [{"a": a, "b": Piece((4,), "float32", 0, 4)}], strict=True)


def test_errors_of_one_rank_are_raised_on_all_and_commit_nothing(tmp_path):
    """...and the group still works afterwards."""

    def fn(rank):
        whole = torch.arange(10.0)
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.save(1, {"x": whole}, {})
        messages = []

        def refused(kind, call):
            with pytest.raises(kind) as error:
                call()
            messages.append(str(error.value))

        refused(ValueError, lambda: checkpoints.save(2, {"x": cut(whole, [0, 4, 9], rank)}, {}))
        refused(ValueError, lambda: checkpoints.save(2, {"x": FlatSlice((10,), 0, whole[: 4 + rank * 6])}, {}))
        refused(ValueError, lambda: checkpoints.save(2, {"x": whole.reshape(2, 5) if rank else whole}, {}))
        refused(ValueError, lambda: checkpoints.save(2, {"x": whole.double() if rank else whole}, {}))
        refused(ValueError, lambda: checkpoints.save(2, {"x": whole}, {"bad": {1, 2}}))
        refused(ValueError, lambda: checkpoints.save(2, {"x": whole}, {}, {"rng": 1} if rank else None))
        refused(ValueError, lambda: checkpoints.save(2, {"x": whole}, {}, {"rng": Opaque() if rank else 1}))
        target = {"y": whole} if rank else {"x": whole}
        refused(ValueError, lambda: checkpoints.load(tmp_path / "step-00000001", target))
        refused(ValueError, lambda: checkpoints.load(tmp_path / "nowhere", target))

        def full_disk(self, plan, planner):
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(FileSystemWriter, "write_data", full_disk)
            refused(RuntimeError, lambda: checkpoints.save(2, {"x": whole}, {}))

        before = newest_name(checkpoints)
        checkpoints.save(3, {"x": whole}, {})
        return messages, before, newest_name(checkpoints)

    (first, *names), second = run_ranks(fn, 2)
    assert names == ["step-00000001", "step-00000003"] == list(second[1:])
    assert first == second[0]
    expected = [
        r"x: elements are held by no rank: \[9, 10\)",
        r"x: elements overlap: \[0, 4\) of 10",
        r"x: rank 1 holds shape \[2, 5\] float32, an earlier rank shape \[10\] float32",
        r"x: rank 1 holds shape \[10\] float64",
        r"extra state .* JSON-able",
        r"per_rank is given by ranks \[1\] only",
        r"rank 1: per_rank state could not be read again",
        r"lacks y",
        r"nowhere is no complete checkpoint",
        r"rank 1: OSError: .*No space left",
    ]
    for message, pattern in zip(first, expected, strict=True):
        assert re.search(pattern, message), message


def kill_me(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_half_way(data, stream):
    stream.write(b"the first half of a tensor")
    stream.close()
    kill_me()


# Where it dies, which rank, and whether the new checkpoint is committed by then.
KILLS = {
    "rank 0 before writing": (0, FileSystemWriter, "prepare_local_plan", kill_me, False),
    "rank 1 before writing": (1, FileSystemWriter, "prepare_local_plan", kill_me, False),
    "rank 0 while writing": (0, torch, "save", kill_half_way, False),
    "rank 1 while writing": (1, torch, "save", kill_half_way, False),
    "rank 0 before the metadata": (0, FileSystemWriter, "finish", kill_me, False),
    "rank 0 before its checksums": (0, manifest, "digest", kill_me, False),
    "rank 1 before its checksums": (1, manifest, "digest", kill_me, False),
    "rank 0 before the manifest": (0, manifest, "write", kill_me, False),
    "rank 0 before the rename": (0, manifest, "sync_folder", kill_me, False),
    "rank 0 after the rename": (0, Checkpoints, "_prune", kill_me, True),
}


@pytest.mark.parametrize("point", KILLS)
def test_sigkill_while_saving_leaves_a_complete_newest(tmp_path, point):
    victim, owner, attribute, kill, committed = KILLS[point]
    save_all(tmp_path, step=10, keep=1, world=2)

    def fn(rank):
        checkpoints = Checkpoints(tmp_path, 1)
        tensors = held(rank, 2, 0)
        if rank == victim:
            setattr(owner, attribute, kill)
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            checkpoints.save(20, tensors, {"step": 20}, {"rng": torch.tensor([rank, 7])})
        return time.monotonic() - start

    results = run_ranks(fn, 2, group_timeout=20, may_die=[victim])
    assert results[victim] is None and results[1 - victim] < 40

    restarted = Checkpoints(tmp_path, 1)
    step = 20 if committed else 10
    newest = restarted.newest()
    assert newest is not None and newest.name == f"step-{step:08d}"
    got = zeroed(held(0, 1, 0))
    assert restarted.load(newest, got).extra == {"step": step}
    assert_equal(got, held(0, 1, 0))
    # The next save clears away what the crash left.
    restarted.save(30, held(0, 1, 0), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030"]


def damage_delete(path):
    next(path.glob("__0_*")).unlink()


def damage_truncate(path):
    file = next(path.glob("__0_*"))
    os.truncate(file, file.stat().st_size - 1)


def damage_flip(path):
    file = next(path.glob("__0_*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_no_manifest(path):
    (path / manifest.NAME).unlink()


def damage_cut_manifest(path):
    os.truncate(path / manifest.NAME, 50)


def damage_edit_manifest(path):
    text = (path / manifest.NAME).read_text()
    assert '\\"step\\": 20' in text
    (path / manifest.NAME).write_text(text.replace('\\"step\\": 20', '\\"step\\": 21'))


@pytest.mark.parametrize(
    "damage", [damage_delete, damage_truncate, damage_flip, damage_no_manifest, damage_cut_manifest, damage_edit_manifest]
)
def test_a_damaged_checkpoint_is_skipped_with_one_warning_for_the_one_before(tmp_path, damage):
    save_all(tmp_path, step=10)
    latest = save_all(tmp_path, step=20)
    damage(latest)

    def fn(rank):
        warnings: list[str] = []
        checkpoints = Checkpoints(tmp_path, 2, warn=warnings.append)
        newest = newest_name(checkpoints)
        with pytest.raises(ValueError, match="step-00000020"):
            checkpoints.load(latest, zeroed(held(rank, 2, 0)))
        return newest, warnings

    results = run_ranks(fn, 2)
    assert [name for name, _ in results] == ["step-00000010"] * 2
    (_, warnings), (_, none) = results
    assert len(warnings) == 1 and "skipping checkpoint" in warnings[0] and "step-00000020" in warnings[0]
    assert none == []


def test_keep_counts_complete_ones_only(tmp_path):
    def steps():
        return sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir())

    for step in (10, 20, 30):
        save_all(tmp_path, step=step, keep=2)
    assert steps() == [20, 30]
    damage_delete(tmp_path / "step-00000030")
    save_all(tmp_path, step=40, keep=2)
    assert steps() == [20, 30, 40]  # 30 is no substitute for 20
    save_all(tmp_path, step=50, keep=2)
    assert steps() == [40, 50]
    with pytest.raises(ValueError, match=r"checkpoint\.keep is 0"):
        Checkpoints(tmp_path, 0)


def test_the_last_committed_is_newest_when_a_run_went_back(tmp_path):
    """Started again from an earlier step, a run must not lose its new checkpoints to the later steps of the old course."""
    for step in (100, 200):
        save_all(tmp_path, step=step)
    save_all(tmp_path, step=50)
    assert newest_name(Checkpoints(tmp_path, 2)) == "step-00000050"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000050", "step-00000200"]


def test_saving_a_step_again_replaces_it_and_a_crash_in_between_loses_nothing(tmp_path, monkeypatch):
    tensors = {"x": torch.zeros(3)}
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(10, tensors, {"course": 1})
    checkpoints.save(10, tensors, {"course": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]

    def crash_at_second_rename(self, target):
        if Path(self).name.startswith(".tmp-"):
            raise KeyboardInterrupt
        os.rename(self, target)
        return target

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash_at_second_rename)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(10, tensors, {"course": 3})
    newest = Checkpoints(tmp_path, 1).newest()
    assert newest is not None and checkpoints.load(newest, tensors).extra == {"course": 2}
    checkpoints.save(20, tensors, {"course": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def test_empty_and_missing_folders_have_no_newest(tmp_path):
    assert Checkpoints(tmp_path, 1).newest() is None
    assert Checkpoints(tmp_path / "not" / "there", 1).newest() is None
    assert not (tmp_path / "not").exists()


def test_an_unknown_format_is_refused_by_number(tmp_path):
    path = save_all(tmp_path)
    outer = json.loads((path / manifest.NAME).read_text())
    (path / manifest.NAME).write_text(json.dumps({**outer, "format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads 1"):
        Checkpoints(tmp_path, 1).load(path, {})


def test_flat_slice_refuses_ranges_outside_the_tensor():
    for start, length in [(-1, 2), (5, 2)]:
        with pytest.raises(ValueError, match=r"not inside a tensor of shape \(2, 3\) \(6 elements\)"):
            FlatSlice((2, 3), start, torch.zeros(length))
    with pytest.raises(ValueError, match="1-D"):
        FlatSlice((2, 3), 0, torch.zeros(2, 3))
    assert flat_slices.pieces({"end": FlatSlice((2, 3), 6, torch.zeros(0))}) == {"end": Piece((2, 3), "float32", 6, 0)}
