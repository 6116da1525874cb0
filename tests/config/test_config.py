"""Configuration: what loads, what is refused and in which words."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipehc.config.loading import add_config_arguments, check_data, check_world_size, load_config, run_with_config, to_yaml
from pipehc.config.schema import Config
from pipehc.config.strict_yaml import ConfigError, dump_yaml, parse_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "cpu_demo.yaml"
ALL = sorted(CONFIGS.glob("*.yaml"))

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
    ("data.kind=parquet", ["data.kind", "'parquet'", "'text' or 'megatron'"]),
    # out of range
    ("model.heads=0", ["model.heads", "0", "greater than 0"]),
    ("model.blocks=20000", ["model.blocks", "20000", "at most 10000"]),
    ("model.norm_eps=-1", ["model.norm_eps", "-1", "greater than 0"]),
    ("residual.streams=9", ["residual.streams", "9", "at most 8"]),
    ("residual.sinkhorn_iterations=0", ["residual.sinkhorn_iterations", "0", "greater than 0"]),
    ("train.seed=-1", ["train.seed", "-1", "at least 0"]),
    ("optimizer.betas=[0.9, 1]", ["optimizer.betas[1]", "1", "less than 1"]),
    ("optimizer.decay=[[1.5, 0.1]]", ["optimizer.decay[0][0]", "1.5", "at most 1"]),
    ("data.validation_fraction=1", ["data.validation_fraction", "1", "less than 1"]),
    ("checkpoint.keep=0", ["checkpoint.keep", "0", "greater than 0"]),
    ("evaluation.interval=-5", ["evaluation.interval", "-5", "at least 0"]),
    ("runtime.timeout_s=0", ["runtime.timeout_s", "0", "greater than 0"]),
    ("runtime.overlap=1", ["runtime.overlap", "true or false"]),
    ("trace.steps=[5, 4]", ["trace.steps", "[5, 4]", "must not be after"]),
    ("trace.steps=[0, 4]", ["trace.steps[0]", "0", "greater than 0"]),
    ("recompute.block=0", ["recompute.block", "0", "greater than 0"]),
    ("recompute.enabled=yes", ["recompute.enabled", "true or false"]),
    ("parallel.blocks_per_stage=[0, 2, 3, 3]", ["parallel.blocks_per_stage[0]", "0", "greater than 0"]),
    # across keys
    ("model.rope_dim=15", ["model.rope_dim", "15", "even"]),
    ("model.dense_blocks=9", ["model.dense_blocks", "9", "at most model.blocks = 8"]),
    ("model.experts_active=9", ["model.experts_active", "9", "at most model.experts = 8"]),
    ("model.experts_active=0", ["model.experts_active", "0", "at least 1", "dense_blocks: 8"]),
    ("model.experts=0 model.experts_active=0", ["model.experts: 0", "at least 1"]),
    ("model.expert_ffn_size=0", ["model.expert_ffn_size", "0", "at least 1"]),
    ("model.vocab_size=255", ["model.vocab_size", "255", "at least 256"]),
    ("parallel.ep=3", ["parallel.ep", "3", "divide model.experts = 8"]),
    ("parallel.ep=2 parallel.dp=1", ["parallel.ep", "2", "divide dp x tp = 1"]),
    ("parallel.tp=2", ["parallel.tp", "2", "only 1 is supported by the trainer so far"]),
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


def test_checked_however_it_is_made() -> None:
    data = load_config(DEMO).model_dump()
    data["parallel"]["pp"] = 3
    with pytest.raises(ValidationError, match="must be even"):
        Config(**data)


def test_frozen() -> None:
    config = load_config(DEMO)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]
    hash(config)


def test_overrides_and_defaults() -> None:
    config = load_config(
        DEMO, ["optimizer.lr=1e-3", "train.steps=5", "optimizer.warmup_steps=0", "train.steps=7", "parallel.dp=1"]
    )
    assert (config.optimizer.lr, config.train.steps, config.parallel.dp) == (1e-3, 7, 1)
    assert load_config(DEMO, ["optimizer.eps=1E-8"]).optimizer.eps == 1e-8
    assert load_config(DEMO, ["optimizer.lr=1"]).optimizer.lr == 1.0
    assert load_config(DEMO, ["run.folder=2024-01-01"]).run.folder == "2024-01-01"
    assert load_config(DEMO, ["run.folder=a=b"]).run.folder == "a=b"
    assert load_config(DEMO, [" data.paths = [x y, z]"]).data.paths == ("x y", "z")
    assert load_config(DEMO, ["model.dense_ffn_size=null"]).model.dense_ffn_size == 8 * 64
    assert load_config(DEMO, ["evaluation.interval=0", "evaluation.samples=3"]).evaluation.samples == 3


def test_dense_model() -> None:
    dense = [
        "model.dense_blocks=8",
        "model.experts=0",
        "model.experts_active=0",
        "model.experts_shared=0",
        "model.expert_ffn_size=0",
    ]
    config = load_config(DEMO, dense)
    assert (config.model.moe_blocks, config.model.dense_ffn_size) == (0, 512)
    with pytest.raises(ConfigError, match=r"model\.dense_ffn_size: null"):
        load_config(DEMO, [*dense, "model.dense_ffn_size=null"])
    with pytest.raises(ConfigError, match=r"parallel\.ep: 2: must divide model\.experts = 0"):
        load_config(DEMO, [*dense, "parallel.ep=2"])


def test_derived() -> None:
    config = load_config(DEMO)
    assert (config.stages, config.lanes, config.microbatches(1), config.evaluation_microbatches(1)) == (4, 2, 8, 16)
    assert config.stage_blocks() == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert config.stage_message_bytes() == 4 * 128 * 4 * 128 * 4
    half = load_config(DEMO, ["train.precision=bf16", "residual.kind=none", "schedule.name=dualpipev"])
    assert (half.stages, half.lanes, half.stage_message_bytes()) == (8, 1, 4 * 128 * 128 * 2)


@pytest.mark.parametrize(
    "overrides",
    [
        "schedule.name=1f1b parallel.pp=1 train.global_batch=4",
        "schedule.name=1f1b parallel.pp=3 train.global_batch=4",
        "schedule.name=dualpipev parallel.pp=1 train.global_batch=8",
        "schedule.name=dualpipev parallel.pp=4 train.global_batch=36",
        "schedule.name=dualpipe parallel.pp=2 train.global_batch=16",
        "schedule.name=dualpipe parallel.pp=8 train.global_batch=80",
    ],
)
def test_smallest_layouts_are_accepted(overrides: str) -> None:
    load_config(DEMO, overrides.split())


class TestWorldSize:
    def test_dp_is_what_remains(self) -> None:
        assert check_world_size(load_config(DEMO), 4) == 1
        assert check_world_size(load_config(DEMO, ["train.global_batch=64", "parallel.ep=2"]), 8) == 2
        assert check_world_size(load_config(DEMO, ["train.global_batch=64", "parallel.dp=2"]), 8) == 2

    @pytest.mark.parametrize(
        ("overrides", "world_size", "words"),
        [
            ([], 3, ["number of processes", "3", "multiple of parallel.pp x tp = 4 x 1 = 4"]),
            ([], 6, ["number of processes", "6", "multiple"]),
            ([], 0, ["number of processes", "0", "multiple"]),
            (["parallel.dp=1"], 8, ["number of processes", "8", "4 = parallel.pp x tp = 4 x 1 x dp = 1"]),
            ([], 8, ["train.global_batch: 32", "4 micro-batches", "4 x 2", "at least 8"]),
            ([], 12, ["train.global_batch: 32", "multiple of train.micro_batch x dp = 4 x 3 = 12"]),
            (["parallel.ep=2", "train.global_batch=96"], 12, ["parallel.ep: 2", "divide dp x tp = 3"]),
            (["train.global_batch=128", "evaluation.samples=24"], 16, ["evaluation.samples: 24", "= 32"]),
        ],
    )
    def test_refused(self, overrides: list[str], world_size: int, words: list[str]) -> None:
        config = load_config(DEMO, overrides)
        with pytest.raises(ConfigError) as caught:
            check_world_size(config, world_size)
        for word in words:
            assert word in str(caught.value)


class TestData:
    def _config(self, **data: Any) -> Config:
        return load_config(DEMO, [f"data.{key}={value}" for key, value in data.items()])

    def test_present(self, tmp_path: Path) -> None:
        check_data(load_config(DEMO, [f"run.folder={tmp_path}/new/folder"]))
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a.txt").write_text("hello")
        check_data(self._config(paths=f"[{tmp_path}, {tmp_path}/sub/a.txt]"))
        for suffix in (".bin", ".idx"):
            (tmp_path / f"corpus{suffix}").touch()
        check_data(self._config(kind="megatron", paths=f"[{tmp_path}/corpus]"))

    def test_missing(self, tmp_path: Path) -> None:
        (tmp_path / "a.dat").touch()
        (tmp_path / "half.bin").touch()
        cases: list[tuple[Config, list[str]]] = [
            (self._config(paths=f"[{tmp_path}/none]"), ["data.paths", f"{tmp_path}/none", "text file or a folder"]),
            (self._config(paths=f"[{tmp_path}]"), ["data.paths", str(tmp_path), ".py", "at least one"]),
            (self._config(kind="megatron", paths=f"[{tmp_path}/half]"), ["data.paths", "half.idx", ".bin/.idx"]),
            (self._config(tokenizer=f"{tmp_path}/t.json"), ["data.tokenizer", "t.json", "'bytes'"]),
            (load_config(DEMO, ["checkpoint.resume=latest"]), ["checkpoint.resume", "'latest'", "auto, never"]),
            (load_config(DEMO, [f"run.folder={tmp_path}/a.dat/run"]), ["run.folder", "a.dat is a file"]),
        ]
        for config, words in cases:
            with pytest.raises(ConfigError) as caught:
                check_data(config)
            for word in words:
                assert word in str(caught.value)


class TestYaml:
    @pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
    def test_round_trip(self, path: Path, tmp_path: Path) -> None:
        config = load_config(path, ["run.folder='1e3'"])
        copy = tmp_path / "copy.yaml"
        copy.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(copy) == config
        assert to_yaml(load_config(copy)) == to_yaml(config)

    @given(
        st.recursive(st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False), st.lists, max_leaves=8)
    )
    def test_values_round_trip(self, value: Any) -> None:
        back = parse_yaml(dump_yaml({"key": value}))["key"]
        assert back == value and type(back) is type(value)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("1e-3", 1e-3),
            ("1E5", 1e5),
            ("+2.e3", 2e3),
            (".5", 0.5),
            ("-.inf", float("-inf")),
            ("010", "010"),
            ("1:30", "1:30"),
            ("yes", "yes"),
            ("off", "off"),
            ("2024-01-01", "2024-01-01"),
            ("-7", -7),
            ("1_000", 1000),
            ("", None),
            ("~", None),
            ("none", "none"),
            ("False", False),
            ("e3", "e3"),
            ("1e", "1e"),
        ],
    )
    def test_scalars(self, text: str, value: Any) -> None:
        parsed = parse_yaml(text)
        assert parsed == value and type(parsed) is type(value)

    def test_merge_keys(self) -> None:
        assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


class TestCommandLine:
    def _run(self, *argv: str) -> int:
        parser = argparse.ArgumentParser()
        add_config_arguments(parser)
        return run_with_config(parser.parse_intermixed_args(argv), lambda config: config.train.steps)

    def test_runs(self) -> None:
        assert self._run("train.steps=41", "--config", str(DEMO), "optimizer.lr=1") == 41

    def test_prints_config(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self._run("--config", str(DEMO), "--print-config", "model.dense_ffn_size=null") == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["model"]["dense_ffn_size"] == 512 and printed["optimizer"]["decay"] == [[0.8, 0.316], [0.9, 0.1]]

    def test_one_process_alone_says_it(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        assert self._run("--config", str(DEMO), "model.heads=0") == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1

    def test_of_a_job_the_first_process_says_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
        for rank, lines in (("3", 1), ("0", 0)):
            monkeypatch.setenv("RANK", rank)
            assert self._run("--config", str(DEMO), "model.heads=0") == 2
            assert len(capsys.readouterr().err.splitlines()) == lines


# Table 5 and the recipe of the mHC paper
PAPER = {
    "3b": {
        "blocks": 12,
        "hidden_size": 1280,
        "expert_ffn_size": 896,
        "heads": 16,
        "experts": 64,
        "batch": 320,
        "steps": 30000,
        "lr": 8.6e-4,
    },
    "9b": {
        "blocks": 18,
        "hidden_size": 1920,
        "expert_ffn_size": 1280,
        "heads": 24,
        "experts": 64,
        "batch": 512,
        "steps": 50000,
        "lr": 5.9e-4,
    },
    "27b_pp8": {
        "blocks": 30,
        "hidden_size": 2560,
        "expert_ffn_size": 1536,
        "heads": 32,
        "experts": 72,
        "batch": 1280,
        "steps": 50000,
        "lr": 4e-4,
    },
    "3b_1t": {
        "blocks": 12,
        "hidden_size": 1280,
        "expert_ffn_size": 896,
        "heads": 16,
        "experts": 64,
        "batch": 2560,
        "steps": 100000,
        "lr": 9e-4,
    },
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_configurations(name: str) -> None:
    config, row = load_config(CONFIGS / f"{name}.yaml"), PAPER[name]
    model, optimizer = config.model, config.optimizer
    for key in ("blocks", "hidden_size", "expert_ffn_size", "heads", "experts"):
        assert getattr(model, key) == row[key], key
    assert (config.train.global_batch, config.train.steps, optimizer.lr) == (row["batch"], row["steps"], row["lr"])
    assert (model.vocab_size, model.dense_blocks, model.experts_active, model.experts_shared) == (129280, 1, 6, 2)
    assert (model.head_dim, model.rope_dim, model.rope_theta, model.kv_rank, model.norm_eps) == (128, 64, 1e4, 512, 1e-20)
    assert model.dense_ffn_size == 8 * model.expert_ffn_size
    assert (config.residual.kind, config.residual.streams, config.residual.alpha, config.residual.sinkhorn_iterations) == (
        "mhc",
        4,
        0.01,
        20,
    )
    assert (config.train.sequence_length, config.train.precision) == (4096, "bf16")
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.warmup_steps) == ((0.9, 0.95), 1e-20, 0.1, 2000)
    assert optimizer.decay == ((0.8, 0.316), (0.9, 0.1))
    assert config.parallel.dp is not None
    assert check_world_size(config, config.parallel.pp * config.parallel.dp) == config.parallel.dp
    if name == "27b_pp8":
        assert (config.parallel.pp, config.schedule.name) == (8, "dualpipe")


def test_home_folders_are_expanded_wherever_a_place_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    places = ["data.paths=['~/text', a~b]", "run.folder=~/run", "data.tokenizer=~/t.json", "checkpoint.resume=~/c"]
    config = load_config(DEMO, places)
    assert config.data.paths == (f"{tmp_path}/text", "a~b") and config.data.tokenizer == f"{tmp_path}/t.json"
    assert config.run.folder == f"{tmp_path}/run" and config.checkpoint.resume == f"{tmp_path}/c"
    check_data(load_config(DEMO, ["data.paths=['~/text']"]))
