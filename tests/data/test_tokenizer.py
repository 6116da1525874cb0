"""Tokenizers: bytes, and a Hugging Face file trained here on a few lines."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
from data_cases import TEXT, train_tokenizer

from pipehc.data.tokenizer import open_tokenizer, token_dtype


def test_bytes_are_tokens() -> None:
    tokenizer = open_tokenizer("bytes")
    documents = [b"abc\xff\xfe", b"", "é".encode()]
    assert [ids.tolist() for ids in tokenizer.encode(documents)] == [[97, 98, 99, 255, 254], [], [0xC3, 0xA9]]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (256, 0)


def test_hugging_face_file_round_trip(tmp_path: Path) -> None:
    reference = train_tokenizer(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    tokenizer = open_tokenizer(str(tmp_path / "tokenizer.json"))
    encoded = list(tokenizer.encode(text.encode() for text in TEXT * 3))  # several batches
    assert [reference.decode(ids.tolist()) for ids in encoded] == TEXT * 3
    assert any(len(ids) < len(text.encode()) for ids, text in zip(encoded, TEXT))  # merges happened
    assert tokenizer.vocab_size == reference.get_vocab_size()
    assert tokenizer.end_of_document == reference.token_to_id("<|endoftext|>")


def test_what_is_not_utf8_is_replaced_and_the_rest_survives(tmp_path: Path) -> None:
    reference = train_tokenizer(tmp_path / "tokenizer.json", [])
    [ids] = open_tokenizer(str(tmp_path / "tokenizer.json")).encode([b"ok \xff\xfe ok"])
    assert reference.decode(ids.tolist()) == "ok \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} ok"


def test_truncation_and_padding_asked_for_by_the_file_are_ignored(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "plain.json", [])
    train_tokenizer(tmp_path / "cutting.json", [], truncate=True)
    documents = [text.encode() for text in TEXT]
    plain, cutting = (list(open_tokenizer(str(tmp_path / name)).encode(documents)) for name in ("plain.json", "cutting.json"))
    assert all(np.array_equal(a, b) for a, b in zip(plain, cutting))


@pytest.mark.parametrize("declared", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_end_of_document_is_what_the_configuration_beside_the_file_names(tmp_path: Path, declared: object) -> None:
    reference = train_tokenizer(tmp_path / "tokenizer.json", ["</s>", "<stop>"])
    name = str(tmp_path / "tokenizer.json")
    before = open_tokenizer(name)
    assert before.end_of_document == reference.token_to_id("</s>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": declared}))
    after = open_tokenizer(name)
    assert after.end_of_document == reference.token_to_id("<stop>")
    assert after.fingerprint != before.fingerprint  # or a cache would hold the wrong separators


def test_end_of_document_may_be_unknown(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "tokenizer.json", ["[PAD]"])
    (tmp_path / "tokenizer_config.json").write_text("{broken")
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).end_of_document is None


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    for path in (broken, tmp_path / "absent.json", tmp_path):
        with pytest.raises(ValueError, match=r"data\.tokenizer.*allowed: bytes, or the path") as caught:
            open_tokenizer(str(path))
        assert str(path) in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tokenizer(tmp_path / "tokenizer.json", [])
    real = builtins.__import__

    def without_tokenizers(name: str, *rest, **more):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(ValueError, match=r"data\.tokenizer.*pip install tokenizers"):
        open_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("vocab_size, dtype", [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_smallest_type_that_holds_the_vocabulary(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) is dtype
