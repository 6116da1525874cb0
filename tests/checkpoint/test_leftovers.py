"""Whatever lies among the checkpoints, the next save commits, and nothing that is not a checkpoint of ours is lost."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from pipehc.checkpoint.store import Checkpoints

TENSORS = {"x": torch.arange(3.0)}


def save(folder: Path, step: int, keep: int = 2, course: int = 0) -> list[str]:
    """Saves, checks that it can be read, and returns the warnings."""
    warnings: list[str] = []
    checkpoints = Checkpoints(folder, keep, warn=warnings.append)
    path = checkpoints.save(step, TENSORS, {"course": course})
    assert path.name == f"step-{step:08d}" and not path.is_symlink()
    assert Checkpoints(folder, keep).newest() == path
    got = {"x": torch.zeros(3)}
    assert Checkpoints(folder, keep).load(path, got).extra == {"course": course} and torch.equal(got["x"], TENSORS["x"])
    return warnings


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


NAMES = [".tmp-step-00000020", ".tmp-delete-step-00000010", ".tmp-delete-.old-3-step-00000010", ".old-1-step-00000010",
         "step-00000010", "step-00000020", "step-00000030", ".tmp-notes", ".old-notes", "step-7"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["file", "empty file", "folder", "link to a folder", "link to a file", "dangling link", "loop"])
def test_anything_under_any_name(tmp_path: Path, name: str, kind: str) -> None:
    """Three saves with keep = 1 use every name that a save can use: to write, to replace, to prune."""
    folder, precious = tmp_path / "checkpoints", tmp_path / "precious"
    save(folder, 10, keep=1)
    shutil.rmtree(folder / name, ignore_errors=True)
    precious.mkdir()
    (precious / "thesis").write_text("years")
    leftover = folder / name
    match kind:
        case "file":
            leftover.write_text("notes")
        case "empty file":
            leftover.touch()
        case "folder":
            leftover.mkdir()
            (leftover / "half").write_text("written")
        case "link to a folder":
            leftover.symlink_to(precious)
        case "link to a file":
            leftover.symlink_to(precious / "thesis")
        case "dangling link":
            leftover.symlink_to("nowhere")
        case "loop":
            leftover.symlink_to(name)
    for step, course in ((20, 1), (20, 2), (30, 3)):
        save(folder, step, keep=1, course=course)
    assert (precious / "thesis").read_text() == "years"
    if kind == "file":
        assert [path.read_text() for path in folder.iterdir() if path.is_file()] == ["notes"]
    if "notes" in name:
        assert os.path.lexists(leftover)
    folders = {path.name for path in folder.glob("step-*") if path.is_dir() and not path.is_symlink()}
    assert folders - {"step-7"} == {"step-00000030"}


def test_a_checkpoint_moved_to_another_disk_and_linked_back(tmp_path: Path) -> None:
    folder, disk = tmp_path / "checkpoints", tmp_path / "disk"
    disk.mkdir()
    save(folder, 10)
    (folder / "step-00000010").rename(disk / "moved")
    (folder / "step-00000010").symlink_to(disk / "moved")
    newest = Checkpoints(folder, 2).newest()
    assert newest is not None and newest.name == "step-00000010"
    save(folder, 10, course=1)  # replaces the link
    save(folder, 20)
    save(folder, 30)
    assert names(folder) == ["step-00000020", "step-00000030"]
    assert Checkpoints(folder, 2).load(disk / "moved", {"x": torch.zeros(3)}).extra == {"course": 0}

    (folder / "step-00000020").rename(disk / "second")
    (folder / "step-00000020").symlink_to(disk / "second")
    save(folder, 40)
    assert names(folder) == ["step-00000030", "step-00000040"]  # pruned: the link alone
    Checkpoints(folder, 2).load(disk / "second", {"x": torch.zeros(3)})


@pytest.mark.parametrize("kind", ["file", "dangling link", "link"])
def test_the_folder_itself(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoints"
    if kind == "file":
        folder.write_text("mine")
    else:
        folder.symlink_to("disk")
    if kind == "link":
        (tmp_path / "disk").mkdir()
    warnings = save(folder, 10)
    if kind == "link":
        assert names(tmp_path / "disk") == ["step-00000010"] and not warnings
    else:
        assert len(warnings) == 1 and "renamed to checkpoints-1" in warnings[0]
        assert (tmp_path / "checkpoints-1").is_symlink() or (tmp_path / "checkpoints-1").read_text() == "mine"


def test_what_cannot_be_deleted_is_left_with_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a folder that is read only, or open on a network file system; root could delete the former."""
    save(tmp_path, 10)
    stuck = tmp_path / ".tmp-step-00000020"
    stuck.mkdir()
    real = shutil.rmtree

    def refuse(path, *args, **kwargs):
        if Path(path).name in (stuck.name, ".tmp-delete-step-00000010"):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    warnings: list[str] = []
    checkpoints = Checkpoints(tmp_path, 1, warn=warnings.append)
    for step in (20, 10, 20, 10):
        checkpoints.save(step, TENSORS, {})
        newest = checkpoints.newest()
        assert newest is not None and newest.name == f"step-{step:08d}"
    assert stuck.is_dir() and sum(stuck.name in warning for warning in warnings) == 1
    assert len(set(warnings)) == len(warnings)


def test_a_manifest_that_cannot_be_read_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    real = Path.read_bytes

    def deny(self: Path) -> bytes:
        if self.parent.name == "step-00000020":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", deny)
    warnings: list[str] = []
    newest = Checkpoints(tmp_path, 2, warn=warnings.append).newest()
    assert newest is not None and newest.name == "step-00000010"
    assert "manifest.json cannot be read: Permission denied" in warnings[0]


def test_later_ones_are_set_aside_for_a_run_that_goes_back(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        save(folder, step, keep=3)
    checkpoints = Checkpoints(folder, 3)
    (tmp_path / "link").symlink_to(folder)
    assert checkpoints.set_aside_later_than(tmp_path / "link" / "step-00000010") == tmp_path / "checkpoints-1"
    assert names(folder) == ["step-00000010"] and names(tmp_path / "checkpoints-1") == ["step-00000020", "step-00000030"]
    assert checkpoints.set_aside_later_than(folder / "step-00000010") is None
    assert names(tmp_path) == ["checkpoints", "checkpoints-1", "link"]


def test_a_run_goes_back_to_a_copy_and_beside_what_a_link_leads_to(tmp_path: Path) -> None:
    """Another disk, as a rule: there nothing can be renamed to where the link lies."""
    disk = tmp_path / "disk"
    for step in (10, 20):
        save(disk / "run", step, keep=2)
    shutil.copytree(disk / "run" / "step-00000010", disk / "run" / "best")
    (tmp_path / "checkpoints").symlink_to(disk / "run")
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.set_aside_later_than(tmp_path / "checkpoints" / "best") == disk / "run-1"
    assert names(disk / "run-1") == ["step-00000020"] and names(tmp_path) == ["checkpoints", "disk"]
