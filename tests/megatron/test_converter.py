"""Hyper-connections from and to Megatron main: against its equations, written here in fp64."""

import pytest
import torch

from pipehc.kernels.manifolds import Birkhoff
from pipehc.megatron.converter import (
    connection_from_megatron,
    connection_to_megatron,
    state_dict_from_megatron,
    state_dict_to_megatron,
)
from pipehc.model.hyper_connection import HyperConnection

N, C = 4, 24


def rows_first(logits, iterations=20):
    m = torch.exp(logits - logits.amax(-1, keepdim=True))
    for _ in range(iterations):
        m = m / m.sum(-1, keepdim=True)
        m = m / m.sum(-2, keepdim=True)
    return m


def columns_first(logits, iterations=20):
    return rows_first(logits.mT, iterations).mT


def mains_parameters(n=N, c=C, seed=0, spread=0.3):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "mapping_proj.weight": draw(n * n + 2 * n, n * c) / (n * c) ** 0.5,
        "alpha_pre": draw(1).abs() + 0.1,
        "alpha_post": draw(1).abs() + 0.1,
        "alpha_res": draw(1).abs() + 0.1,
        "bias": spread * draw(n * n + 2 * n),
    }


def mains_equations(p, x, f, sinkhorn, n=N):
    """x [s, b, n*C]; f: the sub-layer. Streams after it, and its maps."""
    s, b, _ = x.shape
    rms = x.pow(2).mean(-1, keepdim=True).sqrt()
    inside = x * p["norm.weight"] if "norm.weight" in p else x
    logits = torch.einsum("sbk,ok->sbo", inside, p["mapping_proj.weight"]) / (rms + 1e-6)
    pre, post, res = logits.split([n, n, n * n], -1)
    b_pre, b_post, b_res = p["bias"].split([n, n, n * n])
    h_pre = torch.sigmoid(p["alpha_pre"] * pre + b_pre)
    h_post = 2 * torch.sigmoid(p["alpha_post"] * post + b_post)
    h_res = sinkhorn((p["alpha_res"] * res + b_res).view(s, b, n, n))
    streams = x.view(s, b, n, -1)
    y = f(torch.einsum("sbi,sbic->sbc", h_pre, streams))
    out = torch.einsum("sbij,sbjc->sbic", h_res, streams) + torch.einsum("sbi,sbc->sbic", h_post, y)
    return out.flatten(2), h_res


def ours(parameters, x, f, n=N, iterations=20):
    connection = HyperConnection(x.shape[2] // n, n, iterations=iterations).double()
    connection.load_state_dict(parameters)
    h, h_post, h_res = connection.coefficients_pre(x)
    return connection.post_res(x, f(h), h_post, h_res), h_res.view(*x.shape[:2], n, n)


def streams(n=N, c=C, seed=1):
    return torch.randn(5, 3, n * c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n,c", [(4, 24), (2, 7), (1, 5), (3, 8)])
@pytest.mark.parametrize("learned_norm", [False, True], ids=["no_norm_weight", "norm_weight"])
def test_converted_parameters_compute_the_same_with_the_same_order(n, c, learned_norm):
    p, x = mains_parameters(n, c), streams(n, c)
    if learned_norm:
        p["norm.weight"] = 1 + 0.3 * torch.randn(n * c, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected, _ = mains_equations(p, x, torch.tanh, columns_first, n)
    found, _ = ours(connection_from_megatron(p), x, torch.tanh, n)
    # 1e-6 is what main adds to the norm.
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_rows_first_moves_the_exact_sum_from_rows_to_columns():
    p, x = mains_parameters(), streams()
    expected, mains = mains_equations(p, x, torch.tanh, rows_first)
    found, h_res = ours(connection_from_megatron(p), x, torch.tanh)
    assert (h_res.sum(-1) - 1).abs().max() < 1e-14 and (mains.sum(-2) - 1).abs().max() < 1e-14
    assert 1e-14 < (h_res.sum(-2) - 1).abs().max() < 3e-2 and 1e-14 < (mains.sum(-1) - 1).abs().max() < 3e-2
    difference = (h_res - mains).abs().max()
    assert difference < 3e-2
    assert (found - expected).abs().max() < N * x.abs().max() * difference + 1e-5


@pytest.mark.parametrize("centre,iterations,largest,mean", [(0.0, 20, 1e-9, 1e-13), (4.0, 20, 2e-2, 3e-3), (4.0, 200, 1e-5, 1e-8)])
def test_how_far_the_order_reaches(centre, iterations, largest, mean):
    """The figures of the docstring."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(10000, 4, 4, generator=g, dtype=torch.float64) * 0.5 + centre * torch.eye(4, dtype=torch.float64)
    difference = (Birkhoff(iterations).map(logits) - rows_first(logits, iterations)).abs().amax((-1, -2))
    print(f"centre {centre}, {iterations} iterations: largest {difference.max():.1e}, mean {difference.mean():.1e}")
    assert difference.max() < largest and difference.mean() < mean
    assert difference.max() > largest / 20


def test_both_ways_are_exact():
    p = mains_parameters()
    there_and_back = connection_to_megatron(connection_from_megatron(p))
    assert set(there_and_back) == set(p)
    assert all(torch.equal(there_and_back[name], value) for name, value in p.items())
    own = HyperConnection(C, N).state_dict()
    back = connection_from_megatron(connection_to_megatron(own))
    assert list(back) == list(own) and all(torch.equal(back[name], value) for name, value in own.items())
    half = connection_to_megatron(own, torch.bfloat16)
    assert all(value.dtype == torch.bfloat16 for value in half.values())
    assert all(value.dtype == torch.float32 for value in connection_from_megatron(half).values())


def test_a_model_is_converted_by_name_and_the_rest_is_kept():
    state = {"embedding.word_embeddings.weight": torch.ones(2), "decoder.layers.1.mlp.linear_fc1.weight": torch.zeros(2)}
    for layer in range(2):
        for i, name in enumerate(("self_attention_hyper_connection", "mlp_hyper_connection")):
            module = mains_parameters(seed=10 * layer + i)
            state.update({f"module.decoder.layers.{layer}.{name}.{k}": v for k, v in module.items()})
    found = state_dict_from_megatron(state)
    assert found["decoder.layers.1.mlp.linear_fc1.weight"] is state["decoder.layers.1.mlp.linear_fc1.weight"]
    phi = found["module.decoder.layers.1.mlp_connection.phi"]
    assert torch.equal(phi, state["module.decoder.layers.1.mlp_hyper_connection.mapping_proj.weight"].mT)
    assert len(found) == 2 + 4 * 3
    back = state_dict_to_megatron(found)
    assert set(back) == set(state) and all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize("prefix", ["module.decoder.layers.{}.", "{}."])
def test_layers_of_a_hybrid_model_lose_their_wrapper(prefix):
    state, layers = {"decoder.final_norm.weight": torch.ones(2)}, {0: "self_attention.linear_qkv", 1: "mlp.linear_fc1"}
    for layer, part in layers.items():
        state[f"{prefix.format(layer)}inner_layer.{part}.weight"] = torch.full((2,), float(layer))
        module = mains_parameters(seed=layer)
        state.update({f"{prefix.format(layer)}hyper_connection.{k}": v for k, v in module.items()})
    state[f"{prefix.format(1)}inner_layer.pre_mlp_layernorm.weight"] = torch.zeros(3)
    found = state_dict_from_megatron(state)
    assert all(f"{prefix.format(layer)}{part}.weight" in found for layer, part in layers.items())
    assert f"{prefix.format(0)}attention_connection.phi" in found and f"{prefix.format(1)}mlp_connection.alpha" in found
    assert len(found) == 4 + 2 * 3
    back = state_dict_to_megatron(found)
    assert set(back) == set(state) and all(torch.equal(back[name], value) for name, value in state.items())


def connection_of(kind, **settings):
    return dict(HyperConnection(C, N, kind, **settings).state_dict())


@pytest.mark.parametrize(
    "convert,parameters,message",
    [
        (connection_to_megatron, connection_of("hc"), "phi: projects every stream on its own"),
        (connection_to_megatron, connection_of("harmonized"), "s: is of kind 'harmonized'"),
        (connection_to_megatron, connection_of("harmonized", static=True), "s: is of kind 'harmonized'"),
        (connection_to_megatron, connection_of("hybrid"), "blend_logit: is of kind 'hybrid'"),
        (connection_to_megatron, connection_of("mhc") | {"alpha": torch.ones(2)}, r"alpha: shape \[2\]; must be \[3\]"),
        (connection_to_megatron, connection_of("mhc") | {"phi": torch.ones(97, 24)}, "97 inputs must be a multiple of the 4"),
        (connection_to_megatron, connection_of("mhc") | {"phi": torch.ones(96, 23)}, r"must be \[n\*C, 24\]"),
        (connection_from_megatron, mains_parameters() | {"bias": torch.ones(23)}, r"bias: shape \[23\]"),
        (connection_from_megatron, mains_parameters() | {"bias": torch.ones(15)}, r"mapping_proj.weight: shape .*\[15, 96\]"),
        (connection_from_megatron, mains_parameters() | {"alpha_res": torch.ones(4)}, r"alpha_res: shape \[4\]; must be \[1\]"),
        (
            connection_from_megatron,
            mains_parameters() | {"norm.weight": torch.ones(C)},
            r"norm.weight: shape \[24\]; must be \[96\]",
        ),
        (connection_from_megatron, mains_parameters() | {"norm.bias": torch.ones(96)}, "norm.bias: has no counterpart"),
        (connection_from_megatron, connection_of("mhc"), "mapping_proj.weight: is missing"),
        (state_dict_from_megatron, {"decoder.layers.0.mlp.weight": torch.ones(1)}, "has no self_attention_hyper_connection or"),
        (state_dict_from_megatron, {"decoder.hc_head_fn": torch.ones(1)}, "decoder.hc_head_fn: joins the streams by learned"),
        (state_dict_from_megatron, {"0.inner_layer.mixer.A_log": torch.ones(1)}, "0.inner_layer.mixer.A_log: is of a Mamba layer"),
        (state_dict_from_megatron, {"0.hyper_connection.bias": torch.ones(24)}, "0.hyper_connection.bias: its layer has no inner"),
        (
            state_dict_to_megatron,
            {f"layers.3.mlp_connection.{k}": v for k, v in connection_of("hc").items()},
            "layers.3.mlp_hyper_connection: phi: projects",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(convert, parameters, message):
    with pytest.raises(ValueError, match=message):
        convert(parameters)
