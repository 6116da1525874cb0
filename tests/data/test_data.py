"""Data: samples and their order against plain re-computations, on text and on Megatron's indexed files, in several processes."""

import hashlib
import multiprocessing
import os
import random
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import train as train_tokenizer

from pipehc.data import text as text_module
from pipehc.data.batches import Sampler, Splits, Windows, batch, open_splits

SEED = 7
DEFAULTS: dict[str, Any] = {"kind": "text", "suffixes": [".py", ".txt"], "tokenizer": "bytes", "validation_fraction": 0.2,
                            "sequence_length": 16, "vocab_size": 256, "seed": SEED}
MEGATRON: dict[str, Any] = {"kind": "megatron", "vocab_size": 1000}


def open_(paths: list, cache: Path, **changes) -> Splits:
    return open_splits(**{**DEFAULTS, "paths": [str(path) for path in paths], "cache": cache, **changes})


def write_documents(folder: Path, count: int = 60) -> dict[str, bytes]:
    """Files of 20 to 200 bytes in nested folders, all different; the content by relative name."""
    source = random.Random(1)
    contents = {}
    for i in range(count):
        name = f"{'abc'[i % 3]}/{i:03}.{'py' if i % 2 else 'txt'}"
        contents[name] = bytes(source.choices(range(32, 127), k=source.randrange(20, 200))) + b" %d" % i
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents[name])
    return contents


def stream(split) -> bytes:
    """The byte stream that the samples were cut from, put together again."""
    samples = [split[i].tolist() for i in range(len(split))]
    assert all(a[-1] == b[0] for a, b in pairwise(samples))  # the last label is the next sample's first input
    return bytes(token for sample in samples for token in sample[:-1]) + bytes(samples[-1][-1:])


def digest(splits: Splits, draws: int = 40) -> str:
    """Of the first batches of a run, as the trainer draws them."""
    result = hashlib.sha256()
    for split in splits[:2]:
        tokens, labels = batch(split, Sampler(len(split), SEED), 0, draws)
        result.update(tokens.numpy().tobytes() + labels.numpy().tobytes())
    return result.hexdigest() + splits.info.fingerprint


def _worker(function: Callable, rank: int, arguments: tuple, barrier, results) -> None:
    torch.set_num_threads(1)
    try:
        results.put((rank, function(rank, barrier, *arguments)))
    except Exception as error:
        barrier.abort()
        results.put((rank, error))


def in_processes(count: int, function: Callable, *arguments) -> list:
    """What `function(rank, barrier, *arguments)` gives in each of `count` new interpreters (CPUs are shared: be patient)."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_worker, args=(function, rank, arguments, barrier, results), daemon=True)
                 for rank in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=400) for _ in processes)
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(count)]


# The order of samples.


@given(length=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_visits_every_sample_once(length: int, seed: int, epoch: int) -> None:
    sampler = Sampler(length, seed)
    assert sorted(sampler.index(epoch * length + i) for i in range(length)) == list(range(length))


def test_the_order_depends_on_nothing_but_length_seed_and_number() -> None:
    sampler = Sampler(997, 3)
    forward = [sampler.index(k) for k in range(3000)]
    fresh = [Sampler(997, 3).index(k) for k in reversed(range(3000))][::-1]
    assert forward == fresh
    assert forward[:997] != forward[997:1994]  # another epoch, another order
    assert forward[:997] != [Sampler(997, 4).index(k) for k in range(997)]


def test_the_order_is_the_one_that_old_checkpoints_continue() -> None:
    assert [Sampler(10, 1234).index(k) for k in range(20)] == [8, 2, 7, 9, 1, 6, 3, 4, 0, 5, 8, 9, 2, 1, 0, 3, 4, 5, 7, 6]


def test_all_orders_of_few_samples_are_equally_likely() -> None:
    sampler = Sampler(3, 0)
    orders = Counter(tuple(sampler.index(3 * epoch + i) for i in range(3)) for epoch in range(6000))
    assert len(orders) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in orders.values()) < 25.7  # chi-square, 5 degrees of freedom, p = 1e-4


def test_neighbours_in_the_data_are_no_neighbours_in_the_run() -> None:
    order = np.array([Sampler(10_000, 5).index(k) for k in range(10_000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05  # 5 standard deviations
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # two are expected


def test_a_huge_data_set_costs_nothing() -> None:
    sampler = Sampler(10**15, 5)
    indices = [sampler.index(k) for k in range(10**14, 10**14 + 1000)]
    assert len(set(indices)) == 1000 and max(indices) < 10**15 and max(indices) > 9 * 10**14


def test_a_batch_is_the_same_whether_or_not_earlier_ones_were_drawn(tmp_path: Path) -> None:
    write_documents(tmp_path / "text")
    split = open_([tmp_path / "text"], tmp_path).train
    sampler = Sampler(len(split), 7)
    steps = 3 * len(split) // 8  # three epochs; no batch ends with an epoch
    run = [batch(split, sampler, 8 * step, 8) for step in range(steps)]
    resumed = open_([tmp_path / "text"], tmp_path).train
    for step in (0, 1, steps // 2, steps - 1):
        tokens, labels = batch(resumed, Sampler(len(resumed), 7), 8 * step, 8)
        assert torch.equal(tokens, run[step][0]) and torch.equal(labels, run[step][1])
    tokens, labels = run[0]
    assert tokens.dtype == labels.dtype == torch.int64 and tokens.shape == labels.shape == (8, 16)
    assert tokens.is_contiguous() and labels.is_contiguous()
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    together = batch(split, sampler, 3, 10)[0]  # the micro-batches of a step are slices of it
    assert torch.equal(together, torch.cat([batch(split, sampler, 3, 4)[0], batch(split, sampler, 7, 6)[0]]))


def test_windows_cover_the_stream() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    for length in (1, 2, 7, 998, 999, 1000):
        windows = Windows(tokens, length)
        assert len(windows) == 999 // length
        assert all(windows[i].tolist() == list(range(i * length, i * length + length + 1)) for i in range(len(windows)))
        for outside in (-1, len(windows)):
            with pytest.raises(IndexError):
                windows[outside]


# Text.


def test_the_samples_are_the_documents(tmp_path: Path) -> None:
    contents = write_documents(tmp_path / "text")
    splits = open_([tmp_path / "text"], tmp_path)
    train, validation = (stream(split).split(b"\0") for split in splits[:2])
    by_order = [contents[name] for name in sorted(contents)]
    held_out = set(validation[:-1])  # the last piece may be cut
    assert 3 <= len(held_out) <= 25  # 12 of 60 are expected
    assert not held_out & set(train)
    order = iter(by_order)
    assert all(document in order for document in train[:-1])  # a subsequence: whole documents, sorted by name
    missing = set(by_order) - set(train) - held_out
    assert len(missing) <= 2  # those whose end is less than a sample
    assert splits.info.held_out == "documents" and splits.info.documents == 60
    assert (splits.info.train_samples, splits.info.validation_samples) == (len(splits.train), len(splits.validation))


def test_place_and_order_of_the_folder_do_not_matter(tmp_path: Path) -> None:
    write_documents(tmp_path / "here")
    (tmp_path / "x/y").mkdir(parents=True)
    for file in sorted((tmp_path / "here").rglob("*.*"), reverse=True):
        copy = tmp_path / "x/y/there" / file.relative_to(tmp_path / "here")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    assert digest(open_([tmp_path / "here"], tmp_path)) == digest(open_([tmp_path / "x/y/there"], tmp_path))


def test_copies_of_a_file_stay_on_one_side(tmp_path: Path) -> None:
    write_documents(tmp_path / "text")
    for file in list((tmp_path / "text").rglob("*.*")):
        file.with_name(f"copy_of_{file.name}").write_bytes(file.read_bytes())
    splits = open_([tmp_path / "text", tmp_path / "text/a"], tmp_path)  # the second path again names files of the first
    train, validation = (set(stream(split).split(b"\0")[:-1]) for split in splits[:2])
    assert not train & validation


def test_what_is_read_and_what_is_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    contents = write_documents(folder)
    for name in ("a/picture.txt", "empty.py", ".hidden/b.py", "__pycache__/c.py", "a/data.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"" if "empty" in name else b"x\0y" * 50)
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    (folder / "dead.py").symlink_to(folder / "nowhere.py")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.py")
    documents, skipped = text_module.read_documents([str(folder)], [".py", ".txt"])
    assert {document.name: document.content for document in documents} == {**contents, "latin1.txt": b"caf\xe9"}
    assert [document.name for document in documents] == sorted(contents.keys() | {"latin1.txt"})
    assert skipped == ["a/picture.txt: binary (contains a zero byte)", "empty.py: empty"]
    [named], _ = text_module.read_documents([str(folder / "a/000.txt")], [".md"])  # a file named itself needs no suffix
    assert named.content == contents["a/000.txt"]


def test_an_unreadable_file_is_skipped_in_a_folder_and_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = write_documents(tmp_path / "text")
    real = Path.read_bytes

    def deny(self: Path) -> bytes:  # root reads everything, so chmod would prove nothing
        if self.name == "004.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", deny)
    documents, skipped = text_module.read_documents([str(tmp_path / "text")], [".py", ".txt"])
    assert len(documents) == len(contents) - 1 and skipped == ["b/004.txt: Permission denied"]
    with pytest.raises(ValueError, match=r"data\.paths: .*004\.txt' is Permission denied"):
        text_module.read_documents([str(tmp_path / "text/b/004.txt")], [])


def test_one_large_file_is_cut(tmp_path: Path) -> None:
    content = bytes(random.Random(2).choices(range(32, 127), k=5000))
    (tmp_path / "all.txt").write_bytes(content)
    splits = open_([tmp_path / "all.txt"], tmp_path)
    assert splits.info.held_out == "tail"
    train, validation = stream(splits.train), stream(splits.validation)
    assert content.startswith(train) and 3980 < len(train) <= 4001
    assert content[4001:].startswith(validation) and len(validation) > 980
    everything = open_([tmp_path / "all.txt"], tmp_path, validation_fraction=0.0)
    assert everything.info.held_out == "nothing" and len(everything.validation) == 0 and len(everything.train) == 5000 // 16


def test_the_standard_library_is_the_default(tmp_path: Path) -> None:
    splits = open_([], tmp_path, validation_fraction=0.05, sequence_length=128)
    assert splits.info.documents > 400
    total = (len(splits.train) + len(splits.validation)) * 128
    assert 5e6 < total < 40e6 and 0.02 < len(splits.validation) * 128 / total < 0.1
    names = {document.name for document in text_module.read_documents([], [])[0]}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any(part in ("test", "site-packages", "__pycache__") for name in names for part in name.split("/"))


@pytest.mark.parametrize("changes, message", [
    ({"paths": ["absent"]}, r"data\.paths: .*absent' is no file or folder"),
    ({"paths": ["text/binary.txt"]}, r"data\.paths: .*binary\.txt' is binary"),
    ({"paths": ["empty.txt"]}, r"data\.paths: .*empty\.txt' is empty"),
    ({"suffixes": [".rst"]}, r"data\.paths: .*data\.suffixes: \['\.rst'\]"),
    ({"sequence_length": 10**6}, r"data\.paths: too little text: \d+ tokens for \w+, but .* 1000001 .*train\.sequence_length"),
    ({"validation_fraction": 0.0, "sequence_length": 10**6}, r"too little text: \d+ tokens for training"),
    ({"vocab_size": 100}, r"model\.vocab_size: 100 is too small: .*'bytes' .* 126 .*allowed: at least 127"),
    ({"validation_fraction": 1.0}, r"data\.validation_fraction: 1\.0 is not allowed; allowed: 0 <= fraction < 1"),
    ({"kind": "parquet"}, r"data\.kind: 'parquet' is not allowed; allowed: text, megatron"),
    ({"tokenizer": "absent.json"}, r"data\.tokenizer: .*absent\.json"),
    ({"kind": "megatron", "paths": []}, r"data\.paths: \[\] is not allowed with data\.kind: megatron"),
    ({"kind": "megatron", "paths": ["absent"]}, r"data\.paths: .*absent\.idx' is missing"),
    ({"kind": "megatron", "paths": ["broken"]}, r"data\.paths: .*broken' is no readable indexed data set: .*no Megatron index"),
])
def test_bad_input_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    write_documents(tmp_path / "text")
    (tmp_path / "text/binary.txt").write_bytes(b"\0\1")
    (tmp_path / "empty.txt").touch()
    for suffix in ("bin", "idx"):
        (tmp_path / f"broken.{suffix}").write_bytes(b"not an index")
    changes["paths"] = [tmp_path / path for path in changes.get("paths", ["text"])]
    with pytest.raises(ValueError, match=message):
        open_(cache=tmp_path / "cache", **changes)


def test_more_text_than_memory_allows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.txt").touch()
    os.truncate(tmp_path / "large.txt", 3 << 30)  # sparse: no disk is used
    with pytest.raises(ValueError, match=r"data\.paths: .* 3\.0 GiB .*at most 2 GiB.*data\.kind: megatron"):
        open_([tmp_path], tmp_path)


# A slow tokenizer, whose result is kept.


def test_tokenized_text_is_kept_and_follows_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = write_documents(tmp_path / "text")
    reference = train_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    options: dict[str, Any] = {"tokenizer": str(tmp_path / "tokenizer.json"), "vocab_size": 300, "validation_fraction": 0.0}
    first = open_([tmp_path / "text"], tmp_path / "cache", **options)
    expected = [token for name in sorted(contents) for token in
                [*reference.encode(contents[name].decode()).ids, reference.token_to_id("</s>")]]
    drawn = [token for i in range(len(first.train)) for token in first.train[i].tolist()[:-1]]
    assert drawn == expected[: len(drawn)] and len(drawn) > len(expected) - 17

    with monkeypatch.context() as patch:
        patch.setattr(text_module, "_encode", lambda *_: pytest.fail("tokenized again"))
        again = open_([tmp_path / "text"], tmp_path / "cache", **options)
    assert all(torch.equal(first.train[i], again.train[i]) for i in range(len(first.train)))
    assert first.info == again.info

    (tmp_path / "text/a/000.txt").write_text("something else entirely")
    changed = open_([tmp_path / "text"], tmp_path / "cache", **options)
    assert changed.info.fingerprint != first.info.fingerprint
    assert changed.train[0].tolist()[:5] == reference.encode("something else entirely").ids[:5]


def _open_and_digest(rank: int, barrier, root: Path, options: list[dict]) -> list[str]:
    found = []
    for option in options:
        barrier.wait(300)
        found.append(digest(open_([root / "text"], root / "cache", **option)))
    return found


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    """Text by bytes and by a tokenizer whose cache is empty: each of three processes, and this one, draws the same batches."""
    write_documents(tmp_path / "text")
    train_tokenizer(tmp_path / "tokenizer.json", ["</s>"])
    options: list[dict] = [{}, {"tokenizer": str(tmp_path / "tokenizer.json"), "vocab_size": 300}]
    expected = [digest(open_([tmp_path / "text"], tmp_path / "elsewhere", **option)) for option in options]
    assert expected[0] != expected[1]
    assert in_processes(3, _open_and_digest, tmp_path, options) == [expected] * 3
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".npy", ".lock"}  # no half-written file is left


# Megatron's indexed files.


def write_indexed_documents(prefix: Path, seed: int, count: int = 50) -> list[np.ndarray]:
    from pipehc.megatron.trainer.data import write_indexed

    source = np.random.default_rng(seed)
    documents = [source.integers(0, 1000, source.integers(5, 90)) for _ in range(count)]
    assert write_indexed(documents, prefix, 1000) == sum(map(len, documents))
    return documents


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
