"""Every schedule, layout and residual computes what one process computes: loss, gradient norm and every parameter's gradient."""

import pytest
import torch

from pipehc.config import load_config
from processes import run_ranks

TINY = """
model: {vocab_size: 256, hidden_size: 32, blocks: 8, dense_blocks: 1, heads: 2, head_dim: 12, rope_dim: 6, kv_rank: 16,
        expert_ffn_size: 20, dense_ffn_size: 40, experts: 4, experts_active: 2, experts_shared: 1, init_std: 0.1}
residual: {kind: mhc, streams: 3, alpha: 0.3}
train: {steps: 4, sequence_length: 11, micro_batch: 1, global_batch: 16}
optimizer: {lr: 1.0e-3, clip_grad: 1.0}
evaluation: {interval: 1, samples: 8}
run: {folder: unused}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


class RandomSplit:
    """64 samples that every process makes alike."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(index))


def one_step(rank, path, cases):
    """For each case: evaluation loss, loss, gradient norm, this rank's gradients; then the evaluation loss after the update."""
    from pipehc.data import Sampler
    from pipehc.trainer import Trainer

    results, split = [], RandomSplit()
    for overrides in cases:
        trainer = Trainer(load_config(path, overrides))
        before = trainer.evaluate(split, 0)
        gradients = watch_gradients(trainer.optimizer)
        result = trainer.step(1, split, Sampler(len(split), seed=3))
        trainer.check_replicas()
        biases = {name: b.clone() for m in trainer.models.values() for name, b in m.named_buffers() if "expert_bias" in name}
        results.append((before, result.loss, result.grad_norm, trainer.evaluate(split, 1), gradients, biases))
        trainer.destroy()
    return results


def watch_gradients(optimizer):
    """A dictionary that will hold the reduced gradients when the optimizer steps."""
    gradients, step = {}, optimizer.step

    def watched(lr):
        gradients.update(optimizer.gradients())
        return step(lr)

    optimizer.step = watched
    return gradients


def compare(rank_results, reference, label):
    before, loss, norm, after, gradients, biases = reference
    seen, seen_biases = {}, {}
    for found in rank_results:
        assert found[0] == pytest.approx(before, rel=1e-5), label
        assert found[1] == pytest.approx(loss, rel=1e-5), label
        assert found[2] == pytest.approx(norm, rel=1e-5), label
        assert found[3] == pytest.approx(after, rel=1e-4), label
        for name, gradient in found[4].items():
            seen.setdefault(name, []).append(gradient)
        for name, bias in found[5].items():
            seen_biases.setdefault(name, []).append(bias)
    assert seen.keys() == gradients.keys(), label
    for name, copies in seen.items():
        scale = gradients[name].norm()
        assert scale > 0 or "experts" in name, (label, name)
        for copy in copies:
            assert (copy - gradients[name]).norm() <= 1e-5 * scale, (label, name, float((copy - gradients[name]).norm() / scale))
    assert seen_biases.keys() == biases.keys() and biases
    for name, copies in seen_biases.items():
        assert biases[name].abs().max() > 0, (label, name)
        assert all(torch.equal(copy, biases[name]) for copy in copies), (label, name)


def reference_of(path, overrides):
    return run_ranks(one_step, 1, path, [overrides], timeout=240)[0][0]


@pytest.mark.parametrize("kind", ["none", "mhc"])
def test_equals_one_process(tiny, kind):
    """P in {2, 4} x ep in {1, 2} x every schedule on 8 processes: data parallelism takes what is left."""
    residual = [f"residual.kind={kind}"]
    reference = reference_of(tiny, residual)
    layouts = [(name, pp, ep) for name in ("1f1b", "dualpipe", "dualpipev") for pp in (2, 4) for ep in (1, 2)]
    cases = [[*residual, f"schedule.name={name}", f"parallel.pp={pp}", f"parallel.ep={ep}"] for name, pp, ep in layouts]
    results = run_ranks(one_step, 8, tiny, cases, timeout=400)
    for index, layout in enumerate(layouts):
        compare([rank[index] for rank in results], reference, layout)


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process_without_data_parallelism(tiny, ranks):
    reference = reference_of(tiny, [])
    layouts = ["1f1b", "dualpipe", "dualpipev"]
    cases = [[f"schedule.name={name}", f"parallel.pp={ranks}"] for name in layouts]
    results = run_ranks(one_step, ranks, tiny, cases, timeout=240)
    for index, layout in enumerate(layouts):
        compare([rank[index] for rank in results], reference, layout)


def test_dualpipe_over_eight_ranks(tiny):
    batch = ["train.global_batch=20"]
    reference = reference_of(tiny, batch)
    results = run_ranks(one_step, 8, tiny, [[*batch, "schedule.name=dualpipe", "parallel.pp=8"]], timeout=240)
    compare([rank[0] for rank in results], reference, "dualpipe P=8 M=20")
