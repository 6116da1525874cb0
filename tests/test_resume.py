"""Where a training starts, over checkpoints without a model: what wins, what is refused and in which words, what is set aside."""

import os
from pathlib import Path
from typing import Any

import preloaded  # noqa: F401
import pytest
import torch
from config_cases import DEMO
from processes import run_ranks

from pipehc.checkpoint.store import Checkpoints
from pipehc.comm.ranks import Ranks
from pipehc.config.loading import load_config, to_yaml
from pipehc.config.schema import Config
from pipehc.config.strict_yaml import ConfigError
from pipehc.data.batches import DataInfo
from pipehc.resume import Start, choose, load, make_room

DATA = DataInfo("bytes", 1, 1, 1, "documents", (), "data 1", False, "bytes")
OTHER_DATA = DATA._replace(fingerprint="data 2")


class Run:
    """Starts a training in `folder` and saves steps as `pipehc.train` does."""

    def __init__(self, folder: Path, *overrides: str, data: DataInfo = DATA) -> None:
        self.config: Config = load_config(DEMO, [f"run.folder={folder}", *overrides])
        self.data, ranks = data, Ranks()
        self.checkpoints = Checkpoints(folder / "checkpoints", 2)
        self.start: Start = choose(self.config, self.checkpoints, data, ranks)
        make_room(self.start, self.config, self.checkpoints, ranks)

    def save(self, *steps: int, **changed: Any) -> "Run":
        extra = {"data": self.data.fingerprint, "vocabulary": self.data.vocabulary, "starts": self.start.state(), "samples": 1,
                 "feedback": {"s": 1.0, "average": None}, "config": to_yaml(self.config), **changed}  # fmt: skip
        for step in steps:
            self.checkpoints.save(step, {"weights.x": torch.tensor(step)}, {k: v for k, v in extra.items() if v != "none"})
            for name in ("metrics.jsonl", "diagnostics.jsonl"):
                with open(self.checkpoints.folder.parent / name, "a") as file:
                    file.write(f'{{"step": {step}}}\n')
        return self

    @property
    def source(self) -> tuple[str, str] | None:
        """The run and the name of the checkpoint to load."""
        return self.start.path and (self.start.path.parts[-3], self.start.path.name)


def refused(folder: Path, *overrides: str, data: DataInfo = DATA) -> str:
    with pytest.raises(ConfigError) as caught:
        Run(folder, *overrides, data=data)
    return str(caught.value)


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step-{number:08d}"


def test_auto_goes_on_where_the_run_stood(tmp_path: Path) -> None:
    assert Run(tmp_path / "a").save(2, 4).source is None
    again = Run(tmp_path / "a", "train.steps=300", "parallel.pp=2", "optimizer.lr=0.1")
    assert again.source == ("a", "step-00000004") and again.start.own
    assert again.start.notes == ("changed since the checkpoint: train.steps: 200 -> 300, optimizer.lr: 0.003 -> 0.1",)


def test_what_a_run_has_saved_since_it_started_from_a_checkpoint_wins_over_that(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    Run(a).save(2, 4)
    wish = f"checkpoint.resume={step(a, 4)}"
    assert Run(b, wish).source == ("a", "step-00000004")  # and dies before it has saved anything
    assert Run(b, wish).save(6).source == ("a", "step-00000004")
    for _ in range(2):
        restarted = Run(b, wish)
        assert restarted.source == ("b", "step-00000006") and "this run started there" in restarted.start.notes[0]
    restarted.save(8)
    assert Run(b, wish).source == ("b", "step-00000008")
    assert Run(b).save(10).source == ("b", "step-00000008")  # auto in between
    assert Run(b, wish).source == ("b", "step-00000010")
    assert not (b / "checkpoints-1").exists()
    (tmp_path / "link").symlink_to(a)
    assert Run(b, f"checkpoint.resume={step(tmp_path / 'link', 4)}").source == ("b", "step-00000010")
    a.rename(tmp_path / "moved")
    assert Run(b, f"checkpoint.resume={step(tmp_path / 'moved', 4)}").source == ("b", "step-00000010")  # the same content
    assert Run(b, wish).source == ("b", "step-00000010")  # the same place, though nothing is there any more
    assert Run(tmp_path / "c", f"checkpoint.resume={step(b, 10)}").save(12).start.path == step(b, 10)
    assert Run(tmp_path / "c", wish).source == ("c", "step-00000012")  # by way of b


def test_another_course_is_set_aside(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    Run(a).save(2, 4)
    Run(b).save(6)
    fresh = Run(b, f"checkpoint.resume={step(a, 4)}")
    assert fresh.source == ("a", "step-00000004") and (b / "checkpoints-1" / "step-00000006").is_dir()
    fresh.save(5)
    assert Run(b, f"checkpoint.resume={step(a, 2)}").source == ("a", "step-00000002")  # another start
    assert (b / "checkpoints-2" / "step-00000005").is_dir()
    assert len(list(b.glob("metrics-*.jsonl"))) == 2 == len(list(b.glob("diagnostics-*.jsonl")))


def test_going_back_in_a_run_loses_nothing_and_is_not_repeated(tmp_path: Path) -> None:
    a = tmp_path / "a"
    Run(a).save(2, 4)
    wish = f"checkpoint.resume={step(a, 2)}"
    back = Run(a, wish)
    assert back.source == ("a", "step-00000002")
    assert (a / "checkpoints-1" / "step-00000004").is_dir() and (a / "metrics-1.jsonl").read_text().count("step") == 2
    assert (a / "diagnostics-1.jsonl").read_text() == (a / "metrics-1.jsonl").read_text()
    back.save(3, 5, 7)  # step 2 is pruned by now
    assert not step(a, 2).exists()
    assert Run(a, wish).source == ("a", "step-00000007")


def test_never_starts_anew_once_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = tmp_path / "a"
    Run(a).save(2)
    never = "checkpoint.resume=never"
    assert Run(a, never).save(3).source is None
    assert Run(a, never).save(4).source is None and (a / "checkpoints-2" / "step-00000003").is_dir()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert Run(a, never).source is None  # a new job: anew
    assert Run(a, never).save(6).source is None  # restarted before it had saved
    assert Run(a, never).source == ("a", "step-00000006")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert Run(a, never).source is None


def test_weights_alone(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    Run(a).save(2, 4)
    wish = f"checkpoint.weights={step(a, 4)}"
    longer = ["train.sequence_length=256", "optimizer.lr=1e-4", "train.seed=7"]
    run = Run(b, wish, *longer, data=OTHER_DATA)
    assert run.source == ("a", "step-00000004") and run.start.weights_only
    assert run.start.notes == (f"starting with the weights of {step(a, 4)}, as they were after step 4",)
    run.save(1, 3)
    again = Run(b, wish, *longer, data=OTHER_DATA)
    assert again.source == ("b", "step-00000003") and not again.start.weights_only
    said = refused(b, f"checkpoint.weights={step(a, 2)}", *longer, data=OTHER_DATA)
    assert "did not start there" in said and "checkpoint.resume=never" in said and "at step 3" in said
    assert Run(b, f"checkpoint.weights={step(a, 2)}", "checkpoint.resume=never", *longer, data=OTHER_DATA).start.weights_only
    assert (b / "checkpoints-1" / "step-00000003").is_dir()
    inside = b / "checkpoints-1" / ".." / "checkpoints" / "step-00000003"
    said = refused(b, f"checkpoint.weights={inside}", "checkpoint.resume=never")
    assert "lies in the run folder itself" in said
    said = refused(tmp_path / "c", wish, "residual.exit=sum")
    assert "residual.exit: 'mean' in the checkpoint, now 'sum'" in said and "checkpoint.allow_changes=[residual.exit]" in said
    said = refused(tmp_path / "c", wish, data=OTHER_DATA._replace(vocabulary="other"))
    assert "other tokens" in said and "data.tokenizer" in said
    allowed = Run(tmp_path / "c", wish, "checkpoint.allow_changes=[data.tokenizer]", data=OTHER_DATA._replace(vocabulary="other"))
    assert "data.tokenizer" in allowed.start.notes[1]


@pytest.mark.parametrize("key, before, now", [
    ("residual.kind", "'mhc'", "hc"), ("model.experts_active", "2", "1"), ("model.rope_theta", "10000.0", "500000.0"),
    ("model.norm_eps", "1e-20", "1e-06"), ("residual.exit", "'mean'", "sum"), ("model.hidden_size", "128", "64"),
])  # fmt: skip
@pytest.mark.parametrize("how", ["auto", "path"])
def test_another_model_is_refused_by_key(tmp_path: Path, key: str, before: str, now: str, how: str) -> None:
    Run(tmp_path / "a").save(2)
    folder = tmp_path / ("a" if how == "auto" else "b")
    wish = [] if how == "auto" else [f"checkpoint.resume={step(tmp_path / 'a', 2)}"]
    said = refused(folder, f"{key}={now}", "model.init_std=1", "train.steps=300", *wish)
    assert f"{key}: {before} in the checkpoint, now " in said and now in said and f"checkpoint.allow_changes=[{key}]" in said
    assert "init_std" not in said and "train.steps" not in said and "checkpoint.resume: " in said
    allowed = Run(folder, f"{key}={now}", f"checkpoint.allow_changes=[{key}]", *wish)
    assert allowed.source == ("a", "step-00000002") and f"{key}: {before} -> " in allowed.start.notes[0]
    allowed.save(3)
    assert Run(folder, f"{key}={now}").start.notes == ()  # from now on it is this model


def test_all_differences_are_listed(tmp_path: Path) -> None:
    Run(tmp_path / "a").save(2)
    said = refused(tmp_path / "a", "residual.exit=sum", "model.experts_active=1", "checkpoint.allow_changes=[residual.exit]")
    assert "residual.exit" not in said and "model.experts_active" in said
    said = refused(tmp_path / "a", "residual.exit=sum", "model.experts_active=1", "data.suffixes=[.c]", data=OTHER_DATA)
    assert "checkpoint.allow_changes=[model.experts_active, residual.exit, data.suffixes]" in said


def test_other_data_is_refused_with_its_cause(tmp_path: Path) -> None:
    Run(tmp_path / "a").save(2)
    said = refused(tmp_path / "a", "train.sequence_length=256", data=OTHER_DATA)
    assert "train.sequence_length: 128 in the checkpoint, now 256" in said and "checkpoint.weights=" in said
    said = refused(tmp_path / "a", data=OTHER_DATA)  # the files changed under the same names
    assert "data.paths: 'other content'" in said
    run = Run(tmp_path / "a", "checkpoint.allow_changes=[data.paths]", data=OTHER_DATA)
    assert run.source == ("a", "step-00000002")
    moved = Run(tmp_path / "a", "data.paths=[/elsewhere]", "train.seed=3")  # the same content
    assert moved.start.notes == ("changed since the checkpoint: data.paths: [] -> ['/elsewhere'], train.seed: 1234 -> 3",)


def test_checkpoints_of_others(tmp_path: Path) -> None:
    a = tmp_path / "a"
    Run(a).save(2, config="none", starts="none", vocabulary="none")  # an older version
    assert "taken on trust" in Run(a, "residual.exit=sum").start.notes[0]
    Run(a, "checkpoint.resume=never").save(4, samples="none")
    assert "was not written by this trainer: it lacks samples" in refused(a)
    said = refused(tmp_path / "b", f"checkpoint.resume={a}")
    assert f"it holds checkpoints, name one of them: {step(a, 4)}" in said
    for key in ("resume", "weights"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert f"checkpoint.{key}: " in refused(tmp_path / "b", f"checkpoint.{key}={tmp_path / 'empty'}")
        assert "no complete checkpoint" in refused(tmp_path / "b", f"checkpoint.{key}={tmp_path / 'nowhere'}")


def test_a_disk_that_is_not_there_does_not_make_a_run_start_over(tmp_path: Path) -> None:
    a = tmp_path / "a"
    a.mkdir()
    (a / "checkpoints").symlink_to("/nowhere/disk")
    assert "is a link to /nowhere/disk, which is not there" in refused(a)
    assert Run(a, "checkpoint.resume=never").save(2).source is None
    assert os.readlink(a / "checkpoints-1") == "/nowhere/disk"


def test_all_ranks_refuse_alike(tmp_path: Path) -> None:
    Run(tmp_path / "a").save(2)
    said = run_ranks(lambda rank: refused(tmp_path / "a", "residual.exit=sum"), 2)
    assert said[0] == said[1] and "residual.exit" in said[0]


class Feedback:
    loaded: Any = None

    def load(self, state: Any) -> None:
        self.loaded = state


class FakeTrainer:
    """What `load` needs of a trainer."""

    def __init__(self, **state: int) -> None:
        self.tensors = {name.replace("_", "."): torch.tensor(value) for name, value in state.items()}
        self.feedback, self.samples_seen = Feedback(), 0

    def state(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def after_load(self) -> None: ...

    def apply_feedback(self) -> None: ...


def test_weights_are_loaded_without_optimizer_step_and_samples(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    run.save(2)
    extra = {"data": "data 1", "samples": 64, "feedback": {"s": 0.5, "average": 2.0}, "config": to_yaml(run.config)}
    tensors = {"weights.x": torch.tensor(7), "buffers.b": torch.tensor(8), "optimizer.m": torch.tensor(9)}
    run.checkpoints.save(4, tensors, extra)
    whole = Run(tmp_path / "b", f"checkpoint.resume={step(tmp_path / 'a', 4)}")
    trainer: Any = FakeTrainer(weights_x=0, buffers_b=0, optimizer_m=0)
    assert load(whole.start, whole.checkpoints, trainer) == 4
    assert trainer.samples_seen == 64 and [int(t) for t in trainer.tensors.values()] == [7, 8, 9]
    alone = Run(tmp_path / "c", f"checkpoint.weights={step(tmp_path / 'a', 4)}")
    trainer = FakeTrainer(weights_x=0, buffers_b=0, optimizer_m=0)
    assert load(alone.start, alone.checkpoints, trainer) == 0
    assert trainer.samples_seen == 0 and [int(t) for t in trainer.tensors.values()] == [7, 8, 0]
    assert trainer.feedback.loaded == {"s": 0.5, "average": 2.0}
    for names, said in (("weights_x", "does not have: buffers.b"), ("weights_x buffers_b weights_y", "lacks weights.y")):
        trainer = FakeTrainer(**dict.fromkeys(names.split(), 0))
        with pytest.raises(ConfigError, match=said) as caught:
            load(alone.start, alone.checkpoints, trainer)
        assert str(caught.value).startswith("checkpoint.weights: ")
