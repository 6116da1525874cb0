"""What the schema accepts and derives, and the configurations of the paper."""

from __future__ import annotations

import pytest
from config_cases import CONFIGS, DEMO
from pydantic import ValidationError

from pipehc.config.loading import check_world_size, load_config
from pipehc.config.schema import Config
from pipehc.config.strict_yaml import ConfigError


def test_checked_however_it_is_made() -> None:
    data = load_config(DEMO).model_dump()
    data["parallel"]["pp"] = 3
    with pytest.raises(ValidationError, match="must be even"):
        Config(**data)


def test_frozen() -> None:
    config = load_config(DEMO)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]
    hash(config)


def test_overrides_and_defaults() -> None:
    config = load_config(
        DEMO, ["optimizer.lr=1e-3", "train.steps=5", "optimizer.warmup_steps=0", "train.steps=7", "parallel.dp=1"]
    )
    assert (config.optimizer.lr, config.train.steps, config.parallel.dp) == (1e-3, 7, 1)
    assert load_config(DEMO, ["optimizer.eps=1E-8"]).optimizer.eps == 1e-8
    assert load_config(DEMO, ["optimizer.lr=1"]).optimizer.lr == 1.0
    assert load_config(DEMO, ["run.folder=2024-01-01"]).run.folder == "2024-01-01"
    assert load_config(DEMO, ["run.folder=a=b"]).run.folder == "a=b"
    assert load_config(DEMO, [" data.paths = [x y, z]"]).data.paths == ("x y", "z")
    assert load_config(DEMO, ["model.dense_ffn_size=null"]).model.dense_ffn_size == 8 * 64
    assert load_config(DEMO, ["evaluation.interval=0", "evaluation.samples=3"]).evaluation.samples == 3


def test_dense_model() -> None:
    dense = [
        "model.dense_blocks=8",
        "model.experts=0",
        "model.experts_active=0",
        "model.experts_shared=0",
        "model.expert_ffn_size=0",
    ]
    config = load_config(DEMO, dense)
    assert (config.model.moe_blocks, config.model.dense_ffn_size) == (0, 512)
    with pytest.raises(ConfigError, match=r"model\.dense_ffn_size: null"):
        load_config(DEMO, [*dense, "model.dense_ffn_size=null"])
    with pytest.raises(ConfigError, match=r"parallel\.ep: 2: must divide model\.experts = 0"):
        load_config(DEMO, [*dense, "parallel.ep=2"])


def test_derived() -> None:
    config = load_config(DEMO)
    assert (config.stages, config.lanes, config.microbatches(1), config.evaluation_microbatches(1)) == (4, 2, 8, 16)
    assert config.stage_blocks() == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert config.stage_message_bytes() == 4 * 128 * 4 * 128 * 4
    half = load_config(DEMO, ["train.precision=bf16", "residual.kind=none", "schedule.name=dualpipev"])
    assert (half.stages, half.lanes, half.stage_message_bytes()) == (8, 1, 4 * 128 * 128 * 2)


@pytest.mark.parametrize(
    "overrides",
    [
        "schedule.name=1f1b parallel.pp=1 train.global_batch=4",
        "schedule.name=1f1b parallel.pp=3 train.global_batch=4",
        "schedule.name=dualpipev parallel.pp=1 train.global_batch=8",
        "schedule.name=dualpipev parallel.pp=4 train.global_batch=36",
        "schedule.name=dualpipe parallel.pp=2 train.global_batch=16",
        "schedule.name=dualpipe parallel.pp=8 train.global_batch=80",
    ],
)
def test_smallest_layouts_are_accepted(overrides: str) -> None:
    load_config(DEMO, overrides.split())


# Table 5 and the recipe of the mHC paper
PAPER = {
    "3b": {
        "blocks": 12,
        "hidden_size": 1280,
        "expert_ffn_size": 896,
        "heads": 16,
        "experts": 64,
        "batch": 320,
        "steps": 30000,
        "lr": 8.6e-4,
    },
    "9b": {
        "blocks": 18,
        "hidden_size": 1920,
        "expert_ffn_size": 1280,
        "heads": 24,
        "experts": 64,
        "batch": 512,
        "steps": 50000,
        "lr": 5.9e-4,
    },
    "27b_pp8": {
        "blocks": 30,
        "hidden_size": 2560,
        "expert_ffn_size": 1536,
        "heads": 32,
        "experts": 72,
        "batch": 1280,
        "steps": 50000,
        "lr": 4e-4,
    },
    "3b_1t": {
        "blocks": 12,
        "hidden_size": 1280,
        "expert_ffn_size": 896,
        "heads": 16,
        "experts": 64,
        "batch": 2560,
        "steps": 100000,
        "lr": 9e-4,
    },
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_configurations(name: str) -> None:
    config, row = load_config(CONFIGS / f"{name}.yaml"), PAPER[name]
    model, optimizer = config.model, config.optimizer
    for key in ("blocks", "hidden_size", "expert_ffn_size", "heads", "experts"):
        assert getattr(model, key) == row[key], key
    assert (config.train.global_batch, config.train.steps, optimizer.lr) == (row["batch"], row["steps"], row["lr"])
    assert (model.vocab_size, model.dense_blocks, model.experts_active, model.experts_shared) == (129280, 1, 6, 2)
    assert (model.head_dim, model.rope_dim, model.rope_theta, model.kv_rank, model.norm_eps) == (128, 64, 1e4, 512, 1e-20)
    assert model.dense_ffn_size == 8 * model.expert_ffn_size
    assert (config.residual.kind, config.residual.streams, config.residual.alpha, config.residual.sinkhorn_iterations) == (
        "mhc",
        4,
        0.01,
        20,
    )
    assert (config.train.sequence_length, config.train.precision) == (4096, "bf16")
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.warmup_steps) == ((0.9, 0.95), 1e-20, 0.1, 2000)
    assert optimizer.decay == ((0.8, 0.316), (0.9, 0.1))
    assert config.parallel.dp is not None
    assert check_world_size(config, config.parallel.pp * config.parallel.dp) == config.parallel.dp
    if name == "27b_pp8":
        assert (config.parallel.pp, config.schedule.name) == (8, "dualpipe")


RETRIEVAL = "data.kind=retrieval train.sequence_length=24"


def test_retrieval() -> None:
    config = load_config(DEMO, RETRIEVAL.split())
    assert (config.data.kind, config.data.pairs) == ("retrieval", 8)
    load_config(DEMO, [*RETRIEVAL.split(), "data.pairs=4", "train.sequence_length=12"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (f"{RETRIEVAL} data.paths=[text]", r"data\.paths: \['text'\]: must be left out with data\.kind retrieval"),
        (f"{RETRIEVAL} data.tokenizer=words.json", r"data\.tokenizer: 'words\.json': must be left out"),
        (f"{RETRIEVAL} data.end_of_document=a", r"data\.end_of_document: 'a': must be left out"),
        (f"{RETRIEVAL} data.suffixes=[.c]", r"data\.suffixes: \['\.c'\]: must be left out"),
        (f"{RETRIEVAL} data.validation_fraction=0.2", r"data\.validation_fraction: 0\.2: must be left out"),
        (f"{RETRIEVAL} model.vocab_size=255", r"model\.vocab_size: 255: must be at least 256 with data\.kind retrieval"),
        (f"{RETRIEVAL} train.sequence_length=23", r"train\.sequence_length: 23: must be at least 3 x data\.pairs = 24"),
        ("data.pairs=4", r"data\.pairs: 4: only retrieval takes it, but data\.kind is text"),
        (f"{RETRIEVAL} data.pairs=129", r"data\.pairs: 129: .*at most 128"),
    ],
)
def test_what_retrieval_does_not_take(overrides: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_config(DEMO, overrides.split())
    assert "\n" not in str(error.value)
