"""A model small enough that a test builds it in a blink, with everything the real one has: dense and expert blocks, MLA."""

import math
from pathlib import Path

import torch

from pipehc.config.loading import load_config
from pipehc.config.schema import Config

DEMO = Path(__file__).parents[2] / "configs" / "cpu_demo.yaml"
TINY = (
    "model.hidden_size=32", "model.blocks=4", "model.dense_blocks=1", "model.heads=2", "model.head_dim=12", "model.rope_dim=6",
    "model.kv_rank=20", "model.expert_ffn_size=16", "model.dense_ffn_size=40", "model.experts=4", "model.experts_active=2",
    "model.bias_update_rate=0.01", "residual.streams=3", "parallel.pp=1", "schedule.name=1f1b", "train.sequence_length=11",
    "train.micro_batch=2", "train.global_batch=8",
)  # fmt: skip


def tiny_config(*overrides: str) -> Config:
    """The demo's configuration made tiny; by default for one process."""
    return load_config(DEMO, [*TINY, *overrides])


def cut(blocks: int, stages: int) -> list[range]:
    """`blocks` blocks in `stages` runs, the first ones longer."""
    ends = [math.ceil(blocks * (s + 1) / stages) for s in range(stages)]
    return [range(start, end) for start, end in zip([0, *ends], ends)]


def micro_batch(config: Config, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random (tokens, labels), int64 [b, s]; equal for equal `index`."""
    generator = torch.Generator().manual_seed(100 + index)
    shape = (config.train.micro_batch, config.train.sequence_length + 1)
    text = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return text[:, :-1], text[:, 1:]
