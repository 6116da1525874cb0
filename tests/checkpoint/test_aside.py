"""What is set aside never replaces anything."""

import os

from pipehc.checkpoint.aside import set_aside


def test_set_aside_never_replaces(tmp_path):
    for number in range(3):
        (tmp_path / "metrics.jsonl").write_text(str(number))
        set_aside(tmp_path / "metrics.jsonl")
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "file").write_text(str(number))
        set_aside(tmp_path / "checkpoints")
    set_aside(tmp_path / "missing")
    assert [(tmp_path / f"metrics-{i}.jsonl").read_text() for i in (1, 2, 3)] == ["0", "1", "2"]
    assert [(tmp_path / f"checkpoints-{i}" / "file").read_text() for i in (1, 2, 3)] == ["0", "1", "2"]
    assert len(os.listdir(tmp_path)) == 6


def test_links_are_set_aside_themselves(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to("elsewhere")
    (tmp_path / "checkpoints-1").symlink_to("nowhere")  # a name is taken by a dangling link, too
    assert set_aside(tmp_path / "checkpoints") == tmp_path / "checkpoints-2"
    assert (tmp_path / "checkpoints-2").readlink().name == "elsewhere"
    assert set_aside(tmp_path / "checkpoints-1") == tmp_path / "checkpoints-1-1"
    (tmp_path / "empty.jsonl").touch()
    assert set_aside(tmp_path / "empty.jsonl") is None
    assert sorted(os.listdir(tmp_path)) == ["checkpoints-1-1", "checkpoints-2", "elsewhere", "empty.jsonl"]
