"""Megatron's indexed files against the documents in them, in several processes, and the tool that writes them."""

import os
import runpy
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_cases import MEGATRON, digest, in_processes, open_, train_tokenizer, write_documents, write_indexed_documents


def test_indexed_files_give_back_the_documents(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = write_indexed_documents(tmp_path / "deep/one", 1)
    stored = IndexedDataset(str(tmp_path / "deep/one"))
    assert len(stored) == len(documents) and all(np.array_equal(stored[i], documents[i]) for i in range(len(stored)))
    assert sorted(file.name for file in (tmp_path / "deep").iterdir()) == ["one.bin", "one.idx"]

    splits = open_([tmp_path / "deep/one"], tmp_path / "cache", **MEGATRON)
    for split, share in ((splits.train, documents[:40]), (splits.validation, documents[40:])):
        samples = [split[i].tolist() for i in range(len(split))]
        assert all(len(sample) == 17 for sample in samples)
        # Megatron shuffled documents, then samples, so compare pairs of neighbouring tokens.
        total = sum(map(len, share))
        assert len(samples) == (total - 1) // 16
        pieces = Counter(tuple(document[i : i + 2].tolist()) for document in share for i in range(len(document) - 1))
        drawn = Counter(pair for sample in samples for pair in pairwise(sample))
        lost = sum((pieces - drawn).values())
        assert lost < 17  # every pair of neighbours but those of the unused end, each as often as in the documents
        assert sum((drawn - pieces).values()) < len(share)  # and no other pairs but those across two documents


def test_indexed_sets_join_and_split_by_document(tmp_path: Path) -> None:
    one, two = (write_indexed_documents(tmp_path / name, seed) for name, seed in (("one", 1), ("two", 2)))
    both = open_([tmp_path / "one", tmp_path / "two"], tmp_path / "cache", **MEGATRON)
    parts = [open_([tmp_path / name], tmp_path / "cache", **MEGATRON) for name in ("one", "two")]
    for joined, single in ((both.train, [part.train for part in parts]), (both.validation, [part.validation for part in parts])):
        expected = [split[i].tolist() for split in single for i in range(len(split))]
        assert [joined[i].tolist() for i in range(len(joined))] == expected
    assert both.info.documents == len(one) + len(two)
    with pytest.raises(IndexError):
        both.train[len(both.train)]
    without = open_([tmp_path / "one"], tmp_path / "cache", **MEGATRON, validation_fraction=0.0)
    assert len(without.validation) == 0 and len(without.train) == (sum(map(len, one)) - 1) // 16
    other = open_([tmp_path / "one"], tmp_path / "cache", **MEGATRON, seed=8)
    assert [parts[0].train[i].tolist() for i in range(9)] != [other.train[i].tolist() for i in range(9)]


def test_an_indexed_set_shorter_than_a_sample_adds_nothing(tmp_path: Path) -> None:
    from pipehc.megatron.trainer.data import write_indexed

    write_indexed_documents(tmp_path / "one", 1)
    write_indexed([np.arange(16)], tmp_path / "tiny", 1000)  # a sample takes 17, and no document is left for validation
    alone = open_([tmp_path / "one"], tmp_path / "cache", **MEGATRON)
    joined = open_([tmp_path / "tiny", tmp_path / "one"], tmp_path / "cache", **MEGATRON)
    assert (len(joined.train), len(joined.validation)) == (len(alone.train), len(alone.validation))
    assert joined.train[3].tolist() == alone.train[3].tolist()


def test_rewritten_indexed_data_does_not_meet_the_old_cache(tmp_path: Path) -> None:
    write_indexed_documents(tmp_path / "one", 1)
    before = open_([tmp_path / "one"], tmp_path / "cache", **MEGATRON)
    documents = write_indexed_documents(tmp_path / "one", 2, count=20)
    after = open_([tmp_path / "one"], tmp_path / "cache", **MEGATRON)
    assert len(after.train) == (sum(map(len, documents[:16])) - 1) // 16 != len(before.train)
    assert before.info.fingerprint != after.info.fingerprint


def test_bad_indexed_data_is_named(tmp_path: Path) -> None:
    write_indexed_documents(tmp_path / "one", 1)
    with pytest.raises(ValueError, match=r"model\.vocab_size: 900 is too small: .*allowed: at least 9\d\d"):
        open_([tmp_path / "one"], tmp_path / "cache", **{**MEGATRON, "vocab_size": 900})
    with pytest.raises(ValueError, match=r"data\.paths: too little text: one sample takes 5001 tokens .*for training.*50"):
        open_([tmp_path / "one"], tmp_path / "cache", **MEGATRON, sequence_length=5000)
    with pytest.raises(ValueError, match=r"data\.paths: .*one\.bin\.idx' is missing.*without \.bin"):
        open_([tmp_path / "one.bin"], tmp_path / "cache", **MEGATRON)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run\.folder: cannot write the data index"):
        open_([tmp_path / "one"], tmp_path / "file", **MEGATRON)
    os.truncate(tmp_path / "one.bin", 100)
    with pytest.raises(ValueError, match=r"data\.paths: .*one\.bin has 100 bytes, its index says \d+"):
        open_([tmp_path / "one"], tmp_path / "cache", **MEGATRON)
    (tmp_path / "one.bin").unlink()
    with pytest.raises(ValueError, match=r"data\.paths: .*one\.bin' is missing"):
        open_([tmp_path / "one"], tmp_path / "cache", **MEGATRON)


def _race_then_join(rank: int, barrier, root: Path) -> list[str]:
    import torch.distributed as dist

    import pipehc.megatron.trainer.data  # noqa: F401  the import takes seconds: meet after it

    barrier.wait(300)
    found = [digest(open_([root / "one", root / "two"], root / "race", **MEGATRON))]
    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    found.append(digest(open_([root / "one", root / "two"], root / "ranks", **MEGATRON)))
    try:  # rank 0 cannot write: the other must hear of it instead of waiting
        open_([root / "one"], root / "file", **MEGATRON)
    except ValueError as error:
        found.append(str(error))
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_indexed_data_on_several_processes(tmp_path: Path) -> None:
    """Without torch.distributed two processes race for an empty cache; with it rank 0 builds. All draw the same batches."""
    for name, seed in (("one", 1), ("two", 2)):
        write_indexed_documents(tmp_path / name, seed)
    (tmp_path / "file").touch()
    expected = digest(open_([tmp_path / "one", tmp_path / "two"], tmp_path / "elsewhere", **MEGATRON))
    first, second = in_processes(2, _race_then_join, tmp_path)
    assert first[:2] == second[:2] == [expected] * 2
    assert len(list((tmp_path / "race").iterdir())) == 1  # the loser's folder is gone
    assert "run.folder: cannot write the data index" in first[2] and second[2] == f"rank 0: {first[2]}"


@pytest.mark.parametrize("kind", ["text", "megatron"])
def test_a_cache_that_could_not_be_finished_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    write_documents(tmp_path / "set")
    write_indexed_documents(tmp_path / "set", 1)
    train_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    options: dict[str, Any] = {"kind": kind, "tokenizer": str(tmp_path / "tokenizer.json"), "vocab_size": 1000}
    real = np.save
    saved: list[object] = []

    def disk_full(file, array, **more) -> None:
        """The first file is written whole, the second by half."""
        real(file, array[: array.size // 2] if saved else array, **more)
        saved.append(file)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", disk_full)
        with pytest.raises(ValueError, match=r"run\.folder: cannot .*No space left on device"):
            open_([tmp_path / "set"], tmp_path / "cache", **options)
    after = open_([tmp_path / "set"], tmp_path / "cache", **options)
    assert digest(after) == digest(open_([tmp_path / "set"], tmp_path / "elsewhere", **options))


def test_the_tool_writes_what_text_training_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    contents = write_documents(tmp_path / "text")
    tool = str(Path(__file__).parents[2] / "tools/make_indexed.py")
    monkeypatch.setattr(sys, "argv", [tool, str(tmp_path / "set"), str(tmp_path / "text")])
    runpy.run_path(tool, run_name="__main__")
    assert "60 documents" in capsys.readouterr().out
    stored = IndexedDataset(str(tmp_path / "set"))
    assert [bytes(stored[i].tolist()) for i in range(len(stored))] == [contents[name] + b"\0" for name in sorted(contents)]
    monkeypatch.setattr(sys, "argv", [tool, str(tmp_path / "set"), str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match=r"data\.paths"):
        runpy.run_path(tool, run_name="__main__")
