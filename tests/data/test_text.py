"""Samples of text against its documents, in several processes, with and without a slow tokenizer."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import digest, in_processes, open_, stream, train_tokenizer, write_documents

from pipehc.data import text as text_module


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


def test_documents_joined_without_a_token_are_told_and_a_word_without_one_is_named_with_its_file(tmp_path: Path) -> None:
    write_documents(tmp_path / "text")
    train_tokenizer(tmp_path / "tokenizer.json", ["[PAD]"])
    options: dict[str, Any] = {"tokenizer": str(tmp_path / "tokenizer.json"), "vocab_size": 300, "validation_fraction": 0.0}
    joined = open_([tmp_path / "text"], tmp_path / "cache", **options)
    chosen = open_([tmp_path / "text"], tmp_path / "cache", **options, end_of_document="[PAD]")
    assert joined.info.joined and not chosen.info.joined and not open_([tmp_path / "text"], tmp_path / "cache").info.joined
    assert joined.info.fingerprint != chosen.info.fingerprint and joined.info.vocabulary != chosen.info.vocabulary
    drawn = [token for i in range(len(chosen.train)) for token in chosen.train[i].tolist()[:-1]]
    assert drawn.count(0) == 59  # [PAD] is the first token; the last of 60 is beyond the last whole sample

    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    (tmp_path / "words.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    for name, text in (("1.txt", "a"), ("2.txt", "strange"), ("3.txt", "a")):
        (tmp_path / "few").mkdir(exist_ok=True)
        (tmp_path / "few" / name).write_text(text)
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*words\.json' has no token for 'strange'.* \(in 2\.txt\)"):
        open_([tmp_path / "few"], tmp_path / "cache", **{**options, "tokenizer": str(tmp_path / "words.json")})


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
