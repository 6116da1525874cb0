"""CSV in and out, and our schedules inside torch.distributed.pipelining's own runtime, over real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_ranks
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

from pipehc.schedules import FAMILIES, Schedule, build, check, compile
from pipehc.schedules.actions import Action
from pipehc.schedules.torch_csv import to_torch_csv

GRID = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"

ONE_LANE = [name for name in FAMILIES if name != "dualpipe"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_csv_keeps_everything_but_the_name(tmp_path: Path, name: str, forward: bool, ranks: int) -> None:
    if name == "dualpipe" and ranks == 1:
        return
    schedule = build(name, ranks, 10, forward=forward)
    schedule.to_csv(tmp_path / f"{name}.csv")
    assert Schedule.from_csv(tmp_path / f"{name}.csv") == schedule


def test_csv_keeps_recompute(tmp_path: Path) -> None:
    rows = (tuple(Action(kind, 0, 0) for kind in "FRIW"),)  # type: ignore[arg-type]
    schedule = Schedule("r", build("1f1b", 1, 1).placement, 1, rows)
    schedule.to_csv(tmp_path / "r.csv")
    assert Schedule.from_csv(tmp_path / "r.csv") == schedule
    to_torch_csv(schedule, tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().strip() == "0F0,0I0,0W0"


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("0F0,0X0\n", r"line 1: action '0X0': must look like"),
        ("0F0,0B0\n1F0,(0F0;1F0)OVERLAP_F_B\n", r"line 2: pair .*must be a forward F and a full backward B"),
        ("0F0,0B0\n0F1,0B1\n", r"stage 0 of lane 0 is on ranks 0 and 1"),
        ("0F0,0B0,2F0\n", r"no action for \(lane, stage\) \(0, 1\) of 1 lanes of 3 stages"),
        ("0F0,0B0\n\n1F0,1B0\n", r"line 2: rank 1 has no action; only at its end"),
        ("\n0F0,0B0\n1F0,1B0\n", r"line 1: rank 0 has no action; only at its end"),
        ("0F0,0B0\n1SEND_B0,1RECV_F0\n", r"line 2: rank 1 has no action"),
        ("\n", r"has no action in it"),
        ("", r"has no action in it"),
        (";;\n,,\n", r"has no action in it"),
        ("0F0,0F1,0BW0,0BW1\n1F0,1BW0,1F1,1BW1\n", r"line 1: action '0BW0': must look like 2F7, 2B7, 2I7, 2W7"),
        ("0F0,0B0\nrank 1,1F0\n", r"line 2: action 'rank 1': must look like"),
        # What micro-batches and stages count from.
        ("1F0,1B0\n2F0,2B0\n", r"no action for \(lane, stage\) \(0, 0\) .* both count from 0"),
        ("0F1,0F2,0B1,0B2\n1F1,1B1,1F2,1B2\n", r"line 1: stage 0 on rank 0 begins with 0F1 .* micro-batches count from 0"),
        ("0F0,0F1,0B0,0B1\n1F1,1B1,1F2,1B2\n", r"line 2: stage 1 on rank 1 begins with 1F1 .* micro-batches count from 0"),
        ("0F0,0B0,1F1,1B1\n2F0,2B0\n", r"line 1: stage 1 on rank 0 begins with 1F1"),
        ("0F0,0B0,0F2,0B2\n", r"has micro-batch 2, but no rank has micro-batch 1"),
        ("0F0,0B0,0F1000000000000,0B1000000000000\n", r"no rank has micro-batch 1;"),
        ("0F0,0B0,1000000000000F0\n", r"no action for \(lane, stage\) \(0, 1\)"),
        # Torch up to 2.5: B is the gradient of the input where a W follows.
        ("0F0,0B0,0W0\n", r"line 1: has both 0B0 and 0W0, .* torch up to 2\.5 wrote B .*: call it I"),
        ("0F0,0F1,0B0,0B1,0W1\n1F0,1B0,1F1,1B1\n", r"line 1: has both 0B1 and 0W1"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,(1F1;1B1)OVERLAP_F_B,1W1\n", r"line 2: has both 1B1 and 1W1"),
    ],
)
def test_what_is_not_a_schedule_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError, match=r"s\.csv.*" + complaint):
        Schedule.from_csv(tmp_path / "s.csv")


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GRID.replace("\n", "\r\n").encode() + b"\n",  # a spreadsheet's
        GRID.encode("utf-16"),
        b"\xfe\xff" + GRID.encode("utf-16-be"),
        GRID.replace("\n", "\r").encode(),
        (GRID + "\n").encode(),
        (GRID + " \n,,,\n;;\n\n").encode(),
        GRID.replace(",", ";").encode(),
        GRID.replace(",", "\t").encode("utf-16"),
        GRID.replace(",", " , ").replace("\n", ",,\n").encode(),
        b'"0F0","0F1","0B0","0B1"\n"1F0","1B0","1F1","1B1"',
        b'"0F0;0F1;0B0;0B1"\n"1F0;1B0;1F1;1B1"',
        GRID.lower().encode(),
        GRID.replace("0B0", "0RECV_B0,0b0").replace("1F0", "1recv_f0,1F0").encode(),
    ],
)
def test_what_spreadsheets_make_of_a_file_is_read(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s.csv").write_text(GRID)
    (tmp_path / "same").mkdir()
    (tmp_path / "same/s.csv").write_bytes(data)
    read = Schedule.from_csv(tmp_path / "same/s.csv")
    assert read == Schedule.from_csv(tmp_path / "s.csv") and read.microbatches == 2 and read.ranks == 2
    check(read)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_pairs_and_lanes_are_read_whatever_lies_between_the_cells(tmp_path: Path, separator: str) -> None:
    schedule = build("dualpipe", 4, 10)
    lines = [separator.join(f'"{cell}"' if m % 2 else str(cell).lower() for m, cell in enumerate(row)) for row in schedule.rows]
    (tmp_path / "dualpipe.csv").write_text("\n".join(lines))
    assert Schedule.from_csv(tmp_path / "dualpipe.csv") == schedule


@pytest.mark.parametrize("data", [GRID.encode("utf-16-le"), b"PK\x03\x04\xff\xfe", b"0F0,0B0\xe9", b"\xff\xfe0"])
def test_what_is_not_text_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s.csv").write_bytes(data)
    with pytest.raises(ValueError, match=r"s\.csv: is not text in UTF-8, or in UTF-16 with a byte-order mark"):
        Schedule.from_csv(tmp_path / "s.csv")


def test_what_torch_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dualpipe: has 2 lanes"):
        to_torch_csv(build("dualpipe", 2, 4), tmp_path / "s.csv")
    with pytest.raises(ValueError, match="1f1b: is forward-only"):
        to_torch_csv(build("1f1b", 2, 4, forward=True), tmp_path / "s.csv")


class _Block(nn.Module):
    def __init__(self, stage: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.one, self.two = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(torch.tanh(self.one(x)))


def _batch(microbatches: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2 * microbatches, 6, generator=generator), torch.randn(2 * microbatches, 6, generator=generator)


def _loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().mean()


def _run_in_torch(rank: int, folder: str, jobs: list[tuple[str, int, list[int], int]]) -> dict[tuple, dict[str, torch.Tensor]]:
    """Runs each (file name, stages, own stages by rank, micro-batches) in torch's runtime; returns the gradients of own stages."""
    gradients = {}
    for name, stages, table, microbatches in jobs:
        own = [s for s in range(stages) if table[s] == rank]
        blocks = {s: _Block(s) for s in own}
        parts = [PipelineStage(blocks[s], s, stages, torch.device("cpu")) for s in own]
        runtime = torch_schedules._PipelineScheduleRuntime(parts, microbatches, loss_fn=_loss, scale_grads=False)
        runtime._load_csv(f"{folder}/{name}.csv", format="compute_only")
        x, target = _batch(microbatches)
        runtime.step(*([x] if 0 in own else []), target=target if stages - 1 in own else None)
        for s, block in blocks.items():
            gradients[name, s] = {key: p.grad.clone() for key, p in block.named_parameters()}  # type: ignore[union-attr]
        # And back: what torch's lowering dumps is what we wrote.
        for form in ("compute_only", "compute_comms"):
            runtime._dump_csv(f"{folder}/{name}.{form}.{rank}.csv", format=form)  # type: ignore[arg-type]
    return gradients


@pytest.mark.parametrize("ranks, microbatches", [(2, 5), (3, 7)])
def test_torch_runs_our_schedules_and_finds_the_gradients_of_one_process(tmp_path: Path, ranks: int, microbatches: int) -> None:
    schedules = {name: build(name, ranks, microbatches) for name in ONE_LANE}
    for name, schedule in schedules.items():
        to_torch_csv(schedule, tmp_path / f"{name}.csv")
    jobs = [(name, s.placement.stages, list(s.placement.table[0]), microbatches) for name, s in schedules.items()]
    found: dict[tuple, dict[str, torch.Tensor]] = {}
    for part in run_ranks(_run_in_torch, ranks, str(tmp_path), jobs):
        found |= part

    for name, stages, _, _ in jobs:
        blocks = [_Block(s) for s in range(stages)]
        x, target = _batch(microbatches)
        for m in range(microbatches):
            _loss(nn.Sequential(*blocks)(x[2 * m : 2 * m + 2]), target[2 * m : 2 * m + 2]).backward()
        for s, block in enumerate(blocks):
            for key, parameter in block.named_parameters():
                assert parameter.grad is not None and parameter.grad.norm() > 0
                error = (found[name, s][key] - parameter.grad).norm() / parameter.grad.norm()
                assert error < 1e-5, (name, s, key)
        for form in ("compute_only", "compute_comms"):
            again = Schedule.from_csv(tmp_path / f"{name}.{form}.0.csv")
            assert (again.placement, again.rows) == (schedules[name].placement, schedules[name].rows)


def _dump_torch_schedules(rank: int, folder: str, microbatches: int) -> None:
    for name in ("ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble", "ScheduleDualPipeV"):
        kind = getattr(torch_schedules, name)
        style = "loop" if "Interleaved" in name else "v"
        stages = [s for s in range(4) if ([0, 1, 0, 1] if style == "loop" else [0, 1, 1, 0])[s] == rank]
        parts = [PipelineStage(_Block(s), s, 4, torch.device("cpu")) for s in stages]
        schedule = kind(parts, microbatches, loss_fn=_loss)
        if rank == 0:
            for form in ("compute_only", "compute_comms"):
                schedule._dump_csv(f"{folder}/{name}.{form}.csv", format=form)


def test_torch_schedules_load_check_and_compile_here(tmp_path: Path) -> None:
    run_ranks(_dump_torch_schedules, 2, str(tmp_path), 6)
    files = sorted(tmp_path.glob("*.csv"))
    assert len(files) == 8
    for file in files:
        schedule = Schedule.from_csv(file)
        assert schedule.placement.kind == ("looped" if "Interleaved" in file.name else "v")
        assert schedule.microbatches == 6
        check(schedule)
        compile(schedule)
    only, comms = (Schedule.from_csv(tmp_path / f"ScheduleDualPipeV.{form}.csv") for form in ("compute_only", "compute_comms"))
    assert only.rows == comms.rows
