"""Parameter counts of a configuration in closed form: no model is built."""

from __future__ import annotations

from dataclasses import dataclass

from pipehc.config.schema import Config, ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by how they are spread: `experts` (routed ones) over ep, `cut` over tp, `common` on each rank."""

    common: int = 0
    cut: int = 0
    experts: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.common + other.common, self.cut + other.cut, self.experts + other.experts)

    @property
    def total(self) -> int:
        return self.common + self.cut + self.experts

    def on_rank(self, tp: int, ep: int) -> int:
        return self.common + self.cut // tp + self.experts // ep


def attention(model: ModelConfig) -> Parameters:
    """MLA without query compression and biases, and its pre-norm. Every rank has the down-projection of keys and values."""
    hidden, heads = model.hidden_size, model.heads
    query = hidden * heads * (model.head_dim + model.rope_dim)
    # One RoPE part of the keys serves all heads.
    latent = hidden * (model.kv_rank + model.rope_dim) + model.kv_rank
    key_value = model.kv_rank * heads * (model.head_dim + model.head_dim)
    output = heads * model.head_dim * hidden
    return Parameters(hidden + latent, query + key_value + output)


def swiglu(hidden_size: int, ffn_size: int) -> int:
    return 3 * hidden_size * ffn_size


def hyper_connection(config: Config) -> int:
    """The mappings of one sub-layer: phi [nC, n^2 + 2n] with the RMSNorm weight absorbed, b, three alpha. Plain residual: 0.

    HC and Harmonized HC project each stream alone: phi [C, n + 2]; the static form has b only; hybrid learns its lambda too.
    """
    kind, n, hidden = config.residual.kind, config.residual.streams, config.model.hidden_size
    if kind == "none":
        return 0
    mappings = n * n + 2 * n
    if config.residual.static:
        return mappings
    phi = hidden * (n + 2) if kind in ("hc", "harmonized") else n * hidden * mappings
    return phi + mappings + 3 + (kind == "hybrid")


def block(config: Config, index: int) -> Parameters:
    """Attention, FFN or experts, their pre-norms and hyper-connections. The balancing bias of the router is a buffer."""
    model = config.model
    hidden = model.hidden_size
    found = attention(model) + Parameters(hidden + 2 * hyper_connection(config))
    if index < model.dense_blocks:
        return found + Parameters(cut=swiglu(hidden, model.dense_ffn_size))
    shared = swiglu(hidden, model.experts_shared * model.expert_ffn_size)
    return found + Parameters(hidden * model.experts, shared, model.experts * swiglu(hidden, model.expert_ffn_size))


def embedding(model: ModelConfig) -> int:
    """The input embedding; the output head, which is not tied to it, has as many."""
    return model.vocab_size * model.hidden_size


def depth_module(config: Config) -> Parameters:
    """Of multi-token prediction: a block like the last one, the projection of hidden state and embedding, three norms."""
    hidden = config.model.hidden_size
    return block(config, config.model.blocks - 1) + Parameters(3 * hidden, 2 * hidden * hidden)


def second_embedding(config: Config) -> int:
    """The copy that the last stage has for its depth modules, where the first is another: the same parameters once more."""
    return embedding(config.model) if config.model.mtp_depth and config.stages > 1 else 0


def stages(config: Config) -> list[Parameters]:
    """Each stage once: the first with the embedding, the last with the final norm, the output head, and the depth modules with
    their copy of the embedding."""
    counts = [sum((block(config, index) for index in blocks), Parameters()) for blocks in config.stage_blocks()]
    counts[0] += Parameters(cut=embedding(config.model))
    counts[-1] += Parameters(config.model.hidden_size, embedding(config.model) + second_embedding(config))
    counts[-1] = sum([depth_module(config)] * config.model.mtp_depth, counts[-1])
    return counts


def total(config: Config) -> int:
    """Of the model, whatever it is cut into."""
    return sum(stage.total for stage in stages(config)) - second_embedding(config)


def active(config: Config) -> int:
    """What a token meets in a product of the training: everything but the input embedding and the experts not chosen."""
    model = config.model
    with_experts = model.moe_blocks + (model.mtp_depth if model.moe_blocks else 0)
    idle = with_experts * (model.experts - model.experts_active) * swiglu(model.hidden_size, model.expert_ffn_size)
    return total(config) - embedding(model) - idle


def vocabulary(config: Config) -> int:
    """Input embedding and output head."""
    return 2 * embedding(config.model)


def ranks(config: Config) -> list[int]:
    """What a rank holds at each position of the pipeline: all its stages (under dualpipe one of each direction), its part of what
    is cut, its share of the routed experts."""
    placement, parallel = config.placement, config.parallel
    of_stage = [stage.on_rank(parallel.tp, parallel.ep) for stage in stages(config)]
    return [sum(of_stage[stage] for _, stage in placement.held(rank)) for rank in range(config.parallel.pp)]
