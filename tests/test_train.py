"""The command itself, under torchrun: trains, resumes bit for bit, survives killed ranks, refuses what cannot work."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import preloaded  # noqa: F401
import psutil
import pytest
import yaml
from processes import run_ranks

from pipehc.config.loading import ConfigError, load_config
from pipehc.train import main, may_come_of_empty_tokens, own_gpu

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = {
    "model": {
        "vocab_size": 256, "hidden_size": 16, "blocks": 4, "dense_blocks": 1, "heads": 2, "head_dim": 8, "rope_dim": 4,
        "kv_rank": 8, "expert_ffn_size": 8, "dense_ffn_size": 16, "experts": 4, "experts_active": 2, "experts_shared": 1,
    },
    "residual": {"kind": "mhc", "streams": 2},
    "parallel": {"pp": 2},
    "schedule": {"name": "dualpipe"},
    "train": {"steps": 6, "sequence_length": 16, "micro_batch": 1, "global_batch": 4},
    "optimizer": {"lr": 1e-3, "warmup_steps": 2},
    "evaluation": {"interval": 3, "samples": 4},
    "checkpoint": {"interval": 2, "keep": 2},
    "runtime": {"timeout_s": 20},
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few documents, so that no run has to read the whole standard library."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * 20)
    return folder


@pytest.fixture
def write(tmp_path, text):
    def config(**sections):
        merged = {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in TINY | sections}
        merged["data"] = {"paths": [str(text)], **merged.get("data", {})}
        merged["run"] = {"folder": str(tmp_path / "run"), **merged.get("run", {})}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(merged))
        return path

    return config


def command(config, *overrides, processes=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = launcher if processes > 1 else [sys.executable]
    return [*start, "-m", "pipehc.train", "--config", str(config), *overrides]


def train(*args, timeout=180, **kwargs):
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=ENVIRONMENT)


def train_here(*arguments, processes=1):
    """The same without torchrun, by children that need not import anything."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")

        def rank(_):
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            os.environ["TORCHELASTIC_RUN_ID"] = Path(folder).name  # what all say is said once
            logging.getLogger().handlers.clear()  # pytest's
            code = main(["--config", *map(str, arguments)])
            sys.stdout.flush()
            sys.stderr.flush()
            return code

        (code,) = set(run_ranks(rank, processes, init=False, timeout=180))
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


def our_part(errors):
    """What the processes wrote before torchrun's own report of their end."""
    return errors.split("torch/distributed/elastic/")[0]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return {line["step"]: line["loss"] for line in metrics(folder) if "loss" in line}


@pytest.mark.slow
def test_trains_resumes_and_carries_over_to_other_layouts(write, tmp_path):
    """One uninterrupted run; one stopped half-way and resumed, through host memory: equal bits. Its checkpoint goes on in two other
    layouts."""
    config = write()
    whole = train_here(config, f"run.folder={tmp_path / 'whole'}", processes=2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "best validation loss" in whole.stdout and str(tmp_path / "whole") in whole.stdout
    lines = metrics(tmp_path / "whole")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert all({"loss", "grad_norm", "lr", "tokens_per_s"} <= line.keys() for line in lines[1:])
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 6]
    assert yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["train"]["steps"] == 6

    part = tmp_path / "part"
    assert train_here(config, f"run.folder={part}", "train.steps=4", "optimizer.decay=[]", processes=2).returncode == 0
    resumed = train_here(config, f"run.folder={part}", "runtime.transport=host", processes=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "going on after step 4" in resumed.stdout
    assert losses(part) == losses(tmp_path / "whole")

    other_model = train_here(config, f"run.folder={part}", "residual.exit=sum", "train.steps=7", processes=2)
    ours = other_model.stderr
    assert ours.count("configuration error") == 1 and "residual.exit: 'mean' in the checkpoint, now 'sum'" in ours, ours
    assert other_model.returncode == 2 and "Traceback" not in ours and losses(part) == losses(tmp_path / "whole")

    checkpoint = next(path for path in (tmp_path / "whole" / "checkpoints").iterdir() if path.name.endswith("4"))
    for processes, overrides in ((2, ["schedule.name=1f1b"]), (1, ["schedule.name=1f1b", "parallel.pp=1"])):
        folder = tmp_path / f"over-{processes}"
        other = train_here(config, f"run.folder={folder}", f"checkpoint.resume={checkpoint}", *overrides, processes=processes)
        assert other.returncode == 0, other.stderr[-3000:]
        assert losses(folder) == pytest.approx({step: losses(tmp_path / "whole")[step] for step in (5, 6)}, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_and_it_resumes(write, tmp_path, victim):
    config = write(train={**TINY["train"], "steps": 60}, checkpoint={"interval": 5, "keep": 2})
    folder = tmp_path / "run"
    job = subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 12:
            assert time.monotonic() < deadline and job.poll() is None, job.communicate()
            time.sleep(0.05)
        ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == str(victim)]
        killed = time.monotonic()
        ranks[0].send_signal(signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert time.monotonic() - killed < 60
    assert job.returncode != 0
    assert errors.count("pipehc: rank") == 1, errors
    assert "in step" in errors or "saving" in errors or "evaluation" in errors, errors
    assert "Traceback" not in our_part(errors), errors

    # A checkpoint that lost a file is skipped with a warning.
    newest = max((folder / "checkpoints").glob("step-*"))
    next(newest.glob("*.distcp")).unlink()
    again = train_here(config, "train.steps=14", "checkpoint.keep=3", processes=2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert newest.name in again.stdout + again.stderr
    first = metrics(folder)
    undisturbed = train_here(config, "train.steps=14", f"run.folder={tmp_path / 'undisturbed'}", processes=2)
    assert undisturbed.returncode == 0
    assert {line["step"]: line["loss"] for line in first if "loss" in line} == losses(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_new_start_sets_aside_what_lies_there(write, tmp_path):
    alone = ["schedule.name=1f1b", "parallel.pp=1", "train.steps=2", "optimizer.decay=[]"]
    folder = tmp_path / "run"
    config = write()
    assert train_here(config, *alone).returncode == 0
    first = (folder / "metrics.jsonl").read_text()
    assert train_here(config, *alone, "train.seed=5", "checkpoint.resume=never").returncode == 0
    assert (folder / "metrics-1.jsonl").read_text() == first
    assert [path.name for path in (folder / "checkpoints-1").iterdir()] == ["step-00000002"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]

    # The checkpoints that lie here now are not those of a run that starts from somewhere else either.
    start = f"checkpoint.resume={folder / 'checkpoints-1' / 'step-00000002'}"
    result = train_here(config, *alone, "train.steps=4", start)
    assert result.returncode == 0 and "going on after step 2 of 4" in result.stdout
    assert (folder / "checkpoints-2" / "step-00000002").is_dir() and (folder / "metrics-2.jsonl").exists()
    assert list(losses(folder)) == [3, 4]


@pytest.mark.slow
def test_weights_alone_start_a_training_of_their_own(write, tmp_path):
    """The first evaluation is the last of the other run, whatever the optimizer, the order and the length of samples will be."""
    alone = ["schedule.name=1f1b", "parallel.pp=1", "train.steps=2", "evaluation.interval=2"]
    config = write()
    assert train_here(config, *alone).returncode == 0
    before = {line["step"]: line["val_loss"] for line in metrics(tmp_path / "run") if "val_loss" in line}
    weights = f"checkpoint.weights={tmp_path / 'run' / 'checkpoints' / 'step-00000002'}"
    new = tmp_path / "new"
    start = [*alone, f"run.folder={new}", weights, "train.seed=5", "optimizer.lr=1e-4"]
    result = train_here(config, *start)
    assert result.returncode == 0 and "starting with the weights of" in result.stdout, result.stderr
    after = {line["step"]: line["val_loss"] for line in metrics(new) if "val_loss" in line}
    assert after[0] == before[2] != before[0] and list(losses(new)) == [1, 2]
    result = train_here(config, *start, "train.steps=3")  # goes on with its own
    assert result.returncode == 0 and "going on after step 2 of 3" in result.stdout and list(losses(new)) == [1, 2, 3]
    longer = [*alone, f"run.folder={tmp_path / 'longer'}", "train.sequence_length=32"]
    result = train_here(config, *longer, weights.replace("checkpoint.weights", "checkpoint.resume"))
    assert result.returncode == 2 and "train.sequence_length: 16 in the checkpoint, now 32" in result.stderr, result.stderr
    assert "checkpoint.weights=" in result.stderr
    assert train_here(config, *longer, weights).returncode == 0


@pytest.mark.slow
def test_torchrun_restarts_a_run_where_it_stood(write, tmp_path):
    """...not where it had started from."""
    alone = ["schedule.name=1f1b", "parallel.pp=1", "evaluation.interval=0", "optimizer.decay=[]"]
    config, folder = write(), tmp_path / "again"
    assert train_here(config, *alone, "train.steps=2").returncode == 0
    start = f"checkpoint.resume={tmp_path / 'run' / 'checkpoints' / 'step-00000002'}"
    launch = command(config, *alone, start, f"run.folder={folder}", "train.steps=40")
    launch[3:5] = ["--standalone", "--nproc-per-node=1", "--max-restarts=1"]
    job = subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 120
        while not list((folder / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline and job.poll() is None, job.communicate()
            time.sleep(0.01)
        ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == "0"]
        ranks[0].send_signal(signal.SIGKILL)
        out, errors = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 0, errors
    assert out.count("going on after step") == 2 and out.count("going on after step 2 of 40") == 1, out
    assert list(losses(folder)) == list(range(3, 41)) and not (folder / "checkpoints-1").exists()


@pytest.mark.slow
def test_a_tokenizer_without_a_token_for_the_text_is_named_by_every_rank(write, tmp_path):
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"document": 0}, "unk_token": "[UNK]"},
                 "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}  # fmt: skip
    (tmp_path / "words.json").write_text(json.dumps(tokenizer))
    result = train_here(write(), f"data.tokenizer={tmp_path / 'words.json'}", processes=2)
    said = result.stderr
    assert said.count("configuration error") == 1 and "data.tokenizer: " in said and "no token for '0'" in said, said
    assert "(in 0.txt)" in said and "Traceback" not in said and result.returncode == 2


@pytest.mark.slow
def test_a_full_disk_ends_the_job_with_one_message(write, tmp_path):
    """A limit on the size of files stands for it: metrics fit, a checkpoint does not."""
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash", *command(write())]
    result = subprocess.run(limited, capture_output=True, text=True, timeout=120, cwd=ROOT, env=ENVIRONMENT)
    errors = our_part(result.stderr)
    assert result.returncode != 0
    assert errors.count("pipehc: rank") == 1 and "saving the checkpoint of step 2" in errors and "too large" in errors, errors
    assert "Traceback" not in errors, errors
    assert list(losses(tmp_path / "run")) == [1, 2]


@pytest.mark.slow
def test_ranks_end_when_torchrun_is_killed(write, tmp_path):
    """Nobody could stop them any more, and the job started again would write into the same folder."""
    config = write(train={**TINY["train"], "steps": 100000}, checkpoint={"interval": 0}, evaluation={"interval": 0})
    job = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(metrics(tmp_path / "run")) < 3:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    ranks = psutil.Process(job.pid).children(recursive=True)
    second = train_here(config, "schedule.name=1f1b", "parallel.pp=1")
    job.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for process in alive:
        process.kill()
    assert not alive
    errors = job.communicate()[1]
    assert errors.count("pipehc: rank") == 1 and "torchrun is gone" in errors, errors
    assert second.returncode == 2 and "another training runs there" in second.stderr, second.stderr


def test_broken_configurations_under_torchrun(write):
    """Every process exits with 2 and one of them speaks; torchrun's own report follows."""
    result = train(write(), "parallel.pp=3", "model.blocks=6", timeout=60)
    assert result.returncode != 0
    ours = our_part(result.stderr)
    assert ours.count("configuration error") == 1 and "parallel.pp: 3" in ours, result.stderr
    assert "Traceback" not in ours, ours
    assert "exitcode  : 2" in result.stderr, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.global_batch=2"], "train.global_batch: 2"),
        (["parallel.pp=4", "train.global_batch=8"], "number of processes"),
        (["data.paths=[/nowhere]"], "data.paths: '/nowhere'"),
        (["train.stepz=3"], "train.stepz"),
        (["train.sequence_length=100000"], "sequence_length"),
    ],
)
def test_broken_configurations_on_several_processes(write, overrides, said):
    result = train_here(write(), *overrides, processes=2)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("configuration error") == 1 and said in result.stderr, result.stderr


def test_processes_share_a_gpu_only_where_messages_go_through_host_memory(write):
    config = load_config(write())
    host = load_config(write(), ["runtime.transport=host"])
    ranks = [{"LOCAL_RANK": str(k), "LOCAL_WORLD_SIZE": "4"} for k in range(4)]
    assert [own_gpu(config, rank, 4) for rank in ranks] == [0, 1, 2, 3]
    assert [own_gpu(host, rank, 1) for rank in ranks] == [0] * 4 and [own_gpu(host, rank, 3) for rank in ranks] == [0, 1, 2, 0]
    for rank in ranks:  # all of them: those with a GPU would wait for the others
        with pytest.raises(ConfigError, match=r"runtime.transport: device: 4 processes on a machine with 1 GPU; must be host"):
            own_gpu(config, rank, 1)
    assert own_gpu(config, {"LOCAL_RANK": "0"}, 1) == 0  # without torchrun


def test_a_loss_that_is_not_finite_stops_before_the_update(write, tmp_path):
    config = write()
    result = train(config, "optimizer.lr=1e30", "optimizer.warmup_steps=0", "optimizer.clip_grad=0")
    assert result.returncode != 0
    assert result.stderr.count("pipehc: rank") == 1
    assert "step 2" in result.stderr and "rank" in result.stderr, result.stderr
    assert 2 not in losses(tmp_path / "run")


def test_a_gradient_norm_that_only_empty_tokens_give_is_told_with_its_remedy():
    mhc = load_config(ROOT / "configs" / "cpu_demo.yaml", [])
    bounded = load_config(ROOT / "configs" / "cpu_demo.yaml", ["residual.norm_eps=1e-6"])
    plain = load_config(ROOT / "configs" / "cpu_demo.yaml", ["residual.kind=none"])
    assert may_come_of_empty_tokens(1e9, mhc) and not may_come_of_empty_tokens(50.0, mhc)
    assert not may_come_of_empty_tokens(1e9, bounded) and not may_come_of_empty_tokens(1e9, plain)
