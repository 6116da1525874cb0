"""Set-ups that cannot work are refused before anything runs: one message, with key, value and remedy, on every rank."""

import argparse
import functools
import re
import sys
from types import SimpleNamespace

import megatron.training.training
import pytest
import torch
from hybrid_model import hybrid_provider
from megatron_job import MICRO_BATCH, SEQUENCE, Job, forward_step, initialize, model_config, provider
from processes import run_ranks

from pipehc.megatron import build_model_chunks, enable, forward_backward_func, hyper_connection_layer_spec, wrap_model_chunks
from pipehc.megatron.job.flags import flag_of
from pipehc.megatron.job.refusals import OPTIONS, refuse_options
from pipehc.megatron.job.support import JOB
from pipehc.megatron.job.tied import refuse_tied
from pipehc.schedules import Costs, Placement, build
from pipehc.schedules.placement import bidirectional, linear, vee

OURS = dict(
    recompute=True, recompute_block=2, overlap=False, timeout_s=600.0, trace_steps=(1, 2), trace_folder="here", nvtx=True,
    watchdog_folder="here", transport="host",
)  # fmt: skip
ARGUMENTS = [
    (dict(schedule="zigzag"), r"schedule = 'zigzag': must be megatron, auto, gpipe, 1f1b"),
    (dict(schedule="there/is/none.csv"), "none.csv': there is no such file"),
    (dict(schedule="dualpipe", costs=1), "costs = 1: only with schedule = 'auto'"),
    (dict(schedule="zigzag", speed=3), r"schedule = 'zigzag': must be megatron"),
    (dict(schedule="auto", speed=3), "speed = 3: unknown; schedule = 'auto' takes recompute, .*, gain_bound, costs, .*, seed$"),
    (dict(schedule="dualpipe", speed=3), "speed = 3: unknown; schedule = 'dualpipe' takes recompute, .*, nvtx, .*, gain_bound$"),
    (dict(schedule=build("1f1b", 2, 4), seed=3), r"seed = 3: only with .*'auto'; schedule = a Schedule \(1f1b\) takes recompute"),
    (dict(schedule="auto", placement="ring"), "placement = 'ring': must be one of linear, v, bidirectional"),
    (dict(schedule="megatron", seed=1, residual="mhc"), "seed = 1: only with schedule = 'auto'; .*'megatron' takes no options"),
    *(
        (dict(schedule="megatron", residual="mhc", **{name: value}), f"{name} = .*: only with a schedule of ours, .* no options")
        for name, value in OURS.items()
    ),
    (dict(schedule="dualpipe", from_plain=True), "from_plain = True with residual = None"),
    (dict(schedule="megatron"), "residual = None: changes nothing"),
    (dict(schedule="auto", placement=["v"]), r"placement = \['v'\]: must be one of linear"),
    (dict(schedule="auto", costs=3), "costs = 3: must be a Costs"),
    (dict(schedule="auto", gpu=3), "gpu = 3: must be a hardware file's name or path"),
    (dict(schedule="auto", gpu="h9"), "gpu = h9: no such GPU; must be a100, b200"),
    (dict(schedule="auto", gpu="h100", costs=Costs()), "gpu = 'h100': must be None beside costs"),
    (dict(schedule="auto", max_live=-1), "max_live = -1: must be a number above 0"),
    (dict(schedule="auto", time_limit="x"), "time_limit = 'x': must be a number of seconds"),
    (dict(schedule="auto", time_limit=float("nan")), "time_limit = nan: must be a number of seconds"),
    (dict(schedule="auto", seed="a"), "seed = 'a': must be a whole number"),
    (dict(trace_steps=10), r"trace_steps = 10: must be \(first, last\)"),
    (dict(trace_steps=(10,)), r"trace_steps = \(10,\): must be"),
    (dict(trace_steps=(1, 2, 3)), r"trace_steps = \(1, 2, 3\): must be"),
    (dict(trace_folder=None), "trace_folder = None: must be a path"),
    (dict(watchdog_folder=3), "watchdog_folder = 3: must be a path"),
    (dict(recompute_block="2"), "recompute_block = '2': must be at least 1"),
    (dict(transport="nccl"), "transport = 'nccl': must be device or host"),
    (dict(timeout_s="600"), "timeout_s = '600': must be more than 0"),
    (dict(timeout_s=float("nan")), "timeout_s = nan: must be more than 0"),
    (dict(residual=3), "residual = 3: must be a kind, a mapping"),
    (dict(recompute_block=0), "recompute_block = 0: must be at least 1"),
    (dict(timeout_s=0), "timeout_s = 0: must be more than 0"),
    (dict(residual="xhc"), "residual.kind = 'xhc'"),
    (dict(residual={"kind": "mhc", "streams": 17}), "residual.streams = 17"),
    (dict(residual={"kind": "mhc", "stream": 4}), "residual.stream = 4"),
    (dict(residual={"kind": "mhc", "static": True}), "static = True with residual.kind = 'mhc'"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=str)
def test_arguments_of_enable(arguments, message):
    with pytest.raises(ValueError, match=message):
        enable(**arguments)
    assert megatron.training.training.get_model.__module__ == "megatron.training.training"  # nothing was installed


def test_enabling_twice_and_taking_it_back():
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import training

    names = [
        (schedules, "forward_backward_no_pipelining"), (schedules, "forward_backward_pipelining_with_interleaving"),
        (schedules, "forward_backward_pipelining_without_interleaving"), (schedules, "get_model_config"),
        (dist_checkpointing, "load"), (GPTModel, "__init__"),
        *((training, name) for name in ("get_model", "get_megatron_optimizer", "setup_model_and_optimizer",
                                        "build_train_valid_test_data_iterators", "calc_params_l2_norm")),
    ]  # fmt: skip
    before = [getattr(owner, name) for owner, name in names]
    with enable("dualpipe", residual="mhc"):
        assert all(getattr(owner, name) is not b for (owner, name), b in zip(names, before))
        with pytest.raises(RuntimeError, match="enabled already"):
            enable("dualpipe")
    assert all(getattr(owner, name) is b for (owner, name), b in zip(names, before))
    enable("1f1b").disable()


def test_a_shared_weight_whose_copies_nobody_would_sum():
    for placement in (linear(2), bidirectional(2), vee(2)):
        refuse_tied(placement)
    with pytest.raises(ValueError, match=r"mtp_num_layers > 0: not .* first stages are on ranks \{1\} and last ones on \{0\}; use"):
        refuse_tied(Placement(((1, 0),)))


BROKEN = {
    "cuda_graph_impl": "local", "enable_cuda_graph": True, "external_cuda_graph": True, "cpu_offloading": True,
    "fine_grained_activation_offloading": True, "recompute_granularity": "full", "overlap_moe_expert_parallel_comm": True,
    "delay_wgrad_compute": True, "defer_embedding_wgrad_compute": True, "variable_seq_lengths": True, "enable_autocast": True,
    "fp8": "hybrid", "fp4": "e2m1", "fp32_residual_connection": True, "num_microbatches_with_partial_activation_checkpoints": 2,
    "hybrid_context_parallel": True, "moe_shared_expert_overlap": True, "moe_paged_stash": True,
    "overlap_dispatch_backward_with_experts_wgrad": True, "moe_enable_routing_replay": True, "gtp_weight_remat_size": 2,
    "expert_gtp_weight_remat_size": 2, "heterogeneous_block_specs": True, "experimental_attention_variant": "dsa",
}  # fmt: skip


def test_every_option_has_a_broken_value():
    assert BROKEN.keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", BROKEN)
def test_options_of_the_model(name):
    """Under the names of flags, where there is one, and of attributes."""
    flag = flag_of(name)
    with pytest.raises(ValueError, match=f"{name} = .*: not supported under our schedules: .*set {name} = ") as caught:
        refuse_options(SimpleNamespace(**{name: BROKEN[name]}))
    assert flag is None or (str(caught.value).startswith(f"{flag} (") and f"; leave out {flag} (set" in str(caught.value))
    assert_flags_exist(str(caught.value))


@functools.cache
def known_flags():
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._option_string_actions.keys()


def assert_flags_exist(message):
    assert set(re.findall(r"--[a-z][\w-]*(?<!-)(?![\w-])", message)) <= known_flags(), message


SAVING = dict(save="somewhere", use_distributed_optimizer=True)
JOBS = [
    ("dualpipe", dict(hybrid_layer_pattern="M*|M*"), r"^ValueError: --hybrid-layer-pattern \(hybrid.*has Mamba layers \(M\): "),
    ("megatron", dict(hybrid_layer_pattern="+-|D-"), r"--hybrid-layer-pattern \(hybrid.*DeepSeek's sparse attention \(D\)"),
    ("dualpipe", dict(hybrid_layer_pattern="*-|*E/*E"), r"'\*-\|\*E/\*E'\): has layers of multi-token .*leave out what"),
    ("1f1b", dict(hybrid_layer_pattern="*-|*-", mtp_num_layers=1), r"mtp_num_layers = 1\): not supported in a HybridModel; leave"),
    ("dualpipe", dict(hybrid_layer_pattern="*-|*-|*-|*-"), "has 4 pipeline segments, the schedule 2 stages .* with 1 '|'"),
    ("dualpipev", dict(hybrid_layer_pattern="*-*-*-*-"), "has 1 pipeline segments, the schedule 4 stages .* with 3 '|'"),
    ("1f1b", dict(hybrid_layer_pattern="*-*-|"), r"has a segment without layers, every stage needs one; move '\|'"),
    ("dualpipe", dict(virtual_pipeline_model_parallel_size=2), r"parallel_size = 2\): a bidirectional placement"),
    ("dualpipev", {}, "a v placement needs 2; set --num-virtual-stages-per-pipeline-rank 2"),
    ("interleaved", dict(virtual_pipeline_model_parallel_size=None), "a looped placement needs 2"),
    ("dualpipe", dict(use_megatron_fsdp=True), "use_megatron_fsdp = True"),
    ("dualpipe", dict(use_torch_fsdp2=True), "use_torch_fsdp2 = True"),
    ("megatron", dict(perform_rl_step=True), "perform_rl_step = True"),
    ("dualpipe", dict(init_model_with_meta_device=True), "init_model_with_meta_device = True"),
    ("dualpipe", dict(rampup_batch_size=[4, 4, 100]), r"rampup_batch_size = \[4, 4, 100\]"),
    ("dualpipe", dict(overlap_param_gather_with_optimizer_step=True), "overlap_param_gather_with_optimizer_step = True"),
    ("dualpipe", dict(rerun_mode="report_stats"), "rerun_mode = 'report_stats'"),
    ("1f1b", dict(sft=True), "sft = True"),
    ("dualpipe", dict(num_distributed_optimizer_instances=2), "num_distributed_optimizer_instances = 2"),
    ("dualpipe", dict(save="somewhere", ckpt_format="torch"), r"ckpt_format = 'torch'\): goes by pipeline ranks"),
    ("dualpipe", dict(qk_clip=True), "qk_clip = True"),
    ("dualpipe", dict(logits_save_dir="somewhere"), "logits_save_dir = 'somewhere'"),
    ("dualpipe", dict(logits_load_dir="somewhere"), "logits_load_dir = 'somewhere'"),
    ("dualpipe", dict(non_persistent_ckpt_type="local"), "non_persistent_ckpt_type = 'local'"),
    ("dualpipe", dict(pretrained_checkpoint="somewhere", ckpt_format="torch"), r"ckpt_format = 'torch'\): goes by pipeline ranks"),
    ("1f1b", dict(inprocess_restart=True), "inprocess_restart = True"),
    ("dualpipe", dict(moe_router_load_balancing_type=["aux_loss", "global_aux_loss"]), "load_balancing_type = .*global_aux_loss"),
    ("dualpipe", dict(moe_router_load_balancing_type="quantile_balancing"), "load_balancing_type = 'quantile_balancing'"),
    ("megatron", dict(heterogeneous_layers_config_encoded_json="{}"), "heterogeneous_layers_config_encoded_json = '{}'"),
    ("1f1b", dict(num_distributed_optimizer_instances=2), "num_distributed_optimizer_instances = 2"),
    ("megatron", dict(dataloader_inter_document_masking=True), "dataloader_inter_document_masking = True"),
    ("dualpipe", SAVING, "set --dist-ckpt-optim-fully-reshardable"),
    (
        "dualpipe",
        dict(**SAVING, dist_ckpt_optim_fully_reshardable=True, distrib_optim_fully_reshardable_mem_efficient=True),
        "mem_efficient = True",
    ),
    ("dualpipe", dict(global_batch_size=6), r"global_batch_size = 6\): makes 3 micro-batches of 2 .* needs an even number"),
    ("dualpipe", dict(eval_global_batch_size=6), r"eval_global_batch_size = 6\): makes 3 micro-batches"),
    ("megatron", dict(num_layers=1), r"num_layers = 1\): fewer than the 2 stages"),
]


def start_jobs(rank):
    """The message with which each of JOBS ends."""
    from megatron.training import training

    initialize(pp=2)
    said = []
    for schedule, options, _ in JOBS:
        training.get_args = lambda options=options: SimpleNamespace(**(JOB | options))
        import megatron.training

        megatron.training.get_args = training.get_args
        with enable(schedule, residual="mhc"):
            try:
                training.setup_model_and_optimizer(None, None)
                said.append("nothing")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
    return said


def test_jobs_are_refused_at_start_on_every_rank():
    for said in run_ranks(start_jobs, 2):
        for (_, _, message), text in zip(JOBS, said, strict=True):
            with pytest.raises(ValueError, match=message):
                raise ValueError(text)
            assert "\n" not in text and text.startswith("ValueError: ") and "--" in text
            assert_flags_exist(text)


class Other(torch.nn.Module):
    """No GPT model."""


def build_wrongly(rank):
    said = []

    def refused(act):
        try:
            act()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))

    initialize(pp=2)
    good = provider(model_config(pp=2))
    refused(lambda: build_model_chunks(lambda pre_process, post_process, vp_stage: Other(), "dualpipe"))
    refused(lambda: build_model_chunks(hybrid_provider(model_config(pp=2, layers=4), "+MM-"), "dualpipe"))
    refused(lambda: build_model_chunks(hybrid_provider(model_config(pp=2, layers=4), "+-|+-|+-"), "dualpipe"))
    refused(lambda: build_model_chunks(hybrid_provider(model_config(pp=2, layers=8), "+-|+E"), "megatron", residual="mhc"))
    refused(lambda: build_model_chunks(hybrid_provider(model_config(pp=2, layers=4), "+-|G-"), "1f1b", residual="mhc"))
    early = model_config(pp=2, mtp_num_layers=1, pipeline_model_parallel_layout="Ettttttttm|L")
    refused(lambda: build_model_chunks(provider(early), "dualpipe"))
    refused(lambda: build_model_chunks(provider(model_config(pp=2, fp32_residual_connection=True)), "1f1b", residual="mhc"))
    selective = model_config(pp=2, recompute_granularity="selective", recompute_modules=["layernorm"])
    refused(lambda: build_model_chunks(provider(selective), "megatron", residual="mhc"))
    lonely = model_config(pp=2, layers=1, account_for_loss_in_pipeline_split=True)
    refused(lambda: build_model_chunks(provider(lonely), "1f1b"))
    chunks = build_model_chunks(good, "1f1b")
    arguments = dict(
        forward_step_func=forward_step, data_iterator=iter(()), model=chunks, num_microbatches=8, seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
    )  # fmt: skip
    refused(lambda: forward_backward_func("dualpipe")(**arguments))
    refused(lambda: forward_backward_func("1f1b")(**arguments, adjust_tensor_shapes_fn=len))
    refused(lambda: forward_backward_func("1f1b")(**arguments, p2p_communicator=len))
    config = megatron.core.utils.get_model_config(chunks[0])
    config.param_sync_func = len
    refused(lambda: forward_backward_func("1f1b")(**arguments))
    config.param_sync_func = None
    refused(lambda: forward_backward_func("1f1b")(**(arguments | {"data_iterator": [iter(()), iter(())]})))
    return said


def test_models_and_calls_are_refused_on_every_rank():
    expected = [
        "Other: has no TransformerBlock or HybridStack as its decoder; use GPTModel or HybridModel",
        r"--hybrid-layer-pattern \(hybrid_layer_pattern = '\+MM-'\): has Mamba layers \(M\)",
        r"--hybrid-layer-pattern \(.*has 3 pipeline segments, the schedule 2 stages over 2 ranks; cut the pattern with 1 '\|'",
        r"--num-layers \(num_layers = 8\): hybrid_layer_pattern = '\+-\|\+E' has 4; set num_layers = 4",
        "hybrid_stack_spec: gdn_layer is .*IdentityOp.*; must be of megatron.core's TransformerLayer",
        r"the layout \(.*\): has multi-token prediction \(m\) on another stage than the last",
        r"--fp32-residual-connection \(fp32_residual_connection = True\): not supported",
        r"--recompute-modules \(recompute_modules\) contains 'layernorm': not supported by hyper-connection layers; drop it",
        r"rank 1: stage 1: has no transformer layers, every stage needs one; change the layout \(--num-layers",
        "model: 1 chunks on a rank; dualpipe over 2 ranks needs 2",
        "adjust_tensor_shapes_fn = .*: must be None",
        "p2p_communicator = .*: must be None, or Megatron's P2PCommunicator",
        "param_sync_func = .*: is not called under our schedules, .*; set None",
        "data_iterator: a list of 2; must have one iterator for each of the 1 model chunks",
    ]
    for said in run_ranks(build_wrongly, 2):
        for message, text in zip(expected, said, strict=True):
            with pytest.raises(ValueError, match=message):
                raise ValueError(text)


@pytest.mark.parametrize(
    ("name", "value"), [("use_megatron_fsdp", True), ("use_custom_fsdp", True), ("num_distributed_optimizer_instances", 2)]
)
def test_options_of_ddp(name, value):
    with pytest.raises(ValueError, match=rf"{name} = {value}\)?: not supported by wrap_model_chunks; .*set {name} ="):
        wrap_model_chunks([], SimpleNamespace(**{name: value}))


def run_wrong_chunks(rank):
    """A hand-written loop's mistakes: with Megatron's own DDP each replica trained by itself, and the losses looked plausible."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    initialize(pp=2)
    config, ddp_config = model_config(pp=2), DistributedDataParallelConfig()
    chunks = build_model_chunks(provider(config), "dualpipe")
    arguments = dict(
        forward_step_func=forward_step, data_iterator=iter(()), num_microbatches=8, seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
    )  # fmt: skip
    for wrong in (chunks, [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]):
        with pytest.raises(ValueError, match=r"sum its gradients over both replicas .*wrap_model_chunks"):
            forward_backward_func("dualpipe")(model=wrong, **arguments)
    wrapped = wrap_model_chunks(chunks, ddp_config, "dualpipe")
    with pytest.raises(ValueError, match=r"runs as stage 0 has layers \[5, 6, 7, 8\], it must begin with layer 1: .*build_model"):
        forward_backward_func("dualpipe")(model=wrapped[::-1], **arguments)


def test_chunks_of_another_placement_or_without_a_mirror():
    run_ranks(run_wrong_chunks, 2)


def test_odd_pipelines_have_no_mirror():
    def build_chunks(rank):
        initialize(pp=3)
        with pytest.raises(ValueError, match=r"ranks = 3|pipeline_model_parallel_size = 3\): must be even"):
            build_model_chunks(provider(model_config(pp=3, layers=6)), "dualpipe")

    run_ranks(build_chunks, 3)


def test_specs_of_other_layers_are_refused():
    from megatron.core.transformer.spec_utils import ModuleSpec

    with pytest.raises(ValueError, match=r"is no transformer layer; must be megatron.core's TransformerLayer"):
        hyper_connection_layer_spec(ModuleSpec(module=torch.nn.Linear))


def wrong_number(rank):
    job = Job(build("dualpipe", 2, 6), pp=2)
    with pytest.raises(ValueError, match="schedule dualpipe: is for 6 micro-batches, the job runs 8 a step"):
        job.call(0, 8)
    with pytest.raises(ValueError, match="is for 2 pipeline ranks, the job has 3"):
        job.forward_backward.source.placement(3)


def test_given_schedules_must_fit():
    run_ranks(wrong_number, 2)


def test_ranges_need_the_package_nvtx(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ValueError, match="nvtx = True: must be False where the package nvtx"):
        forward_backward_func("1f1b", nvtx=True)
