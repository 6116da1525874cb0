"""What a job sees of the parameters of hyper-connections: dtypes, marks of sequence parallelism, keys and values in checkpoints."""

import multiprocessing

import megatron_job
import pytest
import torch
from layer_specs import CHANNELS, KINDS, build, local, run_layer, standard_config
from processes import run_ranks


@pytest.mark.parametrize("kind", KINDS)
def test_maps_stay_fp32_in_a_bf16_model(kind):
    def bf16(rank):
        from megatron.core.transformer.module import Float16Module

        from pipehc.megatron import hyper_connection_layer_spec

        megatron_job.initialize()
        config = standard_config(bf16=True, params_dtype=torch.bfloat16, num_layers=3)
        layer = build(hyper_connection_layer_spec(local(config), {"kind": kind, "alpha": 0.3}), config)
        layer.layer_number = 2
        layer.expands = False
        Float16Module(config, layer)
        dtypes = {name: p.dtype for name, p in [*layer.named_parameters(), *layer.named_buffers()]}
        own = {name for name in dtypes if name.startswith(("attention_connection.", "mlp_connection."))}
        assert (
            own and {dtypes[n] for n in own} == {torch.float32} and {dtypes[n] for n in dtypes if n not in own} == {torch.bfloat16}
        )
        out, grad, grads = run_layer(layer, 4 * CHANNELS, torch.bfloat16)
        assert out.dtype == grad.dtype == torch.bfloat16 and grads["attention_connection.phi"].dtype == torch.float32
        return True

    assert run_ranks(bf16, 1) == [True]


def test_sequence_parallelism_marks_the_parameters_of_every_map():
    def marked(rank):
        from pipehc.megatron import hyper_connection_layer_spec

        megatron_job.initialize(tp=2)
        found = {}
        for sequence_parallel in (False, True):
            for kind in KINDS:
                config = standard_config(
                    num_attention_heads=4,
                    tensor_model_parallel_size=2,
                    sequence_parallel=sequence_parallel,
                    normalization="RMSNorm",
                )
                layer = build(hyper_connection_layer_spec(local(config), kind), config)
                marks = {getattr(p, "sequence_parallel", False) for n, p in layer.named_parameters() if "_connection." in n}
                assert marks == {sequence_parallel}, (kind, marks)
                assert not any(
                    getattr(p, "tensor_model_parallel", False) for n, p in layer.named_parameters() if "_connection." in n
                )
                found[kind, sequence_parallel] = len(marks)
        return found

    assert len(run_ranks(marked, 2)[0]) == 10


# -- checkpoints


def sharded_tensors(state):
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


LIKE = {"moe_layer_freq": 1}  # all layers have experts
FORMS = [*((kind, False) for kind in KINDS), ("hybrid", True), ("harmonized", True)]


@pytest.mark.parametrize("kind,stacked", FORMS)
def test_sharded_state_is_complete_and_has_global_keys(kind, stacked):
    """stacked: layers of one form are saved as one tensor with a leading axis, Megatron's older way."""

    def keys(rank):
        from megatron.core import parallel_state

        job = megatron_job.Job(schedule=None, pp=2, layers=4, residual=kind, options=LIKE if stacked else {})
        model = job.chunks[0].module
        state = model.sharded_state_dict()
        own = {n for n, _ in [*model.named_parameters(), *model.named_buffers()] if "_connection." in n}
        assert own == {name for name in state if "_connection." in name} and len(own) in (12, 16, 20)
        for name in own:
            tensor = state[name]
            layer = int(name.split(".")[2]) + 2 * parallel_state.get_pipeline_model_parallel_rank()
            rest = name.split(".", 3)[3]
            shape = tuple(model.state_dict()[name].shape)
            if stacked:
                assert tensor.key == f"decoder.layers.{rest}"
                assert tensor.global_shape == (4, *shape) and tensor.global_offset[0] == layer
            else:
                assert tensor.key == f"decoder.layers.{layer}.{rest}" and tensor.global_shape == shape
        return {t.key for t in sharded_tensors(state)}

    first, second = run_ranks(keys, 2)
    connections = {key for key in first | second if "_connection." in key}
    per_layer = {"hybrid": 8, "harmonized": 10}.get(kind, 6)
    assert len(connections) == (per_layer if stacked else 4 * per_layer)


@pytest.mark.slow
@pytest.mark.parametrize("kind,stacked", [("hybrid", False), ("harmonized", True)])
def test_what_two_stages_save_one_process_loads(kind, stacked, tmp_path):
    options = LIKE if stacked else {}
    arguments = {"schedule": None, "layers": 4, "residual": kind, "options": options}

    def save(rank):
        from megatron.core import dist_checkpointing

        job = megatron_job.Job(pp=2, **arguments)
        with torch.no_grad():
            for name, tensor in [*job.chunks[0].named_parameters(), *job.chunks[0].named_buffers()]:
                if name.endswith((".s", "blend_logit", "_connection.alpha")):
                    tensor.copy_(tensor * 0.5 + 0.25 + 0.01 * rank)
        # Megatron's writer starts a process of its own, which a daemon may not.
        multiprocessing.current_process()._config["daemon"] = False
        dist_checkpointing.save(job.chunks[0].module.sharded_state_dict(), str(tmp_path), async_sharded_save=False)
        return job.evaluate(0, 2)

    def load(rank):
        from megatron.core import dist_checkpointing

        job = megatron_job.Job(**arguments)
        fresh = job.evaluate(0, 2)
        model = job.chunks[0].module
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(tmp_path)))
        return fresh, job.evaluate(0, 2)

    saved = run_ranks(save, 2)
    ((fresh, loaded),) = run_ranks(load, 1)
    assert saved[0] == saved[1] == loaded != fresh
