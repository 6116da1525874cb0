"""Checks against processes and disk, YAML that loads back equal, and command-line arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_cases import DEMO

from pipehc.config.loading import add_config_arguments, check_data, check_world_size, load_config, run_with_config
from pipehc.config.schema import Config
from pipehc.config.strict_yaml import ConfigError


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
            (load_config(DEMO, ["checkpoint.weights=latest"]), ["checkpoint.weights", "'latest'", "null or the folder"]),
            (load_config(DEMO, [f"run.folder={tmp_path}/a.dat/run"]), ["run.folder", "a.dat is a file"]),
        ]
        for config, words in cases:
            with pytest.raises(ConfigError) as caught:
                check_data(config)
            for word in words:
                assert word in str(caught.value)


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


def test_home_folders_are_expanded_wherever_a_place_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    places = ["data.paths=['~/text', a~b]", "run.folder=~/run", "data.tokenizer=~/t.json", "checkpoint.resume=~/c"]
    assert load_config(DEMO, ["checkpoint.weights=~/w"]).checkpoint.weights == f"{tmp_path}/w"
    config = load_config(DEMO, places)
    assert config.data.paths == (f"{tmp_path}/text", "a~b") and config.data.tokenizer == f"{tmp_path}/t.json"
    assert config.run.folder == f"{tmp_path}/run" and config.checkpoint.resume == f"{tmp_path}/c"
    check_data(load_config(DEMO, ["data.paths=['~/text']"]))
