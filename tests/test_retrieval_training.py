"""Training on samples whose labels are masked: the mean is over those that count in every layout, accuracy too, and runs resume."""

import json

import preloaded  # noqa: F401
import pytest
import torch
from one_step import watch_gradients
from processes import run_ranks
from tiny_model import tiny_config

from pipehc.data.batches import Sampler, batch
from pipehc.data.retrieval import Retrieval

SETTINGS = ("data.kind=retrieval", "data.pairs=3", "residual.alpha=0.3", "train.micro_batch=1", "evaluation.samples=8",
            "train.sequence_length=12")  # fmt: skip


class FewValues(Retrieval):
    """Labels are 0 to 3, so that chance hits some."""

    def __getitem__(self, index):
        tokens, labels = super().__getitem__(index)
        return tokens, torch.where(labels < 0, labels, labels % 4)


def trainer_of(*overrides):
    from pipehc.trainer import Trainer

    return Trainer(tiny_config(*SETTINGS, *overrides))


def one_step(rank, *overrides):
    """An evaluation of a model that chooses among five logits; and of a step: loss, gradient norm, gradients."""
    trainer, validation = trainer_of(*overrides), FewValues(7, "validation", 3, 12)
    last = [model.output_layer.weight for model in trainer.models.values() if model.last]
    kept = [weight.detach().clone() for weight in last]
    for weight in last:  # its rows from number 4 on, of which a rank may have a part
        weight.data[max(0, 4 - trainer.groups.tp_rank * len(weight)) :] = 0
    evaluation = trainer.evaluate(validation, 0)
    for weight, before in zip(last, kept):
        weight.data[:] = before
    split, gradients = Retrieval(7, "training", 3, 12), watch_gradients(trainer.optimizer)
    result = trainer.step(1, split, Sampler(len(split), seed=3))
    return evaluation, result.loss, result.grad_norm, gradients


@pytest.fixture(scope="module")
def alone():
    return run_ranks(one_step, 1)[0]


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, "parallel.pp=2 schedule.name=dualpipe recompute.enabled=true"),
        (2, "parallel.dp=2"),
        (2, "parallel.tp=2"),
        (1, "runtime.fused=false train.micro_batch=2"),
        pytest.param(4, "parallel.pp=2 parallel.ep=2 schedule.name=dualpipev", marks=pytest.mark.slow),
    ],
)
def test_layouts_equal_one_process(alone, processes, layout):
    evaluation, loss, norm, gradients = alone
    for found in run_ranks(one_step, processes, *layout.split()):
        assert found[0].loss == pytest.approx(evaluation.loss, rel=1e-6) and found[0].accuracy == evaluation.accuracy
        assert found[1] == pytest.approx(loss, rel=1e-6) and found[2] == pytest.approx(norm, rel=1e-5)
        for name, gradient in found[3].items():
            assert (gradient - gradients[name]).norm() <= 1e-4 * gradients[name].norm(), name
    assert 0 < evaluation.accuracy < 1


def test_means_are_over_the_labels_that_count():
    """Against autograd of this model with PyTorch's loss."""

    def fn(rank):
        trainer, split = trainer_of(), Retrieval(7, "training", 3, 12)
        (model,) = trainer.models.values()
        tokens, labels = batch(split, Sampler(len(split), seed=3), 0, 8)
        counted = labels >= 0
        assert counted.sum() == 8 * 3
        hidden = model.embed(tokens)
        for layer in model.decoder.layers.values():
            hidden, _ = layer(hidden)
        logits = model._logits(hidden).transpose(0, 1)[counted]
        expected = torch.nn.functional.cross_entropy(logits, labels[counted])
        hits = int((logits.argmax(-1) == labels[counted]).sum())
        expected.backward()
        trainer.optimizer.reduce_gradients()
        norm = torch.stack([gradient.norm() for gradient in trainer.optimizer.gradients().values()]).norm()

        class Drawn(Retrieval):
            def __getitem__(self, index):
                return tokens[index], labels[index]

        found = trainer.evaluate(Drawn(7, "training", 3, 12), 0)
        assert found == (pytest.approx(float(expected), rel=1e-6), hits / 24)
        right = labels.clone()
        right[counted] = logits.argmax(-1)
        labels, wrong = right, labels
        assert trainer.evaluate(Drawn(7, "training", 3, 12), 0).accuracy == 1
        labels = wrong
        result = trainer.step(1, split, Sampler(len(split), seed=3))
        assert (result.loss, result.grad_norm) == pytest.approx((float(expected), float(norm)), rel=1e-5)

    run_ranks(fn, 1)


def run(rank, folder, *overrides):
    from pipehc.train import run

    more = "model.blocks=2", "evaluation.interval=2", "checkpoint.interval=2", "optimizer.warmup_steps=0", "optimizer.decay=[]"
    assert run(tiny_config(*SETTINGS, *more, f"run.folder={folder}", *overrides)) == 0
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_tells_its_accuracy(tmp_path, capfd):
    figures = "step", "loss", "grad_norm", "val_loss", "val_accuracy"
    runs = ("whole", 3), ("part", 2), ("part", 3)
    lines = [run_ranks(run, 1, tmp_path / name, f"train.steps={steps}", init=False)[0] for name, steps in runs]
    whole, _, resumed = ([{name: line.get(name) for name in figures} for line in found] for found in lines)
    assert resumed == whole and [line["step"] for line in whole] == [0, 1, 2, 3]
    accuracies = [line["val_accuracy"] for line in whole]
    assert accuracies[1] is None and all((24 * accuracies[step]).is_integer() for step in (0, 2, 3))
    said = capfd.readouterr().out
    assert "retrieval of 3 values by their keys" in said and "going on after step 2 of 3" in said and "  accuracy " in said
