"""The planner: figures of the paper, agreement with the schedules, and that it stays light."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipehc.config.loading import load_config
from pipehc.config.schema import Config
from pipehc.plan import main, plan
from pipehc.planning import parameters
from pipehc.planning.notes import human, live_microbatches
from pipehc.schedules import build

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "cpu_demo.yaml"


@pytest.mark.parametrize(
    ("name", "total", "active", "vocabulary"),
    [
        ("3b", "2.97B", "612M", "331M"),
        ("9b", "9.18B", "1.66B", "496M"),
        ("27b_pp8", "27.0B", "4.14B", "662M"),
        ("3b_1t", "2.97B", "612M", "331M"),
    ],
)
def test_the_papers_figures(name: str, total: str, active: str, vocabulary: str) -> None:
    counts = plan(load_config(ROOT / "configs" / f"{name}.yaml"))["parameters"]
    assert all(type(count) is int for count in counts.values())
    assert (human(counts["total"]), human(counts["active"]), human(counts["vocabulary"])) == (total, active, vocabulary)


def _shapes(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """Every parameter of the model as (kind, shape), written down module by module rather than in closed form."""
    m, n = config.model, config.residual.streams
    C, H = m.hidden_size, m.heads
    found: list[tuple[str, tuple[int, ...]]] = [
        ("embedding", (m.vocab_size, C)),
        ("head", (m.vocab_size, C)),
        ("final norm", (C,)),
    ]
    found += [("hidden and embedding", (C, 2 * C)), ("their norms, and of the result", (3 * C,))] * m.mtp_depth
    for block in [*range(m.blocks), *[m.blocks - 1] * m.mtp_depth]:
        found += [
            ("norm", (C,)),
            ("norm", (C,)),
            ("q", (H * (m.head_dim + m.rope_dim), C)),
            ("kv down", (m.kv_rank + m.rope_dim, C)),
        ]
        found += [("kv norm", (m.kv_rank,)), ("kv up", (H * 2 * m.head_dim, m.kv_rank)), ("out", (C, H * m.head_dim))]
        if config.residual.kind == "mhc":
            found += [
                ("phi", (n * C, n)),
                ("phi", (n * C, n)),
                ("phi", (n * C, n * n)),
                ("b", (n * n + 2 * n,)),
                ("alpha", (3,)),
            ] * 2
        if block < m.dense_blocks:
            found += [("gate", (m.dense_ffn_size, C)), ("up", (m.dense_ffn_size, C)), ("down", (C, m.dense_ffn_size))]
        else:
            shared = m.experts_shared * m.expert_ffn_size
            found += [("router", (m.experts, C)), ("gate", (shared, C)), ("up", (shared, C)), ("down", (C, shared))]
            for _ in range(m.experts):
                found += [
                    ("expert", (m.expert_ffn_size, C)),
                    ("expert", (m.expert_ffn_size, C)),
                    ("expert", (C, m.expert_ffn_size)),
                ]
    return found


def _count(shapes: list[tuple[str, tuple[int, ...]]]) -> int:
    total = 0
    for _, shape in shapes:
        size = 1
        for dimension in shape:
            size *= dimension
        total += size
    return total


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "residual.kind=none",
        "residual.streams=3 model.rope_dim=6 model.head_dim=5 model.kv_rank=7 model.experts_shared=3",
        "model.dense_blocks=8 model.experts=0 model.experts_active=0",
        "model.dense_blocks=0 model.experts_shared=0",
        "model.mtp_depth=2",
        "model.mtp_depth=1 residual.kind=none model.dense_blocks=8",
    ],
)
def test_counts_equal_a_list_of_shapes(overrides: str) -> None:
    config = load_config(DEMO, overrides.split())
    shapes = _shapes(config)
    assert parameters.total(config) == _count(shapes)
    assert parameters.vocabulary(config) == _count([s for s in shapes if s[0] in ("embedding", "head")])
    experts = _count([s for s in shapes if s[0] == "expert"])
    used = experts * config.model.experts_active // max(1, config.model.experts)
    embedding = config.model.vocab_size * config.model.hidden_size
    assert parameters.active(config) == _count(shapes) - embedding - experts + used


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("ep", [1, 2])
def test_ranks_add_up(schedule: str, ep: int) -> None:
    config = load_config(DEMO, [f"schedule.name={schedule}", f"parallel.ep={ep}", "train.global_batch=64", "model.blocks=9"])
    m = config.model
    experts = m.moe_blocks * m.experts * 3 * m.hidden_size * m.expert_ffn_size
    once = parameters.total(config) - experts + experts // ep
    result = plan(config)
    assert sum(row["parameters"] for row in result["per_stage"]) == parameters.total(config) == result["parameters"]["total"]
    assert sum(row["parameters"] for row in result["per_rank"]) == once * (2 if schedule == "dualpipe" else 1)
    for row in result["per_stage"]:
        assert all(row["stage"] in result["per_rank"][rank]["stages"] for rank in row["ranks"])
        assert len(row["ranks"]) == (2 if schedule == "dualpipe" else 1)
    assert [row["blocks"][1] - row["blocks"][0] + 1 for row in result["per_stage"]] == [len(b) for b in config.stage_blocks()]


def test_depth_modules_have_the_embedding_once_more_where_another_stage_has_it() -> None:
    deep = ["model.mtp_depth=1", "schedule.name=1f1b"]
    one, four = (load_config(DEMO, [*deep, f"parallel.pp={pp}"]) for pp in (1, 4))
    assert parameters.total(one) == parameters.total(four) == sum(parameters.ranks(one))
    assert sum(parameters.ranks(four)) - parameters.total(four) == four.model.vocab_size * four.model.hidden_size
    twice = load_config(DEMO, ["model.mtp_depth=1"])
    assert sum(parameters.ranks(twice)) == 2 * sum(parameters.ranks(four))


@pytest.mark.parametrize(
    ("schedule", "ranks", "microbatches"), [("1f1b", 4, 8), ("1f1b", 4, 2), ("dualpipe", 4, 8), ("dualpipev", 4, 11)]
)
def test_live_microbatches_are_the_schedules(schedule: str, ranks: int, microbatches: int) -> None:
    config = load_config(
        DEMO,
        [f"schedule.name={schedule}", f"parallel.pp={ranks}", f"train.global_batch={4 * microbatches}", "evaluation.interval=0"],
    )
    for cells, said in zip(build(schedule, ranks, microbatches).rows, live_microbatches(config, 1), strict=True):
        live = peak = 0
        for cell in cells:
            # A pair is a forward and a backward that run at the same time.
            kinds = [cell.kind] if hasattr(cell, "kind") else [action.kind for action in cell]
            live += kinds.count("F")
            peak = max(peak, live)
            live -= kinds.count("B") + kinds.count("W")
        assert live == 0 and peak == said


def test_without_dp_the_smallest_is_assumed() -> None:
    result = plan(load_config(DEMO, ["parallel.ep=2", "train.global_batch=64"]))
    assert result["parallel"] == {"pp": 4, "tp": 1, "ep": 2, "dp": 2, "dp_assumed": True}
    assert (result["world_size"], result["microbatches"], result["stages"]) == (8, 8, 4)
    assert result["message_bytes"] == 4 * 128 * 4 * 128 * 4


def test_tensor_parallelism_cuts_parameters_messages_and_what_is_kept() -> None:
    alone, cut = (plan(load_config(DEMO, ["recompute.enabled=true", *more])) for more in ([], ["parallel.tp=2", "parallel.ep=2"]))
    assert cut["world_size"] == 8 and cut["parallel"] == alone["parallel"] | {"tp": 2, "ep": 2}
    assert cut["parameters"] == alone["parameters"] and 2 * cut["message_bytes"] == alone["message_bytes"]
    for before, now in zip(alone["per_stage"], cut["per_stage"]):
        assert now["parameters"] == before["parameters"]
        assert {name: 2 * size for name, size in now["saved_bytes"].items()} == before["saved_bytes"]
    # Norms, down-projections, routers and maps are on every rank; all else is cut.
    shared = sum(count.common for count in parameters.stages(load_config(DEMO)))
    halved, whole = (sum(rank["parameters"] for rank in p["per_rank"]) // 2 for p in (cut, alone))  # two replicas
    assert halved == (whole - shared) // 2 + shared


def test_notes_explain_this_configuration() -> None:
    notes = "\n".join(plan(load_config(ROOT / "configs" / "27b_pp8.yaml"))["notes"])
    # two replicas; 1.60B = (2.27 + 3.05)B with the experts cut over 8; P + 1; 6 = P - 2, 21 = 3 (P - 1) of 3 x 80
    for words in (
        "1.60B parameters a rank, against 818M under 1F1B",
        "up to 9 micro-batches",
        "9 x 80.0 MiB",
        "6 t of 246 t",
        "21 t of 261 t",
    ):
        assert words in notes
    assert "no stage exists twice" in "\n".join(plan(load_config(DEMO, ["schedule.name=dualpipev"]))["notes"])


def test_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(DEMO), "--json", "train.steps=20"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["parameters"]) == {"total", "active", "vocabulary"} and result["tokens"] == 20 * 32 * 128


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe", "dualpipev"])
def test_prints_tables(schedule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"schedule.name={schedule}", "--config", str(DEMO)]) == 0
    out = capsys.readouterr().out
    assert "2.56M total" in out and schedule in out and "micro-batches held" in out


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "absent.yaml"],
        ["--config", str(DEMO), "parallel.pp=3"],
        ["--config", str(DEMO), "parallel.ep=4"],
        ["--config", str(DEMO), "nonsense"],
        ["--config", str(ROOT)],
    ],
)
def test_bad_configuration_exits_2_with_one_message(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("configuration error: ")


@pytest.mark.parametrize("argv", [[], ["--config"], ["--config", str(DEMO), "--jsno"]])
def test_bad_command_line_exits_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_light_and_quick() -> None:
    script = (
        "import sys, pipehc.plan; code = pipehc.plan.main(sys.argv[1:]);"
        "heavy = {'torch', 'megatron', 'triton', 'numpy'} & set(sys.modules); sys.exit(code or str(heavy) if heavy else code)"
    )
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", script, "--config", str(ROOT / "configs" / "27b_pp8.yaml"), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    elapsed = time.monotonic() - start
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout)["parameters"]["total"] == 27048293460
    assert elapsed < 5


def test_module_runs_and_reports_without_traceback() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pipehc.plan", "--config", str(DEMO), "model.heads=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.count("\n") == 1 and "model.heads: 0: must be greater than 0" in run.stderr


def test_three_digits() -> None:
    assert [human(n) for n in (7, 999, 1000, 65536, 999499, 999500, 27.04e9, 1.05e12)] == [
        "7",
        "999",
        "1.00K",
        "65.5K",
        "999K",
        "1.00M",
        "27.0B",
        "1.05T",
    ]
