"""Multi-head latent attention from Megatron's local layers; the parts that 0.19.2 has only with TransformerEngine."""

from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class CoreAttention(MegatronModule):
    """Causal attention whose keys and values may differ in width; Megatron's local one refuses that."""

    def __init__(self, config: Any, softmax_scale: float, **_: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **_: Any
    ) -> torch.Tensor:
        """query, key [s, b, heads, head_dim + rope_dim], value [s, b, heads, head_dim] -> [s, b, heads * head_dim], causal."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class LatentAttention(MLASelfAttention):
    """MLA without query compression: only the latent of keys and values is normalised."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        # Upstream wants TransformerEngine's fused norm + linear for the query here, which q_lora_rank = None has no use for.
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": IdentityOp,
            "kv_layernorm": submodules.kv_layernorm,
        }
