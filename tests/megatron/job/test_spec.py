"""Released layer and block specs in their hyper-connection form, one process: what changes, and that nothing else does."""

from copy import copy
from dataclasses import replace

import megatron_job
import pytest
import torch
from layer_specs import (
    BATCH,
    CHANNELS,
    KINDS,
    SEQUENCE,
    SPECS,
    build,
    converted,
    experts,
    latent_experts,
    local,
    mask,
    run_layer,
    standard_config,
)  # fmt: skip
from megatron_attention import CoreAttention
from processes import run_ranks


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_computes_what_megatrons_layer_computes(name):
    """With the plain residual bit for bit, dropout included; with hyper-connections at alpha = 0 but for rounding."""

    def compared(rank):
        megatron_job.initialize()
        make_config, make_spec = SPECS[name]
        config = make_config()
        spec = make_spec(config)
        plain = build(spec, config)
        out, grad, grads = run_layer(plain, config.hidden_size)
        assert len(grads) > 4
        same = converted(spec, plain, config, {"kind": "none"})
        found = run_layer(same, config.hidden_size)
        assert torch.equal(found[0], out) and torch.equal(found[1], grad)
        assert set(found[2]) == set(grads) and all(torch.equal(found[2][k], v) for k, v in grads.items())
        for kind in KINDS:
            layer = converted(spec, plain, config, {"kind": kind, "alpha": 0.0})
            assert {n for n, _ in layer.named_parameters() if "connection" not in n} == {n for n, _ in plain.named_parameters()}
            y, g, _ = run_layer(layer, config.hidden_size)
            torch.testing.assert_close(y, out, rtol=0, atol=2e-6 * float(out.abs().max()))
            torch.testing.assert_close(g, grad, rtol=0, atol=2e-5 * float(grad.abs().max()))
            changed = converted(spec, plain, config, {"kind": kind, "alpha": 1.0})
            assert (run_layer(changed, config.hidden_size)[0] - out).abs().max() > 1e-4
        return True

    assert run_ranks(compared, 1) == [True]


def test_a_spec_is_left_as_it_was_and_shared_layers_stay_shared_inside():
    def converted_twice(rank):
        from megatron.core.transformer.transformer_layer import TransformerLayer

        from pipehc.megatron import hyper_connection_layer_spec
        from pipehc.megatron.layer import HyperConnectionLayer

        megatron_job.initialize()
        config = experts(num_layers=4, moe_layer_freq=[0, 1, 1, 0])
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        layers, before = block.layer_specs, [copy(vars(s)) for s in block.layer_specs]
        assert layers[1] is layers[2] and layers[0] is layers[3]
        first = hyper_connection_layer_spec(block, "mhc")
        second = hyper_connection_layer_spec(block, {"kind": "hc", "streams": 2})
        assert block.layer_specs is layers
        for spec, was in zip(layers, before):
            assert vars(spec) == was and spec.module is TransformerLayer and spec.params == {}
        for made, kind in ((first, "mhc"), (second, "hc")):
            assert made is not block and made.layer_norm is block.layer_norm
            assert [s.module for s in made.layer_specs] == [HyperConnectionLayer] * 4
            assert all(s.submodules is old.submodules for s, old in zip(made.layer_specs, layers))
            assert {s.params["residual"].kind for s in made.layer_specs} == {kind}
        with pytest.raises(ValueError, match="convert it once"):
            hyper_connection_layer_spec(first, "mhc")
        return True

    assert run_ranks(converted_twice, 1) == [True]


# -- TransformerEngine's specs, with stand-ins for its modules


def install_stand_ins():
    """Lets get_gpt_layer_with_transformer_engine_spec make its specs of modules that run here: norms that return the residual as
    well, norms fused into the linear after them."""
    from megatron.core.models import backends
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class FusedNormLinear(ColumnParallelLinear):
        def __init__(self, input_size, output_size, *, config, **options):
            super().__init__(input_size, output_size, config=config, **options)
            self.eps = config.layernorm_epsilon
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

        def forward(self, x, *args, **kwargs):
            return super().forward(torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps), *args, **kwargs)

    class NormWithResidual(torch.nn.RMSNorm):
        def __init__(self, config, hidden_size, eps):
            super().__init__(hidden_size, eps)

        def forward(self, x):
            return super().forward(x), x

    class Provider(backends.LocalSpecProvider):
        def linear(self):
            return ColumnParallelLinear

        def fuse_layernorm_and_linear(self):
            return True

        def column_parallel_layer_norm_linear(self):
            return FusedNormLinear

        def layer_norm(self, rms_norm=False, for_qk=False, has_residual=False):
            return NormWithResidual if has_residual else WrappedTorchNorm

        def core_attention(self):
            return CoreAttention

    gpt_layer_specs.TESpecProvider = Provider
    return FusedNormLinear, NormWithResidual


def fused_layer_spec(config, moe=False, **options):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if moe else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        **options,
    )


FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("qk_layernorm", [False, True], ids=["plain", "qk_layernorm"])
def test_norms_fused_into_linears_compute_the_same(moe, qk_layernorm):
    """TransformerEngine's dense layer has both norms inside linears; with experts the second is one that returns its input too."""

    def compared(rank):
        from megatron.core.transformer.identity_op import IdentityOp

        from pipehc.megatron import hyper_connection_layer_spec

        megatron_job.initialize()
        linear, norm = install_stand_ins()
        make = experts if moe else standard_config
        config = make(normalization="RMSNorm", qk_layernorm=qk_layernorm)
        fused_spec, spec = fused_layer_spec(config, moe), local(config, moe)
        parts = spec.submodules.self_attention
        parts = replace(parts, submodules=replace(parts.submodules, core_attention=CoreAttention))
        spec = replace(spec, submodules=replace(spec.submodules, self_attention=parts))
        residual = {"kind": "mhc", "alpha": 0.5}
        fused, unfused = (build(hyper_connection_layer_spec(s, residual), config) for s in (fused_spec, spec))
        assert isinstance(fused.input_layernorm, IdentityOp) and isinstance(fused.self_attention.linear_qkv, linear)
        assert isinstance(fused.pre_mlp_layernorm, norm if moe else IdentityOp)
        names = dict(list(FUSED.items())[: 1 if moe else 2])
        fused.load_state_dict({names.get(k, k): v for k, v in unfused.state_dict().items()}, strict=False)
        width = 4 * CHANNELS
        for layer in (fused, unfused):
            layer.expands = layer.contracts = False
        out, grad, grads = run_layer(unfused, width)
        found = run_layer(fused, width)
        assert torch.equal(found[0], out)
        torch.testing.assert_close(found[1], grad)
        for name, value in grads.items():
            torch.testing.assert_close(found[2][names.get(name, name)], value)
        for layer in (fused, unfused):  # the pieces that our schedules run
            torch.testing.assert_close(run_pieces(layer, width), out)
        return True

    assert run_ranks(compared, 1) == [True]


def run_pieces(layer, width):
    from pipehc.comm.queues import make_queues
    from pipehc.model.sublayers import CONTEXT, build_chain
    from pipehc.recompute import Pass, cut

    x = torch.randn(SEQUENCE, BATCH, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64).float()
    chain = build_chain(layer.sublayers(), cut(2, None), None, None)
    run = Pass(chain, make_queues(x.device), {"x0": x, CONTEXT: {"attention_mask": mask()}}, recompute=True)
    run.forward_all()
    return run.result("compute").detach()


@pytest.mark.parametrize("options", [{}, {"mla_down_proj_fusion": True}, {"qk_l2_norm": True}], ids=str)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_every_transformer_engine_spec_is_converted(options, moe):
    def spec_of(rank):
        from pipehc.megatron import hyper_connection_layer_spec
        from pipehc.megatron.layer import HyperConnectionLayer

        megatron_job.initialize()
        install_stand_ins()
        for config in [standard_config(), *([] if "qk_l2_norm" in options else [latent_experts()])]:
            spec = fused_layer_spec(replace(config, num_moe_experts=4) if moe else config, moe, **options)
            found = hyper_connection_layer_spec(spec, "isohc")
            assert found.module is HyperConnectionLayer and found.submodules is spec.submodules
        return True

    assert run_ranks(spec_of, 1) == [True]
