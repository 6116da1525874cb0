"""A whole hyper-connection layer, attention and FFN, against plain PyTorch in fp64 from the equations of the papers.

The layer is Megatron's with our connections. The reference below knows neither: it takes tensors by name and computes softmax
attention, the FFN or its experts, and the maps H_pre, H_post, H_res from their definitions.
"""

import math

import megatron_job
import pytest
import torch
from layer_specs import build, experts, local, standard_config
from processes import run_ranks

S, B, C, N, HEADS = 6, 2, 24, 4, 3


def sinkhorn(logits, iterations=20):
    """Columns first, rows last: the paper's T_r(T_c(.))."""
    m = (logits - logits.amax((-2, -1), keepdim=True)).exp()
    for _ in range(iterations):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def isometry(logits):
    """The nearest H with H^T H = I and H 1 = 1: the polar factor of what the logits do to the complement of the ones."""
    n = logits.shape[-1]
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.eye(n)[:, 1:]], 1).double())[0]
    e0, u = basis[:, :1].abs(), basis[:, 1:]
    left, _, right = torch.linalg.svd(u.T @ logits @ u)
    return e0 @ e0.T + u @ (left @ right) @ u.T


def maps(p, x, kind):
    """H_pre [s, b, n], H_post [s, b, n], H_res [s, b, n, n] of streams x [s, b, n, C]."""
    n = x.shape[2]
    a_pre, a_post, a_res = p["alpha"]
    b_pre, b_post, b_res = p["bias"].split([n, n, n * n])
    if kind in ("hc", "harmonized"):
        unit = x / (x.pow(2).mean(-1, keepdim=True) + 1e-20).sqrt()
        theta = p["phi"].T  # [n + 2, C]: pre, post, one row for each stream that is written
        said = torch.tanh(torch.einsum("rc,sbic->sbri", theta, unit))
        h_pre, h_post = a_pre * said[:, :, 0] + b_pre, a_post * said[:, :, 1] + b_post
        h_res = a_res * said[:, :, 2:] + b_res.view(n, n)
        if kind == "harmonized":
            eye = torch.eye(n, dtype=x.dtype)
            h_res = eye + p["s"] * (h_res - eye)
        return h_pre, h_post, h_res
    flat = x.flatten(2)
    unit = flat / (flat.pow(2).mean(-1, keepdim=True) + 1e-20).sqrt()
    phi_pre, phi_post, phi_res = p["phi"].split([n, n, n * n], 1)
    h_pre = torch.sigmoid(a_pre * (unit @ phi_pre) + b_pre)
    h_post = 2 * torch.sigmoid(a_post * (unit @ phi_post) + b_post)
    logits = (a_res * (unit @ phi_res) + b_res).unflatten(-1, (n, n))
    if kind == "mhc":
        return h_pre, h_post, sinkhorn(logits)
    if kind == "isohc":
        return h_pre, h_post, isometry(logits)
    blend = torch.sigmoid(p["blend_logit"])
    return h_pre, h_post, (1 - blend) * isometry(logits) + blend * sinkhorn(logits)


def layer_norm(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def attention(p, x):
    """Causal, multi-head; Megatron keeps query, key and value of a head together."""
    qkv = x @ p["linear_qkv.weight"].T + p.get("linear_qkv.bias", 0)
    q, k, v = qkv.view(S, B, HEADS, 3, C // HEADS).permute(3, 1, 2, 0, 4)
    scores = q @ k.mT / math.sqrt(C // HEADS)
    later = torch.arange(S)[:, None] < torch.arange(S)[None]
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    out = (weights @ v).permute(2, 0, 1, 3).reshape(S, B, C)
    return out @ p["linear_proj.weight"].T + p.get("linear_proj.bias", 0)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def ffn(p, x):
    hidden = gelu(x @ p["linear_fc1.weight"].T + p.get("linear_fc1.bias", 0))
    return hidden @ p["linear_fc2.weight"].T + p.get("linear_fc2.bias", 0)


def inside(p, prefix):
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def mixture(p, x):
    """The two experts that softmax likes best, weighted by their share of the two, and the shared expert."""
    scores = x @ p["router.weight"].T
    best, chosen = scores.topk(2, -1)
    weights = best.softmax(-1)
    each = torch.stack([ffn(inside(p, f"experts.local_experts.{e}."), x) for e in range(4)], -2)
    picked = each.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, C))
    return (weights.unsqueeze(-1) * picked).sum(-2) + ffn(inside(p, "shared_experts."), x)


def equations(p, x, kind, moe):
    """x [s, b, n*C] -> [s, b, n*C]."""
    x = x.view(S, B, N, C)
    for connection, norm, f in (
        ("attention_connection.", "input_layernorm.", lambda h: attention(inside(p, "self_attention."), h)),
        ("mlp_connection.", "pre_mlp_layernorm.", lambda h: (mixture if moe else ffn)(inside(p, "mlp."), h)),
    ):
        h_pre, h_post, h_res = maps(inside(p, connection), x, kind)
        h = torch.einsum("sbi,sbic->sbc", h_pre, x)
        y = f(layer_norm(h, p[f"{norm}weight"], p[f"{norm}bias"]))
        x = torch.einsum("sbij,sbjc->sbic", h_res, x) + torch.einsum("sbi,sbc->sbic", h_post, y)
    return x.reshape(S, B, N * C)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", ["mhc", "hc", "isohc", "hybrid", "harmonized"])
def test_a_layer_computes_its_equations(kind, moe):
    def compared(rank):
        from pipehc.megatron import hyper_connection_layer_spec

        megatron_job.initialize()
        options = {"num_layers": 3, "params_dtype": torch.float64, "hidden_size": C, "num_attention_heads": HEADS}
        config = experts(**options, moe_router_dtype="fp64") if moe else standard_config(**options)
        layer = build(hyper_connection_layer_spec(local(config, moe), {"kind": kind, "alpha": 0.4}), config).double()
        layer.expands = layer.contracts = False
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if parameter.dim() > 1:  # weights of a size at which every part of the layer counts
                    parameter.normal_(0, parameter.shape[-1] ** -0.5 if "phi" not in name else 0.1, generator=generator)
                elif name.endswith("connection.bias"):
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            for connection in (layer.attention_connection, layer.mlp_connection):
                if kind == "harmonized":
                    connection.s.fill_(0.7)
                if kind == "hybrid":
                    connection.blend_logit.fill_(0.4)
        x = torch.randn(S, B, N * C, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(S, B, N * C, generator=generator, dtype=torch.float64)
        mask = torch.triu(torch.ones(1, 1, S, S, dtype=torch.bool), 1)
        named = dict(layer.named_parameters())
        gradients = []
        found, _ = layer(x, attention_mask=mask)
        expected = equations(named | dict(layer.named_buffers()), x, kind, moe)
        for out in (found, expected):
            gradients.append(torch.autograd.grad((out * weight).sum(), [x, *named.values()]))
        precision = 1e-6 if moe else 1e-11  # Megatron's router takes its softmax in fp32
        torch.testing.assert_close(found, expected, rtol=0, atol=precision * float(expected.abs().max()))
        for name, ours, theirs in zip(["x", *named], *gradients):
            assert theirs.abs().max() > 0, name
            scale = float(theirs.abs().max())
            assert (ours - theirs).abs().max() < 20 * precision * scale, (name, float((ours - theirs).abs().max()), scale)
        return True

    assert run_ranks(compared, 1) == [True]


def test_an_rms_norm_is_done_by_the_connection_unless_something_hooks_into_it():
    def compared(rank):
        from pipehc.megatron import hyper_connection_layer_spec

        megatron_job.initialize()
        config = standard_config(num_layers=3, normalization="RMSNorm", hidden_size=C, num_attention_heads=HEADS)
        layer = build(hyper_connection_layer_spec(local(config), {"kind": "mhc", "alpha": 0.4}), config)
        layer.expands = layer.contracts = False
        norms, called = (layer.input_layernorm, layer.pre_mlp_layernorm), []
        with torch.no_grad():
            for norm in norms:
                norm.weight.copy_(torch.linspace(0.5, 2, C))
        x = torch.randn(S, B, N * C, generator=torch.Generator().manual_seed(9))
        mask = torch.triu(torch.ones(1, 1, S, S, dtype=torch.bool), 1)

        def run():
            out, _ = layer(x, attention_mask=mask)
            return out.detach(), *torch.autograd.grad(out.square().sum(), [norm.weight for norm in norms])

        for norm in norms:
            forward = norm.forward
            norm.forward = lambda *args, forward=forward: called.append("norm") or forward(*args)
        own = run()
        assert not called
        handles = [norm.register_forward_pre_hook(lambda *_: called.append("hook")) for norm in norms]
        hooked = run()
        assert called == ["hook", "norm"] * 2
        for handle in handles:
            handle.remove()
        for found, expected in zip(own, hooked):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        return True

    assert run_ranks(compared, 1) == [True]
