"""Diagnostics of the streams: equal in every layout to what fp64 computes from the same maps, streams and gradients of one process;
and looking changes no bit of the training."""

import preloaded  # noqa: F401
import pytest
import torch
from processes import run_ranks
from tiny_model import tiny_config

from pipehc.model.streams import Part, StreamFigures

KINDS = ("none", "hc", "mhc", "isohc", "hybrid", "harmonized")
MANY = [kind if kind == "mhc" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
LEAST = (
    "residual.alpha=0.3",
    "residual.init=scattered",
    "residual.target_gain=1.05",
    "model.init_std=0.1",
    "train.sequence_length=8",
    "train.global_batch=8",
)
PIPELINE = ("parallel.pp=2", "train.micro_batch=1")
LAYOUTS = {
    "dualpipe": (2, (*PIPELINE, "schedule.name=dualpipe", "recompute.block=3")),
    "dualpipev": (2, (*PIPELINE, "schedule.name=dualpipev", "recompute.enabled=false")),
    "1f1b over four, in rebuilt blocks": (4, ("parallel.pp=4", "train.micro_batch=1", "recompute.block=1")),
    "experts over two": (2, ("parallel.ep=2", "parallel.dp=2", "train.micro_batch=1")),
    "tokens over two": (4, (*PIPELINE, "parallel.tp=2", "schedule.name=dualpipe", "recompute.block=3")),
}


class Split:
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.randint(0, 256, (9,), generator=torch.Generator().manual_seed(index))


def two_steps(rank, overrides, captured=False):
    """What two steps show and train: figures, results, gradients. captured: all that the probe of the first step saw, too."""
    from pipehc.data.batches import Sampler
    from pipehc.model import probe
    from pipehc.trainer import Trainer

    seen = {"x": {}, "maps": {}, "gradients": {}}
    if captured:
        capture(probe.Probe, seen)
    trainer = Trainer(tiny_config(*LEAST, *overrides))
    gradients, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda lr: gradients.append(trainer.optimizer.gradients()) or step(lr)
    results = [trainer.step(i, Split(), Sampler(64, seed=3)) for i in (1, 2)]
    return [r.streams for r in results], [(r.loss, r.grad_norm, r.figures) for r in results], gradients, seen


def capture(kind, seen):
    """Has the probe keep, in fp64, the raw tensors of the first sequence that it is told of."""
    before, after, gradient = kind.before, kind.after, kind.gradient

    def first(t):
        return t.detach()[:, 0].double().clone()

    def see_before(self, k, connection, x, h_post, h_res):
        before(self, k, connection, x, h_post, h_res)
        seen["x"].setdefault(k, first(x))
        if h_res is not None:
            h_pre = connection.h_pre(x)
            of_tokens = (h.detach().unflatten(0, x.shape[:2]) for h in (h_pre, h_post, h_res))
            seen["maps"].setdefault(k, [first(h) for h in of_tokens])

    def see_after(self, k, x):
        after(self, k, x)
        seen["x"].setdefault(k + 1, first(x))

    def see_gradient(self, k):
        see = gradient(self, k)

        def both(g):
            see(g)
            seen["gradients"].setdefault(k, first(g.reshape(self._shape)))

        return both

    kind.before, kind.after, kind.gradient = see_before, see_after, see_gradient


def expected(seen, n, scale):
    """The figures by plain loops over tokens."""
    x, depth = seen["x"], len(seen["x"]) - 1
    streams = [x[k].unflatten(1, (n, -1)) for k in range(depth + 1)]
    found = {
        "stream_norm": [s.square().mean(-1).sqrt().mean(0).tolist() for s in streams],
        "gradient": [float(seen["gradients"][k].norm()) / scale for k in range(depth + 1)],
    }
    if not seen["maps"]:
        return found
    h = [seen["maps"][k][2] for k in range(depth)]
    tokens = range(h[0].shape[0])
    products = [
        [torch.linalg.multi_dot([torch.eye(n).double()] * 2 + [m[t] for m in reversed(h[k:])]) for t in tokens]
        for k in range(depth)
    ]

    def gain(matrices, dim):
        return sum(float(m.abs().sum(dim).max()) for m in matrices) / len(tokens)

    def far(single, what):
        eye = torch.eye(n).double()
        of = {"rows": lambda m: m.sum(1) - 1, "columns": lambda m: m.sum(0) - 1, "orthogonality": lambda m: m.T @ m - eye}
        return sum(float(of[what](m).abs().max()) for m in single) / len(tokens)

    end = seen["gradients"][depth].unflatten(1, (n, -1))
    carried = [torch.stack([products[k][t].T @ end[t] for t in tokens]).norm() for k in range(depth)] + [end.norm()]
    cosine = [torch.stack([torch.cosine_similarity(s[:, i], s[:, j], dim=-1) for i in range(n) for j in range(i)]) for s in streams]
    pre, post = ([seen["maps"][k][i] for k in range(depth)] for i in (0, 1))
    return found | {
        "gain": {way: [gain(m, dim) for m in h] for way, dim in (("forward", 1), ("backward", 0))},
        "composite": {way: [gain(p, dim) for p in products] for way, dim in (("forward", 1), ("backward", 0))},
        "distance": {what: [far(m, what) for m in h] for what in ("rows", "columns", "orthogonality")},
        "maps": [m.mean(0).tolist() for m in h],
        "composite_map": torch.stack(products[0]).mean(0).tolist(),
        "h_pre": [m.mean(0).tolist() for m in pre],
        "h_post": [m.mean(0).tolist() for m in post],
        "h_pre_norm": [float(m.norm(dim=1).mean()) for m in pre],
        "h_post_norm": [float(m.norm(dim=1).mean()) for m in post],
        "similarity": [float(c.mean()) for c in cosine],
        "transported": [float(c) / scale for c in carried],
    }


def near(found, wanted, rel, path=""):
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), path
        for key in wanted:
            near(found[key], wanted[key], rel, f"{path}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), path
        for i, (a, b) in enumerate(zip(found, wanted)):
            near(a, b, rel, f"{path}[{i}]")
    elif wanted is None:
        assert found is None, path
    else:
        assert found == pytest.approx(wanted, rel=rel, abs=1e-7), path


@pytest.fixture(scope="module")
def one_process():
    found = {}

    def of(kind):
        if kind not in found:
            found[kind] = run_ranks(two_steps, 1, [f"residual.kind={kind}", "diagnostics.interval=1"], True)[0]
        return found[kind]

    return of


@pytest.mark.parametrize("kind", MANY)
def test_figures_are_those_of_fp64(kind, one_process):
    (first, second), _, _, seen = one_process(kind)
    n = 1 if kind == "none" else 3
    if kind == "harmonized":
        assert first["s"] == 1.0 and second["s"] < 1.0 and first["gain_average"] > 1
    first = {name: value for name, value in first.items() if name not in ("s", "gain_average")}
    near(first, expected(seen, n, 1 / (8 * 8)), 1e-6)
    assert len(first["gradient"]) == 9 and all(g > 0 for g in first["gradient"])
    if kind != "none":
        assert max(first["similarity"]) < 1 and first["similarity"][0] == pytest.approx(1)


@pytest.mark.parametrize("kind", MANY)
def test_gradients_are_those_of_a_whole_graph(kind, one_process):
    """Of the model's plain forward, which has no pieces."""
    figures = one_process(kind)[0][0]
    found = run_ranks(whole_graph, 1, [f"residual.kind={kind}", "diagnostics.interval=1"])[0]
    assert figures["gradient"][::2] == pytest.approx(found, rel=2e-5)


def whole_graph(rank, overrides):
    """Norms of the gradients before every block, and at the end, of the first sequence."""
    from pipehc.data.batches import Sampler
    from pipehc.trainer import Trainer

    trainer = Trainer(tiny_config(*LEAST, *overrides))
    (model,) = trainer.models.values()
    tokens, labels = trainer.microbatch(Split(), Sampler(64, seed=3), 0)
    x = model.embed(tokens)
    kept = [x]
    for layer in model.decoder.layers.values():
        x, _ = layer(x)
        kept.append(x)
    gradients = torch.autograd.grad(model.loss(x, labels), kept)
    return [float(g[:, 0].norm()) for g in gradients]


OTHER = [name for name in LAYOUTS if name != "dualpipe"]
CASES = [(kind, "dualpipe") for kind in KINDS]
CASES += [(kind, layout) for i, layout in enumerate(OTHER) for kind in (KINDS[i], KINDS[(i + 3) % len(KINDS)])]
"""Every kind in one layout, and two in each of the others."""


@pytest.mark.parametrize(
    ("kind", "layout"),
    [case if case == ("mhc", "dualpipe") else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_every_layout_shows_the_same_and_trains_the_same(kind, layout, one_process):
    processes, overrides = LAYOUTS[layout]
    overrides = [f"residual.kind={kind}", *overrides]
    looking, blind = (run_ranks(two_steps, processes, [*overrides, f"diagnostics.interval={i}"]) for i in (1, 0))
    # After an update, Adam's first one above all, weights are equal to rounding of the gradients alone.
    shown, alone = looking[0][0][0], one_process(kind)[0][0]
    of_gradients = ("gradient", "transported")
    near({k: v for k, v in shown.items() if k not in of_gradients}, {k: v for k, v in alone.items() if k not in of_gradients}, 2e-6)
    near({k: shown.get(k) for k in of_gradients}, {k: alone.get(k) for k in of_gradients}, 2e-5)
    for (_, results, gradients, _), (nothing, same, expected, _) in zip(looking, blind):
        assert nothing == [None, None] and results == same
        for found, wanted in zip(gradients, expected):
            assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(shown == [None, None] for shown, *_ in looking[1:])


@pytest.mark.parametrize(("tokens", "ranks", "expected"), [(6000, 2, [3000, 1096]), (12000, 4, [3000, 1096, 0, 0]), (8, 2, [4, 4])])
def test_of_long_sequences_the_first_tokens_are_looked_at_whoever_has_them(tokens, ranks, expected):
    """And means are over all of these: every token weighs as much."""
    found = [StreamFigures({(0, 0): range(2)}, 2, 1, tokens, Part(rank, ranks)) for rank in range(ranks)]
    assert [figures.probes[0, 0]._tokens if figures.probes else 0 for figures in found] == expected
    numbers = torch.zeros(3, 7, dtype=torch.float64)
    for rank, figures in enumerate(found):
        for probe in figures.probes.values():
            probe.norms[1] = torch.full((expected[rank], 1), float(rank))
            figures._enter(probe, torch.zeros(3, figures._tokens, 1, 1), own := torch.zeros(3, 7, dtype=torch.float64))
            numbers += own
    assert numbers[1, 0] == pytest.approx(sum(rank * n for rank, n in enumerate(expected)) / sum(expected))


def test_only_some_steps_are_looked_at():
    from pipehc.trainer import Trainer

    trainer = object.__new__(Trainer)
    trainer.config = tiny_config("diagnostics.interval=4")
    assert [step for step in range(1, 13) if trainer.is_diagnosed(step)] == [1, 4, 8, 12]
    trainer.config = tiny_config("diagnostics.interval=4", "trace.steps=[4,9]")
    assert [step for step in range(1, 13) if trainer.is_diagnosed(step)] == [1, 12]
    trainer.config = tiny_config("diagnostics.interval=0")
    assert not any(map(trainer.is_diagnosed, range(1, 13)))


@pytest.mark.slow
@pytest.mark.timed
def test_looking_costs_less_than_a_hundredth():
    """Of the demo, at its interval: in one step of ten, one micro-batch of eight has one sequence of four looked at."""
    (looking, blind) = run_ranks(times, 1, timeout=300)[0]
    print(f"a step takes {1000 * blind:.0f} ms, {100 * (looking / blind - 1):.1f} % more where it is looked at")
    assert (looking - blind) / (10 * blind) < 0.01


def times(rank):
    """Median seconds of steps that are looked at, and of those that are not, in turns."""
    import time
    from statistics import median

    from tiny_model import DEMO

    from pipehc.config.loading import load_config
    from pipehc.data.batches import Sampler
    from pipehc.trainer import Trainer

    class Long(Split):
        def __getitem__(self, index):
            return torch.randint(0, 256, (129,), generator=torch.Generator().manual_seed(index))

    alone = ["parallel.pp=1", "schedule.name=1f1b", "diagnostics.interval=2"]
    trainer, sampler, found = Trainer(load_config(DEMO, alone)), Sampler(64, seed=3), {True: [], False: []}
    for step in range(2, 12):
        began = time.perf_counter()
        trainer.step(step, Long(), sampler)
        found[step % 2 == 0].append(time.perf_counter() - began)
    return median(found[True][1:]), median(found[False][1:])
