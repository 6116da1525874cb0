"""MLA of a user's job without TransformerEngine: what 0.19.2's local layers lack."""

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


def context_positions(length, size, rank):
    """Which positions of a sequence a context-parallel rank has in Megatron: a chunk from the front, one from the back."""
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


class CoreAttention(MegatronModule):
    """Causal attention whose keys and values may differ in width; under context parallelism every rank gathers all of them."""

    def __init__(self, config, softmax_scale=None, **_):
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask=None, **_):
        group = parallel_state.get_context_parallel_group()
        length, size = len(query) * group.size(), group.size()
        own, *_ = places = [context_positions(length, size, (group.rank() + i) % size) for i in range(size)]
        if size > 1:
            order = torch.cat(sorted(places, key=lambda place: int(place[0]))).argsort()
            key, value = (gather_from_sequence_parallel_region(t.contiguous(), group=group)[order] for t in (key, value))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask = own[:, None] >= torch.arange(length)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
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
