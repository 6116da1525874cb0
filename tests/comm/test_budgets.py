"""Every setting has one place, a reason and a way to override it."""

import os
import re
from pathlib import Path

import pytest

from pipehc.comm.budgets import ALL_TO_ALL_BLOCKS, BUDGETS, MESSAGE_BLOCKS, blocks, set_gpu_defaults
from pipehc.config.loading import load_config

ROOT = Path(__file__).parents[2]


def test_what_a_user_has_set_stays():
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    set_gpu_defaults(environment)
    assert environment == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8", "CUDA_MODULE_LOADING": "EAGER", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
    }  # fmt: skip
    environment = {}
    set_gpu_defaults(environment)
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True" and "PYTORCH_CUDA_ALLOC_CONF" not in environment


@pytest.mark.parametrize("budget", [MESSAGE_BLOCKS, ALL_TO_ALL_BLOCKS])
def test_the_configuration_goes_before_the_environment_and_that_before_the_table(budget):
    assert blocks(budget, environment={}) == int(budget.default)
    assert blocks(budget, environment={budget.variable: "7"}) == 7
    assert blocks(budget, 2, {budget.variable: "7"}) == 2
    for wrong in ("0", "65", "many", "-1", "2.5", "\u00b2"):
        with pytest.raises(ValueError, match=f"{budget.variable} = .*: must be a whole number, from 1 to 64"):
            blocks(budget, environment={budget.variable: wrong})


def test_every_key_of_the_table_is_one_of_the_configuration_and_its_default_the_tables():
    demo = ROOT / "configs" / "cpu_demo.yaml"
    for budget in BUDGETS:
        assert budget.reason.endswith(".") and len(budget.reason) > 60, budget
        if not budget.key:
            continue
        section, key = budget.key.split(".")
        assert getattr(getattr(load_config(demo), section), key) is None
        assert getattr(getattr(load_config(demo, [f"{budget.key}=5"]), section), key) == 5
        said = re.search(rf"^  {key}: null +#(.*)$", demo.read_text(), re.M)
        assert f"null: {budget.default}, or {budget.variable}" in said[1]


def test_no_other_file_sets_them():
    """One place: a second default would be forgotten when the first one changes."""
    folders = ("comm", "kernels", "pipehc", "recompute", "schedules", "tools")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        if path.name != "budgets.py":
            assert not re.search(r"max_ctas\W* *= *\d|expandable_segments:|max_ctas\"?: *\d", text), path


def test_the_trainer_sets_them_before_it_asks_for_cuda(monkeypatch):
    """Afterwards they would come too late."""
    from pipehc import train

    class Asked(Exception): ...

    def is_available():
        raise Asked(os.environ.get("CUDA_MODULE_LOADING"), os.environ.get("PYTORCH_ALLOC_CONF"))

    for name in ("check_world_size", "check_data", "quiet_libraries"):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("torch.cuda.is_available", is_available)
    monkeypatch.setattr("os.environ", {"RANK": "0"})
    with pytest.raises(Asked, match=r"EAGER.*expandable_segments:True"):
        train.run(None)


def test_the_trainer_asks_nccl_for_a_priority_and_few_blocks_of_its_all_to_alls(monkeypatch):
    """NCCL itself cannot be had here: what Megatron reads of the file that it is given."""
    yaml = pytest.importorskip("yaml")
    from megatron.core.parallel_state import get_nccl_options

    from pipehc.megatron.trainer.groups import _nccl_settings

    with _nccl_settings(None) as path:
        assert path is None  # without CUDA
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    for given, expected in ((None, 16), (9, 9)):
        with _nccl_settings(given) as path:
            options = get_nccl_options("ep", yaml.safe_load(Path(path).read_text()))
        assert options.is_high_priority_stream and options.config.max_ctas == expected
        assert not Path(path).exists()
