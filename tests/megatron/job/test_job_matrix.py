"""Jobs as real scripts set them up: biases, grouped queries, positions, norms, small buckets, frozen parameters, ties. Under our
schedules every gradient is that of the same job under Megatron's own, and twice the same to the bit."""

from itertools import combinations, product

import pytest
import torch
import torch.distributed as dist
from covering import covering_array
from megatron_job import Job, global_name
from processes import run_ranks

MICROBATCHES = 8
DENSE = {
    "num_moe_experts": None, "moe_ffn_hidden_size": None, "moe_layer_freq": 1, "moe_shared_expert_intermediate_size": None,
    "moe_router_enable_expert_bias": False,
}  # fmt: skip
STANDARD = {"multi_latent_attention": False}
# axis -> value -> what it gives to the job: `options` of the model's configuration, `model_options` of the model, others of Job
AXES = {
    "schedule": {
        "dualpipe": {"schedule": "dualpipe", "pp": 2, "dp": 2},
        "1f1b": {"schedule": "1f1b", "pp": 2, "dp": 2},
        "dualpipe, no data parallelism": {"schedule": "dualpipe", "pp": 2},
        "dualpipev": {"schedule": "dualpipev", "pp": 2, "vpp": 2, "dp": 2},
        "zb_h1": {"schedule": "zb_h1", "pp": 2, "dp": 2},
        "zbv": {"schedule": "zbv", "pp": 2, "vpp": 2, "dp": 2},
        "interleaved": {"schedule": "interleaved", "pp": 2, "vpp": 2, "dp": 2},
    },
    "biases": {
        "all": {"options": {"add_bias_linear": True, "add_qkv_bias": True}},
        "qkv": {"options": {"add_qkv_bias": True}},
        "none": {},
    },
    "reduction": {
        "overlapped": {"overlap_grad_reduce": True},
        "overlapped, sharded": {"overlap_grad_reduce": True, "distributed_optimizer": True},
        "overlapped, sharded, gathered late": {
            "overlap_grad_reduce": True, "distributed_optimizer": True, "overlap_param_gather": True
        },
        "at the end": {},
    },
    "bucket": {"500": {"bucket_size": 500}, "20000": {"bucket_size": 20000}, "one": {}},
    "attention": {
        "grouped queries": {"options": STANDARD | {"num_query_groups": 2}},
        "every head its own": {"options": STANDARD},
        "latent": {},
    },
    "norm": {"LayerNorm": {"options": {"normalization": "LayerNorm"}}, "RMSNorm": {}},
    "positions": {
        "learned": {"model_options": {"position_embedding_type": "learned_absolute"}},
        "rotary": {},
        "none": {"model_options": {"position_embedding_type": "none"}},
    },
    "ffn": {
        "gelu": {"options": DENSE | {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}},
        "gated": {"options": DENSE},
        "experts": {},
        "experts on two ranks": {"ep": 2},
    },
    "frozen": {
        "nothing": {},
        "weights beside biases": {"frozen": r"(linear_proj|linear_fc1)\.weight"},  # Megatron trains no bias of linear_qkv then
        "biases": {"frozen": r"\.bias$"},
        "layers": {"frozen": r"embedding|layers\.[02]\."},
    },
    "embeddings": {"untied": {}, "tied": {"model_options": {"share_embeddings_and_output_weights": True}}},
    "residual": {"plain": {}, "mhc": {"residual": "mhc"}},
    "model": {"GPTModel": {}, "HybridModel": {"pattern": ""}},
}  # fmt: skip


def allowed(row):
    return (
        not (row.get("ffn") == "experts on two ranks" and row.get("schedule") == "dualpipe, no data parallelism")
        and not (row.get("ffn") == "experts" and row.get("biases") == "all")  # Megatron's fail without expert parallelism
        and not (row.get("frozen") in ("biases", "weights beside biases") and row.get("biases") == "none")
    )


def job_of(row):
    """(processes, arguments of Job) of a row."""
    arguments = {"layers": 4, "options": {}, "model_options": {}}
    if row["biases"] == "all":
        arguments["options"] = {"moe_shared_expert_intermediate_size": None}  # Megatron's have none
    for axis, value in row.items():
        for name, given in AXES[axis][value].items():
            arguments[name] = arguments[name] | given if isinstance(given, dict) else given
    if "pattern" in arguments:  # the same layers, each cut in two
        attention = "+" if arguments["options"].get("multi_latent_attention", True) else "*"
        ffn = "E" if "experts" in row["ffn"] else "-"
        layers = f"{attention}-{f'{attention}{ffn}' * 3}"
        stages = arguments["pp"] * arguments.get("vpp", 1)
        arguments["pattern"] = "|".join(layers[i : i + 8 // stages] for i in range(0, 8, 8 // stages))
    data_parallel = arguments.pop("dp", 1)
    return arguments["pp"] * arguments.get("tp", 1) * data_parallel, arguments


def gradients(job):
    """The whole gradient of every parameter that is trained and held here, by global name and tensor-parallel rank."""
    from megatron.core import parallel_state as ps

    found = {}
    for chunk in job.chunks:
        names = {p: global_name(chunk.module, name) for name, p in chunk.module.named_parameters()}
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                whole = bucket.grad_data
                if chunk.ddp_config.use_distributed_optimizer:
                    whole = torch.empty_like(bucket.grad_data)
                    dist.all_gather_into_tensor(whole, bucket.grad_data.chunk(group.size())[group.rank()].clone(), group=group)
                for parameter in bucket.params_list:
                    start, end, *_ = buffer.param_index_map[parameter]
                    key = names[parameter], ps.get_tensor_model_parallel_rank()
                    found[key] = whole[start - bucket.offset : end - bucket.offset].clone()
    return found


def train(rank, arguments, steps=2):
    """[(loss, gradient norm)] of the steps and the gradients of the first, as numpy; asserts that those, computed again, are equal
    to the bit."""
    from megatron.core import parallel_state as ps

    job = Job(**arguments)
    share = MICROBATCHES // ps.get_data_parallel_world_size()
    found, first = [], None
    for step in range(steps):
        seen = []
        before = [(buffer, buffer.clone()) for chunk in job.chunks for buffer in chunk.module.buffers()]  # biases of experts
        for _ in range(1 if step else 2):
            for buffer, value in before:
                buffer.copy_(value)
            reports = job.accumulate(step, share)
            seen.append(gradients(job))
        for name, gradient in seen[0].items():
            assert torch.equal(gradient, seen[-1][name]), name
        first = first or {name: gradient.numpy() for name, gradient in seen[0].items()}
        found.append((job.mean(reports), job.update()))
    return found, first


def check(processes, arguments):
    """Against Megatron's own schedule without a pipeline."""
    shared = ("layers", "residual", "frozen", "tp", "ep", "options", "model_options")
    plain = {name: arguments[name] for name in shared if name in arguments}
    if "pattern" in arguments:
        plain["pattern"] = arguments["pattern"].replace("|", "")
    reference = run_ranks(train, plain.get("tp", 1) * plain.get("ep", 1), plain, timeout=240)
    expected = {name: gradient for _, gradients in reference for name, gradient in gradients.items()}
    scale = sum(float((gradient**2).sum()) for gradient in expected.values()) ** 0.5
    ranks = run_ranks(train, processes, arguments, timeout=240)
    assert {name for _, gradients in ranks for name in gradients} == set(expected)
    for steps, gradients in ranks:
        for name, gradient in gradients.items():
            error = float(((gradient - expected[name]) ** 2).sum()) ** 0.5
            # Some are zero but for rounding, as of the bias of keys, which moves all scores of a query alike.
            assert error <= 1e-5 * float((expected[name] ** 2).sum()) ** 0.5 + 1e-7 * scale, (name, error)
        for (loss, norm), (other_loss, other_norm) in zip(steps, reference[0][0], strict=True):
            assert loss == pytest.approx(other_loss, abs=1e-6) and norm == pytest.approx(other_norm, rel=1e-5)


ROWS = {", ".join(row.values()): row for row in covering_array({axis: list(values) for axis, values in AXES.items()}, allowed)}
QUICK, *SLOW = ROWS  # the quick one is that of the fault: biases, overlapped reduction, small buckets


@pytest.mark.parametrize("row", [QUICK, *(pytest.param(row, marks=pytest.mark.slow) for row in SLOW)])
def test_gradients_are_those_of_megatrons_own_schedule(row):
    check(*job_of(ROWS[row]))


@pytest.mark.slow
def test_gradients_under_tensor_parallelism():
    """With sequence parallelism, of which Megatron sums gradients of norms and biases by itself."""
    processes, arguments = job_of(ROWS[QUICK])
    assert arguments["overlap_grad_reduce"] and processes == 4
    check(processes, arguments | {"tp": 2})


@pytest.mark.slow
def test_two_launches_are_equal_to_the_bit():
    processes, arguments = job_of(ROWS[QUICK])
    once, again = (run_ranks(train, processes, arguments, timeout=240) for _ in range(2))
    for (steps, gradients), (other_steps, others) in zip(once, again):
        assert steps == other_steps
        for name, gradient in gradients.items():
            assert (gradient == others[name]).all(), name


def test_every_two_values_are_together_in_a_row():
    assert len(ROWS) < 40
    for a, b in combinations(AXES, 2):
        for x, y in product(AXES[a], AXES[b]):
            assert allowed({a: x, b: y}) == any(row[a] == x and row[b] == y for row in ROWS.values()), (x, y)
