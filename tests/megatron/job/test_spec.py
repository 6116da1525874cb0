"""Released layer and block specs in their hyper-connection form, one process: what changes, and that nothing else does."""

import multiprocessing
from copy import copy
from dataclasses import replace

import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer  # noqa: F401
import megatron_job
import pytest
import torch
from megatron_attention import CoreAttention, LatentAttention
from processes import run_ranks
from torch.nn.functional import gelu

SEQUENCE, BATCH, CHANNELS = 7, 2, 24
KINDS = ("hc", "mhc", "isohc", "hybrid", "harmonized")


def standard_config(**overrides):
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "num_layers": 1,
        "hidden_size": CHANNELS,
        "num_attention_heads": 3,
        "ffn_hidden_size": 40,
        "add_bias_linear": True,
        "activation_func": gelu,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": torch.float32,
        "perform_initialization": True,
    }
    return TransformerConfig(**(options | overrides))


def experts(**overrides):
    options = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 20,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "add_bias_linear": False,
        "moe_grouped_gemm": False,
    }
    return standard_config(**(options | overrides))


def latent(**overrides):
    return megatron_job.model_config(layers=1, **({"moe_layer_freq": [0]} | overrides))


def latent_experts(**overrides):
    return megatron_job.model_config(layers=1, **({"moe_layer_freq": [1]} | overrides))


def local(config, moe=False, **options):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if moe else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
        **options,
    )


def local_latent(config, moe=False):
    """With what MLA lacks without TransformerEngine."""
    spec = local(config, moe)
    attention = spec.submodules.self_attention
    parts = replace(attention.submodules, core_attention=CoreAttention)
    return replace(
        spec, submodules=replace(spec.submodules, self_attention=replace(attention, module=LatentAttention, submodules=parts))
    )


def from_block(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization).layer_specs[0]


SPECS = {
    "dense": (standard_config, local),
    "dense, RMSNorm, no biases": (lambda: standard_config(normalization="RMSNorm", add_bias_linear=False), local),
    "dense, gated, grouped queries": (
        lambda: standard_config(
            num_attention_heads=4, num_query_groups=2, gated_linear_unit=True, activation_func=torch.nn.functional.silu
        ),
        local,
    ),
    "dense, qk_layernorm": (lambda: standard_config(qk_layernorm=True), local),
    "dense, qk_l2_norm": (lambda: standard_config(qk_l2_norm=True), lambda config: local(config, qk_l2_norm=True)),
    "dense, dropout": (lambda: standard_config(hidden_dropout=0.2, attention_dropout=0.1), local),
    "experts": (experts, lambda config: local(config, True)),
    "experts, all-gather": (lambda: experts(moe_token_dispatcher_type="allgather"), lambda config: local(config, True)),
    "experts, dropout": (lambda: experts(hidden_dropout=0.2), lambda config: local(config, True)),
    "latent attention": (latent, local_latent),
    "latent attention, experts": (latent_experts, lambda config: local_latent(config, True)),
    "block spec, dense": (standard_config, from_block),
    "block spec, experts": (experts, from_block),
}


def build(spec, config, seed=5):
    from megatron.core.transformer.spec_utils import build_module

    torch.manual_seed(seed)
    layer = build_module(spec, config=config, layer_number=1)
    for parameter in layer.parameters():
        if parameter.dim() < 2:  # biases and norms that are not what they start as
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def converted(spec, plain, config, residual):
    """The layer of the hyper-connection form, with the weights of `plain`."""
    from pipehc.megatron import hyper_connection_layer_spec

    layer = build(hyper_connection_layer_spec(spec, residual), config, seed=6)
    for name, module in layer.named_modules():
        if name in ("attention_connection", "mlp_connection") and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("attention_connection.", "mlp_connection.")) for name in missing)
    return layer


def mask():
    return torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1)


def run_layer(layer, width, dtype=torch.float32):
    """Output, gradient of the input, gradients by name: for a fixed input, fixed random numbers and a fixed loss."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SEQUENCE, BATCH, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(SEQUENCE, BATCH, width, generator=generator, dtype=torch.float64).to(dtype)
    torch.manual_seed(11)
    model_parallel_cuda_manual_seed(11)
    out, _ = layer(x, attention_mask=mask())
    (out * weight).sum().backward()
    return out.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


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


# -- dtypes, sequence parallelism


@pytest.mark.parametrize("kind", KINDS)
def test_maps_stay_fp32_in_a_bf16_model(kind):
    def bf16(rank):
        from megatron.core.transformer.module import Float16Module

        from pipehc.megatron import hyper_connection_layer_spec

        megatron_job.initialize()
        config = standard_config(bf16=True, params_dtype=torch.bfloat16, num_layers=3)
        layer = build(hyper_connection_layer_spec(local(config), {"kind": kind, "alpha": 0.3}), config)
        layer.layer_number = 2
        layer.expands = False
        Float16Module(config, layer)
        dtypes = {name: p.dtype for name, p in [*layer.named_parameters(), *layer.named_buffers()]}
        own = {name for name in dtypes if name.startswith(("attention_connection.", "mlp_connection."))}
        assert (
            own and {dtypes[n] for n in own} == {torch.float32} and {dtypes[n] for n in dtypes if n not in own} == {torch.bfloat16}
        )
        out, grad, grads = run_layer(layer, 4 * CHANNELS, torch.bfloat16)
        assert out.dtype == grad.dtype == torch.bfloat16 and grads["attention_connection.phi"].dtype == torch.float32
        return True

    assert run_ranks(bf16, 1) == [True]


def test_sequence_parallelism_marks_the_parameters_of_every_map():
    def marked(rank):
        from pipehc.megatron import hyper_connection_layer_spec

        megatron_job.initialize(tp=2)
        found = {}
        for sequence_parallel in (False, True):
            for kind in KINDS:
                config = standard_config(
                    num_attention_heads=4,
                    tensor_model_parallel_size=2,
                    sequence_parallel=sequence_parallel,
                    normalization="RMSNorm",
                )
                layer = build(hyper_connection_layer_spec(local(config), kind), config)
                marks = {getattr(p, "sequence_parallel", False) for n, p in layer.named_parameters() if "_connection." in n}
                assert marks == {sequence_parallel}, (kind, marks)
                assert not any(
                    getattr(p, "tensor_model_parallel", False) for n, p in layer.named_parameters() if "_connection." in n
                )
                found[kind, sequence_parallel] = len(marks)
        return found

    assert len(run_ranks(marked, 2)[0]) == 10


# -- checkpoints


def sharded_tensors(state):
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


LIKE = {"moe_layer_freq": 1}  # all layers have experts
FORMS = [*((kind, False) for kind in KINDS), ("hybrid", True), ("harmonized", True)]


@pytest.mark.parametrize("kind,stacked", FORMS)
def test_sharded_state_is_complete_and_has_global_keys(kind, stacked):
    """stacked: layers of one form are saved as one tensor with a leading axis, Megatron's older way."""

    def keys(rank):
        from megatron.core import parallel_state

        job = megatron_job.Job(schedule=None, pp=2, layers=4, residual=kind, options=LIKE if stacked else {})
        model = job.chunks[0].module
        state = model.sharded_state_dict()
        own = {n for n, _ in [*model.named_parameters(), *model.named_buffers()] if "_connection." in n}
        assert own == {name for name in state if "_connection." in name} and len(own) in (12, 16, 20)
        for name in own:
            tensor = state[name]
            layer = int(name.split(".")[2]) + 2 * parallel_state.get_pipeline_model_parallel_rank()
            rest = name.split(".", 3)[3]
            shape = tuple(model.state_dict()[name].shape)
            if stacked:
                assert tensor.key == f"decoder.layers.{rest}"
                assert tensor.global_shape == (4, *shape) and tensor.global_offset[0] == layer
            else:
                assert tensor.key == f"decoder.layers.{layer}.{rest}" and tensor.global_shape == shape
        return {t.key for t in sharded_tensors(state)}

    first, second = run_ranks(keys, 2)
    connections = {key for key in first | second if "_connection." in key}
    per_layer = {"hybrid": 8, "harmonized": 10}.get(kind, 6)
    assert len(connections) == (per_layer if stacked else 4 * per_layer)


@pytest.mark.slow
@pytest.mark.parametrize("kind,stacked", [("hybrid", False), ("harmonized", True)])
def test_what_two_stages_save_one_process_loads(kind, stacked, tmp_path):
    options = LIKE if stacked else {}
    arguments = {"schedule": None, "layers": 4, "residual": kind, "options": options}

    def save(rank):
        from megatron.core import dist_checkpointing

        job = megatron_job.Job(pp=2, **arguments)
        with torch.no_grad():
            for name, tensor in [*job.chunks[0].named_parameters(), *job.chunks[0].named_buffers()]:
                if name.endswith((".s", "blend_logit", "_connection.alpha")):
                    tensor.copy_(tensor * 0.5 + 0.25 + 0.01 * rank)
        # Megatron's writer starts a process of its own, which a daemon may not.
        multiprocessing.current_process()._config["daemon"] = False
        dist_checkpointing.save(job.chunks[0].module.sharded_state_dict(), str(tmp_path), async_sharded_save=False)
        return job.evaluate(0, 2)

    def load(rank):
        from megatron.core import dist_checkpointing

        job = megatron_job.Job(**arguments)
        fresh = job.evaluate(0, 2)
        model = job.chunks[0].module
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(tmp_path)))
        return fresh, job.evaluate(0, 2)

    saved = run_ranks(save, 2)
    ((fresh, loaded),) = run_ranks(load, 1)
    assert saved[0] == saved[1] == loaded != fresh
