"""YAML: scalars as in 1.2, and what is written loads back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_cases import ALL
from hypothesis import given
from hypothesis import strategies as st

from pipehc.config.loading import load_config, to_yaml
from pipehc.config.strict_yaml import dump_yaml, parse_yaml


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
