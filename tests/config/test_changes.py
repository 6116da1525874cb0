"""What changes of the configuration mean for a training that goes on: every key is classified, unused ones do not count."""

import pytest
from config_cases import DEMO

from pipehc.config.changes import EFFECTS, Effect, changes, saved_values, unknown
from pipehc.config.loading import load_config, to_yaml
from pipehc.config.schema import Config
from pipehc.config.strict_yaml import ConfigError


def changed(before: str, now: str) -> dict[str, Effect]:
    saved = saved_values(to_yaml(load_config(DEMO, before.split())))
    assert saved is not None
    return {change.key: change.effect for change in changes(saved, load_config(DEMO, now.split()))}


def test_every_key_of_the_schema_is_classified_and_no_other() -> None:
    keys = {f"{section}.{key}" for section, field in Config.model_fields.items() for key in field.annotation.model_fields}
    assert EFFECTS.keys() == keys


@pytest.mark.parametrize("change", [
    "residual.kind=hc", "residual.exit=sum", "residual.streams=2", "residual.sinkhorn_iterations=3", "residual.fixed=[pre]",
    "model.experts_active=1", "model.rope_theta=500000", "model.norm_eps=1e-6", "model.hidden_size=64", "model.heads=2",
    "model.vocab_size=512", "model.blocks=9", "model.dense_blocks=2", "model.head_dim=16", "model.rope_dim=8", "model.kv_rank=32",
    "model.expert_ffn_size=32", "model.dense_ffn_size=64", "model.experts=4", "model.experts_shared=2",
    "model.mtp_depth=1",
])  # fmt: skip
def test_another_model(change: str) -> None:
    assert changed("", change) == {change.split("=")[0]: Effect.MODEL}


@pytest.mark.parametrize("change", [
    "parallel.pp=2", "parallel.dp=1", "schedule.name=dualpipev", "recompute.enabled=false", "train.micro_batch=2",
    "evaluation.interval=5", "checkpoint.interval=3", "run.folder=elsewhere", "runtime.overlap=false", "runtime.transport=host",
    "trace.nvtx=true", "model.init_std=0.5", "residual.alpha=0.5", "search.f=2", "checkpoint.resume=never",
    # used by no hyper-connection of this kind
    "residual.condition=10", "residual.target_gain=3", "residual.smallest_s=0.5",
    # used by depth modules
    "model.mtp_loss_weight=1", "model.mtp_input=sum",
])  # fmt: skip
def test_changes_that_do_not_matter(change: str) -> None:
    assert changed("", change) == {}


def test_changes_that_are_said() -> None:
    now = "train.steps=300 train.global_batch=64 optimizer.lr=1e-4 train.precision=bf16 model.bias_update_rate=0"
    now += " evaluation.samples=128"
    assert changed("", now) == {change.split("=")[0]: Effect.TRAINING for change in now.split()}
    retrieval = "data.kind=retrieval"
    assert changed(retrieval, f"{retrieval} data.pairs=4") == {"data.pairs": Effect.DATA}
    assert changed("data.suffixes=[.c]", retrieval) == {"data.kind": Effect.DATA, "data.suffixes": Effect.DATA}
    assert changed("", "train.seed=3 data.suffixes=[.c]") == {"train.seed": Effect.DATA, "data.suffixes": Effect.DATA}


def test_keys_count_where_they_are_used() -> None:
    plain = "residual.kind=none"
    assert changed(plain, f"{plain} residual.streams=2 residual.exit=sum residual.fixed=[pre]") == {}
    assert changed("residual.kind=isohc", "residual.kind=isohc residual.sinkhorn_iterations=3") == {}
    assert changed("residual.kind=isohc", "residual.kind=isohc residual.condition=10") == {"residual.condition": Effect.MODEL}
    assert changed("residual.kind=harmonized", "residual.kind=harmonized residual.target_gain=3") == {
        "residual.target_gain": Effect.TRAINING
    }
    assert changed("residual.fixed=[pre,res]", "residual.fixed=[res,pre]") == {}  # a set
    deep = "model.mtp_depth=1"
    assert changed(deep, f"{deep} model.mtp_loss_weight=1 model.mtp_input=sum") == {
        "model.mtp_loss_weight": Effect.TRAINING,
        "model.mtp_input": Effect.MODEL,
    }
    dense = "model.dense_blocks=8"
    assert changed(dense, f"{dense} model.experts_active=1 model.experts_shared=0 model.bias_update_rate=0") == {}
    assert changed("model.dense_blocks=0", "model.dense_blocks=0 model.dense_ffn_size=64") == {}


def test_configurations_of_other_versions() -> None:
    saved = saved_values(to_yaml(load_config(DEMO, ["checkpoint.keep=9"])))
    assert saved is not None
    del saved["residual"]["exit"], saved["trace"], saved["optimizer"]["lr"]  # lr has no default: nobody knows what it was
    assert changes(saved, load_config(DEMO)) == []
    [change] = changes(saved, load_config(DEMO, ["residual.exit=sum"]))
    assert (change.key, change.before, change.now) == ("residual.exit", "mean", "sum")
    saved["residual"]["twist"] = 3
    saved["moon"] = {"phase": 1}
    assert unknown(saved) == ["residual.twist", "moon.phase"]
    for text in (None, 7, "", "a: [", "- 1", "model: 3"):
        assert saved_values(text) is None


@pytest.mark.parametrize("name, said", [
    ("residual.exti", "did you mean residual.exit?"), ("exit", "did you mean residual.exit?"), ("residual", "no such key"),
    ("train.steps", "needs no permission"), ("''", "must not be empty"), ("7", "must be text"),
])  # fmt: skip
def test_only_refused_keys_can_be_allowed(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.allow_changes") as caught:
        load_config(DEMO, [f"checkpoint.allow_changes=[{name}]"])
    assert said in str(caught.value)
    allowed = load_config(DEMO, ["checkpoint.allow_changes=[residual.exit, data.paths, train.seed]"])
    assert allowed.checkpoint.allow_changes == ("residual.exit", "data.paths", "train.seed")
