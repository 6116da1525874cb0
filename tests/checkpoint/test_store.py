"""What a checkpoint gives back, which one is the newest, which ones are kept, and errors that all ranks raise alike."""

import errno
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from checkpoint_cases import cut, damage_delete, held, newest_name, save_all, zeroed
from processes import run_ranks
from torch.distributed.checkpoint import FileSystemWriter

from pipehc.checkpoint.store import Checkpoints, FlatSlice


class Opaque:
    """What torch.load with weights_only refuses, whatever other libraries have declared safe (Megatron: paths)."""


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
