"""MLA of a user's job without TransformerEngine: what 0.19.2's local layers lack."""

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class CoreAttention(MegatronModule):
    """Causal attention whose keys and values may differ in width."""

    def __init__(self, config, softmax_scale=None, **_):
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask=None, **_):
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {}


class LatentAttention(MLASelfAttention):
    def _resolve_qk_norm_config(self, submodules):
        return dict(
            linear_q_proj=submodules.linear_q_proj,
            linear_q_up_proj=submodules.linear_q_up_proj,
            linear_kv_up_proj=submodules.linear_kv_up_proj,
            q_layernorm=IdentityOp,
            kv_layernorm=submodules.kv_layernorm or IdentityOp,
        )

    def _qkv_down_projection(self, hidden_states):
        """Upstream never sums the gradient of k_pos_emb over tensor parallelism: hand on what it treats rightly."""
        q, kv = super()._qkv_down_projection(hidden_states)
        config = self.config
        if kv.size(-1) != config.kv_lora_rank + config.qk_pos_emb_head_dim:
            kv = gather_from_tensor_model_parallel_region(kv)
            if config.sequence_parallel:
                kv = scatter_to_sequence_parallel_region(kv)
            else:
                latent, position = kv.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], -1)
                kv = torch.cat([latent, copy_to_tensor_model_parallel_region(position)], -1)
        return q, kv
