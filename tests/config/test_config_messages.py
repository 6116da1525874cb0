"""Broken files and overrides: what is refused, and in which words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from config_cases import DEMO

from pipehc.config.loading import load_config
from pipehc.config.strict_yaml import ConfigError

# override(s) of the demo -> words that the message must hold: the key, the value, what is allowed
BROKEN: list[tuple[str, list[str]]] = [
    # unknown keys and malformed overrides
    ("model.hiden_size=64", ["model.hiden_size", "did you mean model.hidden_size?"]),
    ("trian.steps=3", ["trian.steps", "did you mean train.steps?"]),
    ("lr=0.1", ["'lr'", "did you mean optimizer.lr?"]),
    ("train.lr=0.1", ["train.lr", "did you mean optimizer.lr?"]),
    ("train.steps.x=3", ["train.steps.x", "did you mean train.steps?"]),
    ("zzz=3", ["zzz", "the sections are model, residual"]),
    ("run.qqq=3", ["run.qqq", "run has the keys folder, log_interval, tensorboard"]),
    ("train.steps", ["'train.steps'", "no '='", "section.key=value"]),
    ("=3", ["'=3'", "unknown key"]),
    ("train={}", ["train is a whole section", "steps, sequence_length"]),
    ("data.paths=[a", ["data.paths=[a", "not valid YAML"]),
    # wrong types
    ("model.heads=four", ["model.heads", "'four'", "whole number"]),
    ("model.blocks=8.0", ["model.blocks", "8.0", "whole number"]),
    ("train.steps=true", ["train.steps", "true", "whole number"]),
    ("train.steps=null", ["train.steps", "null", "whole number"]),
    ("train.steps=1_0_x", ["train.steps", "'1_0_x'", "whole number"]),
    ("train.steps=" + "9" * 50, ["train.steps", "40 digits", "at most 1000000000000"]),
    ("train.steps=" + "9" * 5000, ["train.steps=", "not valid YAML", "4300 digits"]),
    ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "must be a number"]),
    ("optimizer.lr=.nan", ["optimizer.lr", "nan", "finite"]),
    ("optimizer.lr=1e999", ["optimizer.lr", "inf", "finite"]),
    ("run.tensorboard=yes", ["run.tensorboard", "'yes'", "true or false"]),
    ("run.folder=12", ["run.folder", "12", "must be text"]),
    ("run.folder=''", ["run.folder", "''", "must not be empty"]),
    ("data.paths=here", ["data.paths", "'here'", "must be a list"]),
    ("data.paths=[a, 3]", ["data.paths[1]", "3", "must be text"]),
    ("optimizer.betas=[0.9]", ["optimizer.betas", "[0.9]", "pair of numbers"]),
    ("optimizer.betas=[0.9, 0.95, 0.99]", ["optimizer.betas", "[0.9, 0.95, 0.99]", "at most 2"]),
    ("optimizer.decay=[[0.8]]", ["optimizer.decay[0]", "[0.8]", "pair of numbers"]),
    ("schedule.name=dualpip", ["schedule.name", "'dualpip'", "'gpipe', '1f1b'", "'dualpipe', 'dualpipev' or 'auto'"]),
    ("residual.kind=hyper", ["residual.kind", "'hyper'", "must be 'none', 'hc', 'mhc'"]),
    ("residual.exit=max", ["residual.exit", "'max'", "'mean' or 'sum'"]),
    ("train.precision=fp16", ["train.precision", "'fp16'", "'fp32' or 'bf16'"]),
    ("data.kind=parquet", ["data.kind", "'parquet'", "'text', 'megatron' or 'retrieval'"]),
    # out of range
    ("model.heads=0", ["model.heads", "0", "greater than 0"]),
    ("model.blocks=20000", ["model.blocks", "20000", "at most 10000"]),
    ("model.norm_eps=-1", ["model.norm_eps", "-1", "greater than 0"]),
    ("residual.streams=17", ["residual.streams", "17", "at most 16"]),
    ("residual.sinkhorn_iterations=0", ["residual.sinkhorn_iterations", "0", "greater than 0"]),
    ("train.seed=-1", ["train.seed", "-1", "at least 0"]),
    ("optimizer.betas=[0.9, 1]", ["optimizer.betas[1]", "1", "less than 1"]),
    ("optimizer.decay=[[1.5, 0.1]]", ["optimizer.decay[0][0]", "1.5", "at most 1"]),
    ("data.validation_fraction=1", ["data.validation_fraction", "1", "less than 1"]),
    ("checkpoint.keep=0", ["checkpoint.keep", "0", "greater than 0"]),
    ("evaluation.interval=-5", ["evaluation.interval", "-5", "at least 0"]),
    ("runtime.timeout_s=0", ["runtime.timeout_s", "0", "greater than 0"]),
    ("runtime.transport=nccl", ["runtime.transport", "'nccl'", "'device' or 'host'"]),
    ("runtime.overlap=1", ["runtime.overlap", "true or false"]),
    ("trace.steps=[5, 4]", ["trace.steps", "[5, 4]", "must not be after"]),
    ("trace.steps=[0, 4]", ["trace.steps[0]", "0", "greater than 0"]),
    ("recompute.block=0", ["recompute.block", "0", "greater than 0"]),
    ("recompute.enabled=yes", ["recompute.enabled", "true or false"]),
    ("parallel.blocks_per_stage=[0, 2, 3, 3]", ["parallel.blocks_per_stage[0]", "0", "greater than 0"]),
    ("model.mtp_depth=-1", ["model.mtp_depth", "-1", "at least 0"]),
    ("model.mtp_loss_weight=0", ["model.mtp_loss_weight", "0", "greater than 0"]),
    ("model.mtp_input=first", ["model.mtp_input", "'first'", "'exit', 'mean' or 'sum'"]),
    # across keys
    ("model.mtp_depth=128", ["model.mtp_depth: 128", "below train.sequence_length = 128"]),
    ("model.rope_dim=15", ["model.rope_dim", "15", "even"]),
    ("model.dense_blocks=9", ["model.dense_blocks", "9", "at most model.blocks = 8"]),
    ("model.experts_active=9", ["model.experts_active", "9", "at most model.experts = 8"]),
    ("model.experts_active=0", ["model.experts_active", "0", "at least 1", "dense_blocks: 8"]),
    ("model.experts=0 model.experts_active=0", ["model.experts: 0", "at least 1"]),
    ("model.expert_ffn_size=0", ["model.expert_ffn_size", "0", "at least 1"]),
    ("model.vocab_size=255", ["model.vocab_size", "255", "at least 256"]),
    ("parallel.ep=3", ["parallel.ep", "3", "divide model.experts = 8"]),
    ("parallel.ep=2 parallel.dp=1", ["parallel.ep", "2", "divide dp x tp = 1"]),
    ("parallel.tp=2 model.heads=6 train.sequence_length=99", ["parallel.tp: 2", "divide train.sequence_length = 99"]),
    ("parallel.tp=2 model.vocab_size=257", ["parallel.tp: 2", "divide model.vocab_size = 257"]),
    ("parallel.tp=2 model.dense_ffn_size=501", ["parallel.tp: 2", "divide model.dense_ffn_size = 501"]),
    ("parallel.tp=2 model.expert_ffn_size=33", ["parallel.tp: 2", "divide model.experts_shared x expert_ffn_size = 33"]),
    ("parallel.tp=2 model.kv_rank=31", ["parallel.tp: 2", "divide model.kv_rank + rope_dim = 47"]),
    ("parallel.tp=2 model.mtp_depth=1 model.hidden_size=129", ["parallel.tp: 2", "with model.mtp_depth > 0, = 129"]),
    ("parallel.tp=0", ["parallel.tp", "0", "greater than 0"]),
    ("parallel.tp=3", ["parallel.tp", "3", "divide model.heads = 4"]),
    ("parallel.pp=3", ["parallel.pp", "3", "even", "dualpipe"]),
    ("parallel.pp=1", ["parallel.pp", "1", "even, at least 2"]),
    ("parallel.pp=10 train.global_batch=80", ["parallel.pp", "10 stages", "at most model.blocks = 8"]),
    ("schedule.chunks=2", ["schedule.chunks: 2", "only interleaved", "dualpipe"]),
    ("schedule.name=interleaved schedule.chunks=3", ["12 stages", "model.blocks = 8"]),
    ("schedule.name=auto search.placement=w", ["search.placement", "'linear', 'v' or 'bidirectional'"]),
    ("schedule.name=auto search.placement=bidirectional parallel.pp=3", ["parallel.pp: 3", "must be even"]),
    ("schedule.name=auto search.f=0", ["search.f", "0", "greater than 0"]),
    ("parallel.pp=5 schedule.name=dualpipev train.global_batch=80", ["parallel.pp: 5", "10 stages", "model.blocks = 8"]),
    ("parallel.pp=999999999998", ["parallel.pp", "999999999998 stages", "at most model.blocks = 8"]),
    ("parallel.blocks_per_stage=[4, 4]", ["parallel.blocks_per_stage", "[4, 4]", "4, one a stage"]),
    ("parallel.blocks_per_stage=[1, 2, 3, 4]", ["parallel.blocks_per_stage", "[1, 2, 3, 4]", "sum to blocks = 8"]),
    ("train.global_batch=30", ["train.global_batch", "30", "multiple of train.micro_batch x dp = 4 x 1"]),
    ("train.global_batch=24", ["train.global_batch", "24", "6 micro-batches", "even number, at least 8"]),
    ("train.global_batch=36", ["train.global_batch", "36", "9 micro-batches", "even number"]),
    ("train.global_batch=28 schedule.name=dualpipev", ["train.global_batch", "7 micro-batches", "dualpipev", "at least 8"]),
    ("parallel.dp=2", ["train.global_batch", "32", "4 micro-batches", "4 x 2", "at least 8"]),
    ("evaluation.samples=60", ["evaluation.samples", "60", "both ends", "= 8"]),
    ("evaluation.samples=62 schedule.name=1f1b", ["evaluation.samples", "62", "multiple of train.micro_batch x dp = 4 x 1 = 4"]),
    ("optimizer.warmup_steps=301", ["optimizer.warmup_steps", "301", "at most train.steps = 200"]),
    ("optimizer.decay=[[0.9,0.3],[0.9,0.1]]", ["optimizer.decay", "[0.9, 0.9]", "must increase"]),
    ("data.kind=megatron", ["data.paths", "[]", "at least one prefix"]),
    ("checkpoint.weights=a checkpoint.resume=b", ["checkpoint.weights", "'a'", "checkpoint.resume", "'b'", "one of the two"]),
    ("data.end_of_document=x", ["data.end_of_document", "'x'", "must be null with data.tokenizer bytes"]),
    ("data.end_of_document=x data.kind=megatron", ["data.end_of_document", "must be null with data.kind megatron"]),
    ("checkpoint.allow_changes=[residual.exti]", ["checkpoint.allow_changes", "'residual.exti'", "did you mean residual.exit?"]),
    ("checkpoint.allow_changes=[train.steps]", ["checkpoint.allow_changes", "'train.steps'", "needs no permission"]),
    ("checkpoint.allow_changes=residual.exit", ["checkpoint.allow_changes", "'residual.exit'", "must be a list"]),
]


def _overrides(text: str) -> list[str]:
    """Splits 'a.b=1 c.d=2', not the spaces inside a list."""
    return [text] if "[" in text else text.split(" ")


@pytest.mark.parametrize(("overrides", "words"), BROKEN, ids=[overrides[:60] for overrides, _ in BROKEN])
def test_broken_override(overrides: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, _overrides(overrides))
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message or " problems\n" in message


def test_enough_broken_configurations() -> None:
    assert len({overrides for overrides, _ in BROKEN}) == len(BROKEN) >= 40


BROKEN_FILES: list[tuple[str, bytes, list[str]]] = [
    ("empty", b"", ["is empty", "mapping of sections: model"]),
    ("only_comments", b"# nothing\n", ["is empty"]),
    ("a_list", b"- model\n- train\n", ["['model', 'train']", "mapping of sections"]),
    ("a_word", b"model", ["'model'", "mapping of sections"]),
    ("open_bracket", b"model: [1, 2\n", ["not valid YAML", "line 2"]),
    ("bad_indent", b"model:\n  heads: 4\n blocks: 2\n", ["not valid YAML", "line 3"]),
    ("tabs", b"model:\n\theads: 4\n", ["not valid YAML", "line 2"]),
    ("duplicate_key", b"model:\n  heads: 4\n  heads: 8\n", ["'heads' stands there twice", "line 3"]),
    ("duplicate_section", b"model: {}\nmodel: {}\n", ["'model' stands there twice"]),
    ("list_as_key", b"[1, 2]: 3\n", ["not valid YAML", "plain text"]),
    ("not_utf8", b"model: \xff\xfe\n", ["not UTF-8"]),
    ("binary", b"\x00\x01\x02", ["not valid YAML", "is not allowed"]),
    ("two_documents", b"model: 1\n---\nmodel: 2\n", ["not valid YAML"]),
    ("unknown_alias", b"model: *nothing\n", ["not valid YAML", "nothing"]),
    ("python_object", b"model: !!python/object/apply:os.getcwd []\n", ["not valid YAML", "python"]),
    ("deep", b"model: " + b"[" * 3000, ["not valid YAML"]),
    ("section_missing", b"model: {}\n", ["train: missing", "steps, sequence_length"]),
    ("section_null", b"train:\nmodel:\n", ["train: null", "section with the keys steps"]),
    ("section_is_number", b"train: 3\n", ["train: 3", "section with the keys steps"]),
    ("key_missing", b"model:\n  heads: 4\n", ["model.vocab_size: missing", "no default"]),
    ("unknown_section", b"modle:\n  heads: 4\n", ["modle: unknown key", "did you mean model?"]),
    ("number_as_key", b"train:\n  7: 3\n", ["train: key 7 is not text"]),
    ("number_as_section", b"7: 3\n", ["key 7 is not text"]),
]


@pytest.mark.parametrize(("content", "words"), [case[1:] for case in BROKEN_FILES], ids=[case[0] for case in BROKEN_FILES])
def test_broken_file(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="not a file"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        load_config("a\0b")
    with pytest.raises(ConfigError, match="not a file"):
        load_config("/dev/zero")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("x" * 5000)
    if os.geteuid() != 0:
        (tmp_path / "closed.yaml").touch(mode=0)
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(tmp_path / "closed.yaml")


def test_override_into_a_malformed_section(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train: 3\n")
    with pytest.raises(ConfigError, match="train: 3: must be a section"):
        load_config(path, ["train.steps=4"])


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, ["model.heads=0", "train.steps=x", "run.tensorboard=1"])
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(": 3 problems") and [line.split(":")[0].strip() for line in lines[1:]] == [
        "model.heads",
        "train.steps",
        "run.tensorboard",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(DEMO, ["model.rope_dim=3", "parallel.pp=3", "optimizer.warmup_steps=999"])
    assert "3 problems" in str(caught.value)
