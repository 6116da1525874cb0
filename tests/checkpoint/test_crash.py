"""Ranks killed while they save, and files damaged afterwards: the newest complete checkpoint is found."""

import json
import os
import signal
import time

import pytest
import torch
from checkpoint_cases import assert_equal, damage_delete, held, newest_name, save_all, zeroed
from processes import run_ranks
from torch.distributed.checkpoint import FileSystemWriter

from pipehc.checkpoint import manifest
from pipehc.checkpoint.store import Checkpoints


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


def test_an_unknown_format_is_refused_by_number(tmp_path):
    path = save_all(tmp_path)
    outer = json.loads((path / manifest.NAME).read_text())
    (path / manifest.NAME).write_text(json.dumps({**outer, "format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads 1"):
        Checkpoints(tmp_path, 1).load(path, {})
