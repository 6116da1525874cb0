"""A pretraining script on Megatron-core as its users have them, with the lines that add pipehc marked; runs on CPU too.

    torchrun --nproc-per-node 4 tools/pretrain_megatron.py --schedule dualpipe --residual mhc \
        --pipeline-model-parallel-size 4 --num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 64 \
        --max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 8 --train-iters 10 --lr 1e-3 --min-lr 1e-4 \
        --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --untie-embeddings-and-output-weights \
        --transformer-impl local --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear \
        --eval-interval 5 --eval-iters 1 --log-interval 1 --distributed-backend gloo --use-cpu-initialization \
        --no-masked-softmax-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion \
        --no-bias-swiglu-fusion --no-bias-dropout-fusion

Without --schedule and --residual it is the job as it was. With --hybrid-layer-pattern the model is a HybridModel, of the layers of
TransformerEngine or, --spec MODULE NAME, of another stack spec.
"""

from functools import cache, partial
from pathlib import Path

import torch

if not torch.cuda.is_available():
    from pipehc.megatron.job import cpu_job  # only to try it without a GPU

    cpu_job.install()
    cpu_job.allow_pretrain()

from megatron.core import datasets, mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.spec_utils import import_module
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args, initialize, pretrain
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

import pipehc.megatron  # + pipehc

if not (Path(datasets.__file__).parent / "Makefile").exists():
    # Megatron compiles a helper at start; installed from a wheel it has that compiled, and nothing to make it from.
    initialize._compile_dependencies = lambda: None


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    if args.hybrid_layer_pattern is None:
        with_te = args.transformer_impl == "transformer_engine"
        layers = get_gpt_decoder_block_spec(config, with_te, normalization=args.normalization, vp_stage=vp_stage)
        prediction = get_gpt_mtp_block_spec(config, layers, with_te, vp_stage=vp_stage) if args.mtp_num_layers else None
        model = partial(GPTModel, mtp_block_spec=prediction)
    else:
        model = partial(HybridModel, hybrid_layer_pattern=args.hybrid_layer_pattern)
        layers = hybrid_stack_spec if args.spec is None else import_module(args.spec)
    return model(
        config,
        layers,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def loss_func(loss_mask, output):
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * loss_mask)
    tokens = loss_mask.sum().clone().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), tokens.view(1)])}


def forward_step(data_iterator, model):
    tokens = labels = loss_mask = attention_mask = position_ids = None
    if is_first_or_last_pipeline_stage(get_attr_wrapped_model(model, "vp_stage")):
        batch = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else None
        names = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
        tokens, labels, loss_mask, attention_mask, position_ids = (broadcast(batch, name) for name in names)
    else:
        attention_mask = causal_mask(get_args().seq_length)
    output = model(tokens, position_ids, attention_mask, labels=labels)
    return output, partial(loss_func, loss_mask)


@cache
def causal_mask(length):
    """What may not be looked at, [1, 1, length, length]. Made once, on the device: a copy from the host would be waited for."""
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=torch.cuda.current_device()).triu(1)


def broadcast(batch, name):
    """One tensor of a batch from the first tensor-parallel rank to all."""
    args = get_args()
    s = args.seq_length
    shape = (args.micro_batch_size, 1, s, s) if name == "attention_mask" else (args.micro_batch_size, s)
    dtype = {"loss_mask": torch.float32, "attention_mask": torch.bool}.get(name, torch.int64)
    if batch is None:
        value = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    else:
        value = batch[name].to(dtype).contiguous().cuda(non_blocking=True)  # Megatron's loader pins it
    torch.distributed.broadcast(value, mpu.get_tensor_model_parallel_src_rank(), group=mpu.get_tensor_model_parallel_group())
    return value


def train_valid_test_datasets_provider(samples, vp_stage=None):
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=True,
    )

    def here():
        return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, here, config).build()


def add_pipehc_arguments(parser):  # + pipehc
    parser.add_argument("--schedule", default="megatron")  # + pipehc
    parser.add_argument("--residual", default=None)  # + pipehc
    parser.add_argument("--from-plain", action="store_true", help="--load or --pretrained-checkpoint is of the plain model")
    parser.add_argument("--trace-steps", type=int, nargs=2, default=None, metavar=("FIRST", "LAST"))
    parser.add_argument("--diagnostics-interval", type=int, default=0, help="iterations; 0: never")
    parser.add_argument("--from-config", action="store_true", help="let Megatron's own builder make the model")
    return parser  # + pipehc


if __name__ == "__main__":
    train_valid_test_datasets_provider.is_distributed = True
    args = parse_and_validate_args(extra_args_provider=add_pipehc_arguments)
    if args.residual or args.schedule != "megatron":  # + pipehc
        ours = {} if args.trace_steps is None else {"trace_steps": tuple(args.trace_steps)}
        if args.diagnostics_interval:
            ours["diagnostics_interval"] = args.diagnostics_interval
        pipehc.megatron.enable(args.schedule, residual=args.residual, from_plain=args.from_plain, **ours)  # + pipehc
    config_from_args = gpt_config_from_args if args.hybrid_layer_pattern is None else hybrid_config_from_args
    pretrain(
        pretrain_cfg_container_from_args(args, config_from_args(args) if args.from_config else None),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=None if args.from_config else model_provider,
    )
