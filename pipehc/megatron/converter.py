"""Parameters of hyper-connections from and to Megatron main's `HyperConnectionModule` (`enable_mhc_connections`).

Both compute the mHC of the paper, H_pre = sigmoid(.), H_post = 2 sigmoid(.), x' = H_res x + H_post^T F(H_pre x), over streams
[s, b, n*C], with the n*n + 2n logits in the order pre, post, res (row-major, row = the stream that is written). What differs is
packing and names, and both ways of the conversion are exact:

    ours                          Megatron main
    attention_connection.         self_attention_hyper_connection.
    mlp_connection.               mlp_hyper_connection.
    phi    [n*C, n*n + 2n]        mapping_proj.weight  [n*n + 2n, n*C], its transpose
    alpha  [3]                    alpha_pre, alpha_post, alpha_res  [1] each
    bias   [n*n + 2n]             bias
                                  norm.weight  [n*C] of early revisions: absorbed in phi, as in the paper's section 4.3.1

Layers of its HybridModel main puts into a wrapper (`HyperConnectionHybridLayer`) with one connection; ours keep their names:

    layers.N.attention_connection. or .mlp_connection.     layers.N.hyper_connection.
    layers.N.self_attention., .mlp., ...                   layers.N.inner_layer.self_attention., .mlp., ...

Revisions whose hybrid stack joins the streams by learned weights (hc_head_fn) and its Mamba layers have no counterpart here.

What the conversion cannot carry over, since it lies in the arithmetic:

- Sinkhorn. Main normalises rows first and columns last, we the other way round (paper eq. 9). So its columns sum to 1 to
  rounding and its rows nearly, ours the reverse: here the forward gain is exactly 1, there the backward gain. H_res itself
  differs by what the iterations leave undone, which hangs on how peaked the logits are. Largest difference of any entry over
  10000 matrices, n = 4, logits normal with standard deviation 0.5: around zero, as main starts, 1.4e-10 after 20 iterations;
  around 4 I, as we start, 1.2e-2 (on average over matrices 2.0e-3), and 7e-6 (6e-9) after 200.
- The epsilon of the norm: main divides by rms(x) + 1e-6, we by sqrt(rms(x)^2 + 1e-20). Relative difference 1e-6 / rms(x).
- Precision: main's maps take the dtype of the model, ours are fp32. Convert from fp32 main parameters where there are some.
- Hidden dropout: main draws it per stream, after H_post, we once, before it. No difference in evaluation or with dropout 0.
- Streams are joined at the end by their mean in main: set residual.exit = "mean" here, which is the default.

Main's mHC layers have a dense FFN and no pipeline stages; ours have no such limits, so a model of ours may not fit there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NAMES = {"attention_connection": "self_attention_hyper_connection", "mlp_connection": "mlp_hyper_connection"}
OURS = ("phi", "alpha", "bias")
MAINS = ("mapping_proj.weight", "alpha_pre", "alpha_post", "alpha_res", "bias")
NORM = "norm.weight"


def connection_from_megatron(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a `HyperConnection` of kind mhc, fp32 (fp64 stays), from that of a `HyperConnectionModule`.

    Raises:
        ValueError: for names or shapes that main's module does not have.
    """
    _expect(parameters, MAINS, optional=(NORM,))
    weight, bias = parameters["mapping_proj.weight"], parameters["bias"]
    if weight.dim() != 2:
        raise ValueError(f"mapping_proj.weight: shape {list(weight.shape)}; must be [n*n + 2n, n*C]")
    n = _streams(bias)
    _expect_shape("mapping_proj.weight", weight, (bias.numel(), weight.shape[-1]))
    _expect_divisible("mapping_proj.weight", weight, weight.shape[1], n)
    alphas = [parameters[name] for name in MAINS[1:4]]
    for name, value in zip(MAINS[1:4], alphas):
        if value.numel() != 1:
            raise ValueError(f"{name}: shape {list(value.shape)}; must be [1]")
    phi = _wide(weight).mT
    if NORM in parameters:
        _expect_shape(NORM, parameters[NORM], (weight.shape[1],))
        phi = phi * _wide(parameters[NORM]).unsqueeze(1)
    return {
        "phi": phi.contiguous(),
        "alpha": torch.cat([_wide(value).reshape(1) for value in alphas]),
        "bias": _wide(bias).clone(),
    }


def connection_to_megatron(parameters: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """State dict of a `HyperConnectionModule` from that of a `HyperConnection` of kind mhc.

    dtype: of the result, that of the Megatron model (`params_dtype`); None keeps fp32.

    Raises:
        ValueError: for a kind without counterpart in main (hc, hybrid, harmonized, known by their parameters; isohc has those of
            mhc: the caller knows), or shapes that fit no number of streams.
    """
    for name, kind in (("blend_logit", "hybrid"), ("s", "harmonized")):
        if name in parameters:
            raise ValueError(f"{name}: is of kind {kind!r}, and Megatron main has no counterpart; must be of kind 'mhc'")
    _expect(parameters, OURS)
    phi, alpha, bias = (parameters[name] for name in OURS)
    n = _streams(bias)
    if phi.dim() == 2 and phi.shape[1] == n + 2:
        raise ValueError(
            "phi: projects every stream on its own (kind 'hc'), and Megatron main has no counterpart; must be of kind 'mhc'"
        )
    _expect_shape("alpha", alpha, (3,))
    if phi.dim() != 2 or phi.shape[1] != bias.numel():
        raise ValueError(f"phi: shape {list(phi.shape)}; must be [n*C, {bias.numel()}]")
    _expect_divisible("phi", phi, phi.shape[0], n)
    found = {"mapping_proj.weight": phi.mT.contiguous(), "bias": bias.clone()}
    found.update((name, value.clone()) for name, value in zip(MAINS[1:4], alpha.split(1)))
    return {name: value if dtype is None else value.to(dtype) for name, value in found.items()}


def state_dict_from_megatron(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a model (or a layer, or a wrapped model) of main's, for the same model with our mHC layers.

    Everything but hyper-connections is handed on as it is. To be used on what `model.state_dict()` gives; of a distributed
    checkpoint, load it into main's model first.

    Raises:
        ValueError: naming the parameter, if a module has no counterpart.
    """
    return _state_dict(_unwrapped(state), {theirs: ours for ours, theirs in NAMES.items()}, connection_from_megatron)


def state_dict_to_megatron(state: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The way back of `state_dict_from_megatron`. dtype: of the maps' parameters; None keeps fp32."""
    return _wrapped(_state_dict(state, NAMES, lambda parameters: connection_to_megatron(parameters, dtype)))


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of main's HybridModel under the names that they would have in its GPTModel."""
    parts: dict[str, str] = {}  # layer with a wrapper -> its connection
    for name in state:
        if re.fullmatch(r"(.*\.|)hc_head_(fn|base|scale)", name):
            raise ValueError(f"{name}: joins the streams by learned weights, which has no counterpart; must be without")
        if match := re.fullmatch(r"(.*\.|)inner_layer\.(self_attention|mlp|mixer)\..+", name):
            if match[2] == "mixer":
                raise ValueError(f"{name}: is of a Mamba layer, which has no counterpart; must be attention or an FFN")
            parts[match[1]] = f"{match[2]}_hyper_connection."

    def unwrapped(name: str) -> str:
        match = re.fullmatch(r"(.*\.|)(inner_layer|hyper_connection)\.(.+)", name)
        if match is None:
            return name
        if match[1] not in parts:
            raise ValueError(f"{name}: its layer has no inner_layer.self_attention or inner_layer.mlp; must have one of them")
        return f"{match[1]}{'' if match[2] == 'inner_layer' else parts[match[1]]}{match[3]}"

    return {unwrapped(name): value for name, value in state.items()}


def _wrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """The way back: layers with one connection are those of a HybridModel."""
    pattern = re.compile(rf"(.*\.|)({'|'.join(NAMES.values())})\.(.+)")
    connections: dict[str, set[str]] = {}
    for match in filter(None, map(pattern.fullmatch, state)):
        connections.setdefault(match[1], set()).add(match[2])
    layers = {layer for layer, found in connections.items() if len(found) == 1}

    def wrapped(name: str) -> str:
        if (match := pattern.fullmatch(name)) is not None:
            return f"{match[1]}hyper_connection.{match[3]}" if match[1] in layers else name
        layer = next((name[:end] for end in _ends_of_prefixes(name) if name[:end] in layers), None)
        return name if layer is None else f"{layer}inner_layer.{name[len(layer) :]}"

    return {wrapped(name): value for name, value in state.items()}


def _ends_of_prefixes(name: str) -> list[int]:
    """0 and the places behind its dots."""
    return [0, *(i + 1 for i, character in enumerate(name) if character == ".")]


def _state_dict(state: Mapping[str, Any], names: Mapping[str, str], convert: Any) -> dict[str, Any]:
    pattern = re.compile(rf"(.*\.|)({'|'.join(names)})\.(.+)")
    found: dict[str, Any] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = pattern.fullmatch(name)
        if match is None:
            found[name] = value
        elif match[3] != "_extra_state":
            modules.setdefault(f"{match[1]}{names[match[2]]}", {})[match[3]] = value
    if not modules:
        raise ValueError(f"state: has no {' or '.join(names)}; must be of a model with hyper-connections")
    for module, parameters in modules.items():
        try:
            converted = convert(parameters)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
        found.update((f"{module}.{name}", value) for name, value in converted.items())
    return found


def _wide(value: Tensor) -> Tensor:
    """fp32, the precision of our maps; fp64 stays."""
    return value if value.dtype == torch.float64 else value.float()


def _streams(bias: Tensor) -> int:
    """n of n*n + 2n."""
    n = math.isqrt(bias.numel() + 1) - 1
    if bias.dim() != 1 or n < 1 or n * n + 2 * n != bias.numel():
        raise ValueError(f"bias: shape {list(bias.shape)}; must be [n*n + 2n] for n streams, such as [24] for 4")
    return n


def _expect(parameters: Mapping[str, Tensor], names: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    missing = [name for name in names if name not in parameters]
    unknown = [name for name in parameters if name not in names and name not in optional]
    if missing or unknown:
        what = f"{missing[0]}: is missing" if missing else f"{unknown[0]}: has no counterpart"
        raise ValueError(f"{what}; must be {', '.join(names)}")


def _expect_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: shape {list(value.shape)}; must be {list(shape)}")


def _expect_divisible(name: str, value: Tensor, width: int, n: int) -> None:
    if width % n:
        raise ValueError(f"{name}: shape {list(value.shape)}; its {width} inputs must be a multiple of the {n} streams")
