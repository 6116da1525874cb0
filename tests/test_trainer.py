"""The trainer against plain autograd: which samples a step takes, the scale of its gradients, and what must not change anything."""

import preloaded  # noqa: F401
import pytest
import torch
from processes import run_ranks
from tiny_model import tiny_config

from pipehc.config.strict_yaml import ConfigError
from pipehc.data.batches import Sampler
from pipehc.learning_rate import learning_rate
from pipehc.megatron.trainer.model import buffer_names, parameter_names

SAMPLES, STEP = 23, 3  # the third step of eight samples crosses the end of the first epoch


class Split:
    """Random samples that every process makes alike; counts who asked for which."""

    def __init__(self):
        self.drawn = []

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.drawn.append(index)
        return torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(index))


def mean_loss(trainer, indices):
    """Mean cross entropy in nats per token, with its graph. One process, one stage."""
    (model,) = trainer.models.values()
    tokens = torch.stack([Split()[i] for i in indices])
    return model(None, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) / tokens[:, 1:].numel()


def test_a_step_descends_the_mean_loss_of_its_samples():
    def fn(rank):
        from pipehc.trainer import Trainer

        config = tiny_config("optimizer.warmup_steps=5")
        trainer, split, sampler = Trainer(config), Split(), Sampler(SAMPLES, seed=7)
        expected = [sampler.index(k) for k in range(8 * (STEP - 1), 8 * STEP)]
        loss = mean_loss(trainer, expected)
        loss.backward()
        trainer.optimizer.reduce_gradients()
        gradients = trainer.optimizer.gradients()
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        for model in trainer.models.values():
            for module in model.modules():
                if getattr(module, "expert_bias", None) is not None:
                    module.local_tokens_per_expert.zero_()

        found, step = {}, trainer.optimizer.step
        trainer.optimizer.step = lambda lr: found.update(trainer.optimizer.gradients()) or step(lr)
        trainer.samples_seen = 8 * (STEP - 1)
        result = trainer.step(STEP, split, sampler)
        assert sorted(set(split.drawn)) == sorted(set(expected))
        assert result.loss == pytest.approx(float(loss), rel=1e-6)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
        assert result.lr == learning_rate(STEP - 1, config) == pytest.approx(config.optimizer.lr * STEP / 5)
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name

    run_ranks(fn, 1)


@pytest.mark.parametrize("layout", [("schedule.name=1f1b",), ("schedule.name=dualpipe", "parallel.pp=2")])
def test_ranks_share_a_steps_samples_out_and_every_sample_comes_once_an_epoch(layout):
    def fn(rank):
        from pipehc.trainer import Trainer

        trainer, split, sampler = Trainer(tiny_config("train.micro_batch=1", *layout)), Split(), Sampler(SAMPLES, seed=7)
        drawn = []
        for step in (1, 2):
            split.drawn = []
            trainer.step(step, split, sampler)
            drawn.append(sorted(set(split.drawn)))
        return drawn

    ranks = run_ranks(fn, 4)
    pipelines = 2 if "parallel.pp=2" in layout else 4
    sampler = Sampler(SAMPLES, seed=7)
    for step in (0, 1):
        assert sorted(set().union(*(r[step] for r in ranks))) == sorted(sampler.index(k) for k in range(8 * step, 8 * step + 8))
        own = {tuple(r[step]) for r in ranks}
        assert len(own) == pipelines and sum(map(len, own)) == 8, own


def test_an_evaluation_is_the_mean_over_the_first_samples_and_changes_nothing():
    def fn(rank):
        from pipehc.trainer import Trainer

        trainer = Trainer(tiny_config("evaluation.samples=8"))
        (model,) = trainer.models.values()
        state = parameter_names(model) | buffer_names(model)
        before = {name: tensor.detach().clone() for name, tensor in state.items()}
        counts = [m.local_tokens_per_expert for m in model.modules() if hasattr(m, "expert_bias")]
        with torch.no_grad():
            expected = float(mean_loss(trainer, range(8)))
        assert [trainer.evaluate(Split(), step) for step in (0, 5)] == [(pytest.approx(expected, rel=1e-6), None)] * 2
        assert counts and not any(count.any() for count in counts if count is not None)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())

    run_ranks(fn, 1)


def test_replicas_that_drift_apart_are_noticed_on_every_rank():
    def fn(rank):
        from pipehc.trainer import Trainer, TrainingError

        trainer = Trainer(tiny_config("parallel.pp=2", "schedule.name=dualpipe"))
        trainer.check_replicas()
        name = "decoder.layers.0.self_attention.linear_proj.weight"
        if rank == 1:
            (weight,) = [w for m in trainer.models.values() for n, w in parameter_names(m).items() if n == name]
            weight.data.view(torch.int32)[3, 5] ^= 1
        with pytest.raises(TrainingError, match=f"ranks 0 and 1 hold different weights in {name}"):
            trainer.check_replicas()

    run_ranks(fn, 2)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_any_weight_changes():
    def fn(rank):
        from pipehc.trainer import Trainer, TrainingError

        trainer = Trainer(tiny_config("parallel.pp=2"))
        if rank == 0:
            trainer.models[0, 0].embedding.word_embeddings.weight.data[:] = float("nan")
        before = {n: w.clone() for m in trainer.models.values() for n, w in parameter_names(m).items()}
        with pytest.raises(TrainingError, match="rank 1: the loss of step 1 is nan"):
            trainer.step(1, Split(), Sampler(SAMPLES, seed=7))
        for model in trainer.models.values():
            for name, weight in parameter_names(model).items():
                assert torch.equal(weight, before[name]) or name.startswith("embedding")

    run_ranks(fn, 2)


def test_a_cap_that_no_searched_schedule_respects_is_refused_on_every_rank():
    def fn(rank):
        from pipehc.trainer import Trainer

        searched = "schedule.name=auto", "search.placement=bidirectional", "search.max_live=1.5", "parallel.pp=2"
        with pytest.raises(ConfigError, match=r"search: max_live = 1\.5"):
            Trainer(tiny_config(*searched))

    run_ranks(fn, 2)
