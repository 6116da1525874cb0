"""Hardware files: those that are shipped, and what is said of broken ones."""

import pytest
import yaml

from pipehc.config.strict_yaml import ConfigError
from pipehc.plan import main
from pipehc.planning.dry_run.hardware import load_hardware, shipped
from pipehc.planning.dry_run.operations import Operation
from pipehc.planning.dry_run.roofline import collectives, cost


def test_every_shipped_file_loads():
    assert shipped() == ["a100", "b200", "h100", "h200"]
    rates = [load_hardware(name).memory.rate for name in ("a100", "h100", "h200", "b200")]
    assert rates == sorted(rates) and len({load_hardware(name).name for name in shipped()}) == 4


def changed(tmp_path, change):
    data = load_hardware("h100").model_dump()
    change(data)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


BROKEN = {
    "matmul.efficiency is missing": lambda d: d["matmul"].pop("efficiency"),
    "memory is missing": lambda d: d.pop("memory"),
    "attention.bf16_tflops: 0: input should be greater than 0": lambda d: d["attention"].update(bf16_tflops=0),
    "network.efficiency: 1.5: input should be less than or equal to 1": lambda d: d["network"].update(efficiency=1.5),
    "nvlink.gbps: unknown key": lambda d: d["nvlink"].update(gbps=1),
    "launch_us: 'fast': input should be a valid number": lambda d: d.update(launch_us="fast"),
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_files_are_refused_in_one_sentence(tmp_path, capsys, words):
    path = changed(tmp_path, BROKEN[words])
    assert main(["--config", "configs/cpu_demo.yaml", "--dry-run", "--gpu", path]) == 2
    text = capsys.readouterr().err
    assert f"--gpu {path}: {words}" in text and len(text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "h900"), "--gpu h900: no such GPU; must be a100, b200, h100, h200 or a .yaml file"),
        (("--gpu", "nowhere.yaml"), "--gpu nowhere.yaml: cannot be read"),
        (("--ranks", "first"), "--ranks first: must be pipeline ranks from 0 to parallel.pp - 1 = 3, with commas between them"),
        (("--ranks", "0,4"), "--ranks 0,4: must be pipeline ranks from 0 to parallel.pp - 1 = 3"),
        (("--imbalance", "0.5"), "--imbalance 0.5: must be a number from 1 on"),
        (("--recomputation", "--ranks", "0"), "--ranks 0: not with --recomputation"),
        (("--recomputation", "--html", "x.html"), "--html x.html: not with --recomputation"),
        (("--recomputation", "--memory", "-1"), "--memory -1: must be a number of GiB above 0"),
        (("--memory", "80"), "--memory 80: only with --search or --recomputation"),
    ],
)
def test_broken_questions(capsys, arguments, words):
    assert main(["--config", "configs/cpu_demo.yaml", "--dry-run", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_unreadable_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: [")
    with pytest.raises(ConfigError, match="--gpu"):
        load_hardware(str(path))


def test_times_are_those_of_the_slower_of_memory_and_arithmetic():
    hardware = load_hardware("h100")
    product = Operation("aten.mm", "matmul", True, 989e12, 10)
    copy = Operation("aten.copy_", "other", True, 0.0, 3350 * 10**9)
    exchange = Operation("c10d.alltoall_base_", "communication", False, 0.0, 8 * 10**9)
    found = cost({product: 2, copy: 1, exchange: 1}, hardware, experts=8)
    assert found.device_ms == pytest.approx(2 * 1e3 / 0.767 + 1e3 / 0.908)
    assert (found.launches, found.exchanged, found.host_ms) == (3, 8 * 10**9, pytest.approx(3 * 18.9e-3))
    assert found.exchange_ms == pytest.approx(1e3 * 7 / (450 * 0.75) + 0.01)
    assert cost({exchange: 1}, hardware, experts=16).exchange_ms == pytest.approx(1e3 * 7.5 / (50 * 0.85) + 0.02)
    sums = Operation("c10d._reduce_scatter_base_", "communication", False, 0.0, 10**9)
    everywhere = sums._replace(name="c10d.allreduce_")
    assert collectives({everywhere: 1}, 4, hardware.nvlink)[1] == pytest.approx(2 * (750 / (450 * 0.75) + 0.01))
    assert collectives({sums: 2, exchange: 1}, 4, hardware.nvlink) == (2e9, pytest.approx(2 * (750 / (450 * 0.75) + 0.01)))


def test_our_kernels_take_as_long_as_they_were_measured(tmp_path):
    kernel = Operation("pipehc.project_kernel", "other", True, 0.0, 3350 * 10**9)
    measured = changed(tmp_path, lambda d: d.update(kernels={"project_kernel": 0.5}))
    assert cost({kernel: 1}, load_hardware(measured), 1).device_ms == pytest.approx(1e3 / 0.908 / 0.5)
    assert cost({kernel._replace(name="pipehc.map_kernel"): 1}, load_hardware(measured), 1).device_ms == pytest.approx(1e3 / 0.908)
    assert load_hardware(changed(tmp_path, lambda d: d.pop("kernels"))).kernels == {}
