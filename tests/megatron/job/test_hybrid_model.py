"""HybridModel under our schedules: its losses and gradient norms are those of one process under Megatron's own schedule."""

import pytest
from hybrid_model import pretend_fla
from megatron_job import Job, train
from processes import run_ranks
from test_job_matrix import DENSE
from test_megatron_schedule import SHARDED, check

# Two attention layers in a row, and two FFNs; a stage that begins with an FFN and ends with attention.
TWO, FOUR = "+-+E|E++E", "+-|+E|E+|+E"
WHOLE = TWO.replace("|", "")


@pytest.fixture(scope="module")
def reference():
    """What one process computes under Megatron's own schedule, by residual and what else it is given."""
    found = {}

    def of(residual, steps=1, **arguments):
        key = residual, steps, repr(arguments)
        if key not in found:
            found[key] = run_ranks(train, 1, {"pattern": WHOLE, "residual": residual, **arguments}, steps, timeout=240)[0]
        return found[key]

    return of


SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mla_up_proj", "shared_experts"]}
QUICK = [
    (4, None, {"schedule": "dualpipe", "pp": 4, "pattern": FOUR}),
    (4, "mhc", {"schedule": "dualpipev", "pp": 2, "vpp": 2, "ep": 2, "pattern": FOUR, **SHARDED}),
]
SLOW = [
    (2, None, {"schedule": "1f1b", "pp": 2, "pattern": WHOLE}),  # which Megatron cuts itself
    (4, None, {"schedule": "dualpipe", "pp": 2, "ep": 2, "pattern": TWO, **SHARDED, "overlap_param_gather": True}),
    (4, None, {"schedule": "dualpipev", "pp": 2, "vpp": 2, "tp": 2, "pattern": FOUR}),
    (4, "mhc", {"schedule": "dualpipe", "pp": 2, "tp": 2, "pattern": TWO, **SHARDED}),
    (4, "mhc", {"schedule": "auto", "pp": 4, "pattern": FOUR, "search": {"time_limit": 2}, "run": {"recompute_block": 1}}),
    (4, "mhc", {"pp": 2, "tp": 2, "pattern": TWO}),  # Megatron's own schedule
    (2, "hybrid", {"schedule": "dualpipe", "pp": 2, "pattern": TWO}),
    (2, "harmonized", {"schedule": "dualpipev", "pp": 2, "vpp": 2, "pattern": FOUR}),
    (2, "mhc", {"schedule": "dualpipe", "pp": 2, "pattern": TWO, "options": SELECTIVE}),
]


@pytest.mark.parametrize(("processes", "residual", "arguments"), QUICK, ids=str)
def test_three_steps_equal_megatrons_own_schedule(reference, processes, residual, arguments):
    check(reference(residual, 3), processes, residual=residual, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "residual", "arguments"), SLOW, ids=str)
def test_equals_megatrons_own_schedule(reference, processes, residual, arguments):
    """A step, and the loss after it."""
    check(reference(residual), processes, residual=residual, **arguments)


@pytest.mark.slow
def test_tied_embeddings_over_a_v(reference):
    tied = {"model_options": {"share_embeddings_and_output_weights": True}}
    check(reference("mhc", **tied), 2, residual="mhc", schedule="dualpipev", pp=2, vpp=2, pattern=FOUR, **tied, **SHARDED)


STANDARD = {"multi_latent_attention": False, "qk_layernorm": False, "num_query_groups": 2}
BIASES = STANDARD | DENSE | {"add_bias_linear": True, "add_qkv_bias": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{"schedule": "dualpipe", "pattern": "*-|**-"}, {"schedule": "dualpipev", "vpp": 2, "pattern": "*|-*|*|-"}]
)
def test_biases_under_sequence_parallelism(more):
    expected = run_ranks(train, 2, {"options": BIASES, "tp": 2, "pattern": "*-**-"}, 3, timeout=240)[0]
    check(expected, 4, options=BIASES, tp=2, pp=2, **more, **SHARDED)


@pytest.mark.slow
def test_dropout_draws_the_numbers_that_it_would_have():
    """Under sequence parallelism, of which Megatron's stack of hybrid layers, unlike its transformer block, knows nothing there."""
    arguments = {"options": STANDARD | {"hidden_dropout": 0.2, "attention_dropout": 0.1}, "tp": 2, "pp": 2, "pattern": "*-|**-"}
    check(run_ranks(train, 4, arguments, 3, timeout=240)[0], 4, schedule="1f1b", **arguments)


GDN = STANDARD | {
    "deterministic_mode": True, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip


def train_with_gdn(rank, arguments, steps=3):
    pretend_fla()
    return train(rank, {"options": GDN, "model_options": {"gdn": True}, **arguments}, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "residual", "more"),
    [
        (1, "mhc", {"schedule": "dualpipe", "pp": 2, "pattern": "G-G|E*-"}),
        (2, None, {"schedule": "dualpipev", "pp": 2, "vpp": 2, "pattern": "G|-G|E*|-"}),
    ],
)
def test_gated_delta_nets_are_sub_layers_like_attention(tp, residual, more):
    shared = {"tp": tp, "residual": residual}
    expected = run_ranks(train_with_gdn, tp, shared | {"pattern": "G-GE*-"}, 3, timeout=240)[0]
    check(expected, 2 * tp, train_with_gdn, **shared, **more)


def nodes(rank, pattern):
    from megatron.core.utils import unwrap_model

    from pipehc.megatron.job.chunk import decoder_chain

    job = Job("1f1b", ep=2, pattern=pattern, residual="mhc")
    return [node.name for node in decoder_chain(unwrap_model(job.chunks[0]).decoder, None).nodes]


def test_an_ffn_ends_a_block_of_nodes():
    """Attention, however many layers in a row, and the FFN behind it: a pair overlaps the experts' all-to-alls as in GPTModel."""
    found = [tuple(name.split(".")) for name in run_ranks(nodes, 2, "E++E+-+")[0]]
    experts = ["attention", "dispatch", "mlp", "combine", "mlp_post"]
    expected = {"0": experts, "1": experts, "4": ["attention", "mlp", "mlp_post"], "6": ["attention"]}
    assert found == [(block, kind) for block, kinds in expected.items() for kind in kinds]
