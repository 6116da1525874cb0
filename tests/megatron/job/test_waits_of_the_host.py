"""What a job's step does on which thread, and where its host waits for the device."""

import threading

import pytest
import torch
from megatron_job import Job, forward_step
from processes import run_ranks


@pytest.mark.parametrize("residual", [None, "mhc"])
def test_every_part_of_a_backward_runs_on_the_calling_thread(residual):
    """Loss and output head, sub-layers, embedding: a profiler's ranges of this thread then hold their kernels."""

    def step(rank):
        job = Job("1f1b", layers=2, residual=residual)
        seen = {}

        def look(name):
            def hook(*_):
                seen.setdefault(name, set()).add((threading.get_ident(), torch._C._is_multithreading_enabled()))

            return hook

        def watched(iterator, model):
            output, loss = forward_step(iterator, model)
            output.register_hook(look("loss"))
            return output, loss

        [chunk] = job.chunks
        model = chunk.module
        places = {"embedding": model.embedding, "attention": model.decoder.layers[0].self_attention, "head": model.output_layer}
        for name, module in places.items():

            def after(module, inputs, out, name=name):
                (out[0] if isinstance(out, tuple) else out).register_hook(look(name))

            module.register_forward_hook(after)
        for parameter in (*model.embedding.parameters(), *model.decoder.layers[1].parameters()):
            parameter.register_hook(look("parameter"))
        job.call(0, 2, forward_step=watched)
        assert seen.keys() == {"loss", "head", "attention", "embedding", "parameter"}
        return all(found == {(threading.get_ident(), False)} for found in seen.values())

    assert run_ranks(step, 1) == [True]


def test_gradients_are_checked_once_a_step_after_all_sums_have_begun():
    def step(rank):
        from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

        job = Job("1f1b", layers=2, residual="mhc", overlap_grad_reduce=True, distributed_optimizer=True, bucket_size=20000)
        events = []
        for name in ("start_grad_sync", "check_grads"):
            original = getattr(Group, name)

            def logged(self, *args, original=original, name=name, **given):
                events.append(name)
                return original(self, *args, **given)

            setattr(Group, name, logged)
        [chunk] = job.chunks
        chunk.ddp_config.check_for_nan_in_grad = True
        job.step(0, 2)
        checks = events.count("check_grads")
        assert checks > 2 and set(events[-checks:]) == {"check_grads"}
        with torch.no_grad():
            next(chunk.module.decoder.layers[1].mlp.parameters())[0] = float("nan")
        with pytest.raises(RuntimeError, match="found NaN in local grad norm for bucket #0"):
            job.accumulate(1, 2)
        return True

    assert run_ranks(step, 1) == [True]


@pytest.mark.parametrize("layout", [{"tp": 2}, {"ep": 2}], ids=str)
def test_counts_are_on_the_host_before_experts_read_them(layout):
    """Upstream copies them while the host goes on, and waits at a point that depends on the layout; with experts on ranks, ours."""

    def step(rank):
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher

        job = Job("1f1b", layers=2, **layout)
        log = []

        def logged(owner, name, what):
            original = getattr(owner, name)

            def method(*args, **given):
                log.append(what)
                return original(*args, **given)

            setattr(owner, name, method)

        logged(Dispatcher, "preprocess", "counted")
        logged(type(torch.cuda.Stream().record_event()), "synchronize", "on the host")
        logged(torch.Tensor, "tolist", "on the host")
        logged(MoELayer, "routed_experts_compute", "experts")
        job.accumulate(0, 2)
        dispatched = [log[i - 1] for i, what in enumerate(log) if what == "experts"]
        return log.count("counted"), dispatched

    for counted, before in run_ranks(step, 2):
        assert counted == 2 and before == ["on the host"] * 2
