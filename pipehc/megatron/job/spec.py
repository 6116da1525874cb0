"""Turns the layer specs of an existing Megatron job into their hyper-connection form."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from pydantic import ValidationError

from pipehc.config.schema import ResidualConfig
from pipehc.megatron.job.models import LAYERS, HybridStack
from pipehc.megatron.job.option_values import refuse_unless
from pipehc.megatron.layer import HyperConnectionLayer

Residual = ResidualConfig | Mapping[str, Any] | str

STACK_LAYERS = {"*": "attention_layer", "+": "mla_layer", "G": "gdn_layer", "-": "mlp_layer", "E": "moe_layer"}
"""Symbol of a HybridModel's layer pattern -> its layer's name in the spec of the stack."""


def hyper_connection_layer_spec[Spec: (ModuleSpec, TransformerBlockSubmodules)](spec: Spec, residual: Residual = "mhc") -> Spec:
    """A released GPT layer or block spec, or a HybridModel's stack spec, with hyper-connections in the place of its residual
    additions.

    The first layer of the model copies its input to n streams, the last one reduces them to one, so embedding, final norm and
    output head stay as they are, and so do the names of all of Megatron's parameters. Between layers and stages travel streams
    [s, b, n*C]: give `forward_backward_func` of this package to the job, or call `enable`; Megatron's own would expect [s, b, C].

    Args:
        spec: of one layer (get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec), or of a block
            (get_gpt_decoder_block_spec); dense or MoE, standard attention or MLA. Or of a HybridStack, whose Mamba layers, sparse
            attention and layers of other classes stay as they are. It is not changed.
        residual: "hc", "mhc", "isohc", "hybrid", "harmonized", or all settings of the section `residual` of our configuration.

    Raises:
        ValueError: if `residual` has unknown or impossible settings, or a layer of `spec` is not Megatron's TransformerLayer.
    """
    settings = residual_settings(residual)
    if isinstance(spec, TransformerBlockSubmodules):
        layers: list[ModuleSpec] = [_layer(layer, settings) for layer in spec.layer_specs or []]
        return replace(spec, layer_specs=layers)
    if _is_stack(spec):
        converted = {name: _layer(layer, settings, single=True) for name, layer in _stack_layers(spec).items()}
        return replace(spec, submodules=replace(spec.submodules, **converted))
    return _layer(spec, settings)


def residual_settings(residual: Residual) -> ResidualConfig:
    """The checked settings. Raises ValueError naming key, value and what is allowed."""
    if isinstance(residual, ResidualConfig):
        return residual
    given = {"kind": residual} if isinstance(residual, str) else residual
    refuse_unless(isinstance(given, Mapping), "residual", residual, "a kind, a mapping of settings, or None")
    try:
        settings = ResidualConfig(**given)
    except ValidationError as error:
        problems = (f"residual.{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors())
        raise ValueError("; ".join(problems)) from error
    if settings.static and settings.kind != "harmonized":
        raise ValueError(f"residual.static = True with residual.kind = {settings.kind!r}: only harmonized has a static form")
    return settings


def converted_once[Spec: (ModuleSpec, TransformerBlockSubmodules)](spec: Spec, residual: Residual) -> Spec:
    """`hyper_connection_layer_spec`, which leaves alone what has the same form already: `enable` and the functions of hand-written
    loops may both be asked. Raises ValueError if it has another form."""
    layers = [spec]
    if isinstance(spec, TransformerBlockSubmodules):
        layers = spec.layer_specs or []
    elif _is_stack(spec):
        layers = list(_stack_layers(spec).values())
    forms = [layer.params["residual"] for layer in layers if layer.module is HyperConnectionLayer]
    if not forms:
        return hyper_connection_layer_spec(spec, residual)
    settings = residual_settings(residual)
    if len(forms) < len(layers) or any(form != settings for form in forms):
        raise ValueError(
            f"residual.kind = {settings.kind!r}: the decoder's spec has another form of hyper-connections already "
            f"({', '.join(sorted({form.kind for form in forms}))}); give one residual, in one place"
        )
    return spec


def _layer(spec: ModuleSpec, settings: ResidualConfig, single: bool = False) -> ModuleSpec:
    module = spec.module
    if module is HyperConnectionLayer:
        raise ValueError("spec: is in its hyper-connection form already; convert it once")
    if module not in LAYERS:
        kind = "a transformer layer of another class" if _is_layer(module) else "no transformer layer"
        raise ValueError(f"spec: {module} is {kind}; must be megatron.core's TransformerLayer")
    params = {**spec.params, "residual": settings, "ends": True} | ({"single": True} if single else {})
    return replace(spec, module=HyperConnectionLayer, params=params)


def _is_layer(module: Any) -> bool:
    return isinstance(module, type) and issubclass(module, BaseTransformerLayer)


def _is_stack(spec: Any) -> bool:
    return isinstance(spec, ModuleSpec) and isinstance(spec.module, type) and issubclass(spec.module, HybridStack)


def _stack_layers(spec: Any) -> dict[str, ModuleSpec]:
    """The layers of a stack's spec that have a hyper-connection form, or are in it, by name."""
    found = {name: getattr(spec.submodules, name, None) for name in STACK_LAYERS.values()}
    return {name: layer for name, layer in found.items() if getattr(layer, "module", None) in (*LAYERS, HyperConnectionLayer)}
