"""Multi-head latent attention from Megatron's local layers; the parts that 0.19.2 has only with TransformerEngine."""

from contextlib import nullcontext
from functools import partial
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from pipehc.megatron.norm import rms_norm
from pipehc.megatron.trainer.rebuilt import rebuilt
from pipehc.megatron.trainer.rotary import Rotation


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
    """MLA without query compression: only the latent of keys and values is normalised.

    rotation: of all positions; what is between products and attention then takes three launches, else it is upstream's.
    rebuild: keys and values, which take most of what attention keeps, are made again from their latent in the backward.

    With tensor parallelism every rank has its heads, and the whole down-projection of keys and values, for its own tokens: then the
    latents are gathered, not the hidden states. Upstream's local layers cut the down-projection; the rotary part of the keys,
    which all heads share, then gets the gradients of one rank's heads alone (0.19.2).
    """

    linear_kv_down_proj: Any

    def __init__(
        self,
        *args: Any,
        rotation: Rotation | None = None,
        rebuild: bool = False,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        self.rotation, self.rebuild = rotation, rebuild
        if self.config.sequence_parallel:
            self.linear_kv_down_proj = _whole(self.linear_kv_down_proj, self.config, pg_collection.expt_tp)

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **given: Any) -> Any:
        """[s, b, C] -> [s, b, C] and no bias, causal."""
        if self.rotation is None:
            return super().forward(hidden_states, attention_mask, **given)
        c, up = self.config, self.linear_kv_up_proj
        heads = self.num_attention_heads_per_partition
        join = partial(self.rotation.keys_and_values, heads=heads, k_dim=c.qk_head_dim)
        q, _ = self.linear_q_proj(hidden_states)
        query = self.rotation.queries(q, heads)
        latent, _ = self.linear_kv_down_proj(hidden_states)
        latent, k_rope = latent.split([c.kv_lora_rank, c.qk_pos_emb_head_dim], -1)
        latent = rms_norm(latent, self.kv_layernorm.weight, c.layernorm_epsilon)
        key, value = join(up(latent)[0], self._of_all_tokens(k_rope))
        kept = latent.detach(), k_rope.detach()

        def again() -> tuple[torch.Tensor, torch.Tensor]:
            latent, k_rope = kept
            with torch.no_grad():
                latent, k_rope = self._of_all_tokens(latent), self._of_all_tokens(k_rope)
                return join((latent.flatten(0, 1) @ up.weight.t()).view(*latent.shape[:2], -1), k_rope)

        with rebuilt((key, value), again) if self.rebuild else nullcontext():
            out = self.core_attention(query, key, value, None)
        return self.linear_proj(out)

    def _of_all_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, k] of this rank's tokens -> [s, b, k] of all, whose gradient is summed over the ranks."""
        if not self.config.sequence_parallel:
            return x
        gathered: torch.Tensor = gather_from_sequence_parallel_region(x, group=self.tp_group)
        return gathered

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        # Upstream wants TransformerEngine's fused norm + linear for the query here, which q_lora_rank = None has no use for.
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": IdentityOp,
            "kv_layernorm": submodules.kv_layernorm,
        }


def _whole(part: ColumnParallelLinear, config: Any, alone: Any) -> ColumnParallelLinear:
    """The layer that `part` has some rows of, all on this rank. alone: the group of this rank."""
    with catch_warnings():
        filterwarnings("ignore", message="`sequence_parallel` is set")
        whole = ColumnParallelLinear(
            part.input_size, part.output_size, config=config, init_method=config.init_method, bias=False, tp_group=alone
        )
    whole.weight.tensor_model_parallel = False
    return whole
