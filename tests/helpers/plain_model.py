"""The model with the plain residual in plain PyTorch, one position after the other where that is clearer."""

import math

import torch
from torch.nn.functional import cross_entropy, embedding, linear, silu

from pipehc.config.schema import Config


class PlainModel:
    """w: weights, and biases of experts, by name; whoever wants fp64 gives that. Activations are [b, s, ...]."""

    def __init__(self, config: Config, w: dict[str, torch.Tensor]) -> None:
        self.m, self.w = config.model, w

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[b, s] each -> the sum over labels from 0 on."""
        return self.summed(self.hidden(tokens), labels)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in range(self.m.blocks):
            x = self.block(x, f"decoder.layers.{block}", dense=block < self.m.dense_blocks)
        return self.norm(x, "decoder.final_layernorm.weight")

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return embedding(tokens, self.w["embedding.word_embeddings.weight"])

    def summed(self, normed: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = linear(normed, self.w["output_layer.weight"])
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-1)

    def block(self, x: torch.Tensor, name: str, dense: bool) -> torch.Tensor:
        x = x + self.attention(self.norm(x, f"{name}.input_layernorm.weight"), f"{name}.self_attention")
        ffn = self.swiglu if dense else self.experts
        return x + ffn(self.norm(x, f"{name}.pre_mlp_layernorm.weight"), f"{name}.mlp")

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.m.norm_eps).rsqrt() * self.w[name]

    def swiglu(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gate, up = linear(x, self.w[f"{name}.linear_fc1.weight"]).chunk(2, -1)
        return linear(silu(gate) * up, self.w[f"{name}.linear_fc2.weight"])

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, heads, rope_dim]: pairs of neighbours as complex numbers, turned by position."""
        turns = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * self.m.rope_theta ** (
            -torch.arange(0, self.m.rope_dim, 2, dtype=torch.float64) / self.m.rope_dim
        )
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(turns), turns)[None, :, None]).flatten(-2)

    def attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        m, w = self.m, self.w
        q = linear(x, w[f"{name}.linear_q_proj.weight"]).unflatten(-1, (m.heads, m.head_dim + m.rope_dim))
        latent, k_rope = linear(x, w[f"{name}.linear_kv_down_proj.weight"]).split([m.kv_rank, m.rope_dim], -1)
        kv = linear(self.norm(latent, f"{name}.kv_layernorm.weight"), w[f"{name}.linear_kv_up_proj.weight"])
        k, v = kv.unflatten(-1, (m.heads, 2 * m.head_dim)).split(m.head_dim, -1)
        q = torch.cat([q[..., : m.head_dim], self.rotate(q[..., m.head_dim :])], -1)
        k = torch.cat([k, self.rotate(k_rope[:, :, None]).expand(-1, -1, m.heads, -1)], -1)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(m.head_dim + m.rope_dim)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return linear(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2), w[f"{name}.linear_proj.weight"])

    def experts(self, x: torch.Tensor, name: str) -> torch.Tensor:
        m, w = self.m, self.w
        out = self.swiglu(x, f"{name}.shared_experts")
        scores = linear(x, w[f"{name}.router.weight"]).sigmoid()
        chosen = (scores + w[f"{name}.router.expert_bias"]).topk(m.experts_active, -1).indices
        share = scores.gather(-1, chosen)
        share = share / share.sum(-1, keepdim=True)
        routed = torch.zeros_like(out)
        for b in range(x.shape[0]):
            for s in range(x.shape[1]):
                for k in range(m.experts_active):
                    routed[b, s] += share[b, s, k] * self.swiglu(x[b, s], f"{name}.experts.{int(chosen[b, s, k])}")
        return out + routed
