"""The README's first hour on a cluster: its commands exist, and their configurations fit the processes that they start."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from pipehc.config.loading import check_world_size, load_config

ROOT = Path(__file__).parents[1]
CHAPTER = (ROOT / "README.md").read_text().split("## The first hour on a cluster")[1].split("\n## ")[0]


def commands():
    lines = re.sub(r" \\\n +", " ", CHAPTER).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("       ")]


def after(words, option, default):
    return int(words[words.index(option) + 1]) if option in words else default


TRAININGS = [words for words in commands() if "configs/cpu_demo.yaml" in words]


def test_there_are_commands():
    assert len(commands()) >= 9 and len(TRAININGS) == 3


@pytest.mark.parametrize("words", TRAININGS, ids=" ".join)
def test_configurations_fit_their_processes(words):
    overrides = words[words.index("--config") + 2 :]
    processes = after(words, "--nnodes", 1) * after(words, "--nproc-per-node", 1)
    check_world_size(load_config(ROOT / "configs" / "cpu_demo.yaml", overrides), processes)


def test_keys_files_modules_and_targets_exist():
    sections = load_config(ROOT / "configs" / "cpu_demo.yaml").model_dump()
    for section, key in re.findall(r"\b(\w+)\.(\w+)=", CHAPTER):
        assert key in sections[section], (section, key)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands():
        assert words[0] in ("make", "torchrun", "python", "..."), words
        assert words[0] != "make" or words[1] in targets
        for module in (words[i + 1] for i, word in enumerate(words) if word == "-m"):
            assert importlib.util.find_spec(module), module
        assert all((ROOT / word).exists() for word in words if re.match(r"(tools|configs)/", word)), words
