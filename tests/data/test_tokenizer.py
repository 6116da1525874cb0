"""Tokenizers: bytes, and a Hugging Face file trained here on a few lines."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
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


def words(path: Path, model, **parts) -> str:
    """A tokenizer file of words between spaces."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(path / "words.json"))
    return str(path / "words.json")


AB = {"a": 0, "b": 1}
BYTES = {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
M = tokenizers.models
WITHOUT: dict[str, tuple] = {
    "words": (M.WordLevel(AB), "ab"),
    "words, unknown token not in the vocabulary": (M.WordLevel(AB, unk_token="[UNK]"), "ab"),
    "word pieces": (M.WordPiece(AB), "aé"),
    "unigram": (M.Unigram([("a", -1.0), ("b", -1.0)]), "é"),
    "byte pairs": (M.BPE(AB, []), "aéb"),  # would vanish
    "byte pairs, unknown token not in the vocabulary": (M.BPE(AB, [], unk_token="[UNK]"), "é"),
    "byte pairs with endings": (M.BPE({"a</w>": 0, "b": 1}, [], end_of_word_suffix="</w>"), "ab"),
    "byte pairs with beginnings": (M.BPE({"a": 0, "##b": 1}, [], continuing_subword_prefix="##"), "ba"),
    "some bytes": (M.BPE({"a": 0, "<0x62>": 1}, [], byte_fallback=True), "é"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_word_without_tokens_is_named(tmp_path: Path, name: str) -> None:
    model, word = WITHOUT[name]
    known = "ba" if "endings" in name else "ab" if "beginnings" in name else "a"
    tokenizer = open_tokenizer(words(tmp_path, model))
    assert all(len(ids) for ids in tokenizer.encode([known.encode()] * 70))
    documents = [known] * 70 + [f"{known} {word} {known}"]
    done = 0
    with pytest.raises(ValueError, match=r"data\.tokenizer: '.*words\.json' has no token for ") as caught:
        for _ in tokenizer.encode(document.encode() for document in documents):
            done += 1
    assert f"no token for '{word}'" in str(caught.value) and "must have an unknown token" in str(caught.value)
    assert done == 70


@pytest.mark.parametrize("model, text, ids", [
    (M.WordLevel({**AB, "[UNK]": 2}, unk_token="[UNK]"), "a é b", [0, 2, 1]),
    (M.BPE({"a": 0, **BYTES}, [], byte_fallback=True), "a é", [0, 0xC3 + 1, 0xA9 + 1]),
    (M.BPE({**AB, "[UNK]": 2}, [], unk_token="[UNK]"), "aéb", [0, 2, 1]),
    (M.BPE(AB, []), "ab\n b", [0, 1, 1]),  # spaces are left out by its pre-tokenizer, not for want of a token
    (M.BPE({**AB, "ab": 2}, [("a", "b")], dropout=0.9), "ab " * 8, [2] * 8),  # the same text, the same tokens
])  # fmt: skip
def test_what_has_tokens_is_encoded(tmp_path: Path, model, text: str, ids: list[int]) -> None:
    [found] = open_tokenizer(words(tmp_path, model)).encode([text.encode()])
    assert found.tolist() == ids


def test_added_and_normalised_tokens_count(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(M.BPE(AB, []))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "t.json"))
    opened = open_tokenizer(str(tmp_path / "t.json"))
    assert [ids.tolist() for ids in opened.encode([b"Ab<|endoftext|>B"])] == [[0, 1, 2, 1]]
    with pytest.raises(ValueError, match="no token for 'ac'"):
        list(opened.encode([b"ab<|endoftext|>ac"]))


def test_a_file_that_adds_its_own_beginning_and_end_doubles_nothing(tmp_path: Path) -> None:
    post = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    opened = open_tokenizer(words(tmp_path, M.WordLevel({**AB, "<s>": 2, "</s>": 3}), post_processor=post))
    assert [ids.tolist() for ids in opened.encode([b"a b"])] == [[0, 1]] and opened.end_of_document == 3


def test_the_end_of_a_document_can_be_chosen(tmp_path: Path) -> None:
    name = words(tmp_path, M.WordLevel({**AB, "</s>": 2, "<stop>": 3}))
    assert [open_tokenizer(name, wish).end_of_document for wish in (None, "<stop>", "b")] == [2, 3, 1]
    assert open_tokenizer(name, "<stop>").fingerprint != open_tokenizer(name).fingerprint
    with pytest.raises(ValueError, match=r"data\.end_of_document: '<stopp>' is no token of .*must be one, for example '<stop>'"):
        open_tokenizer(name, "<stopp>")


@pytest.mark.parametrize("content", [
    "", "null", "[]", '"text"', '{"model": 3}', '{"version": "1.0"}', "\x00",
    '{"model": {"type": "WordLevel", "vocab": {"a": -1}}}',
    '{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}',
    '{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
    '{"added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5}}',
])  # fmt: skip
def test_files_that_are_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.tokenizer: .*t\.json'.*allowed: bytes, or "):
        open_tokenizer(str(tmp_path / "t.json"))
