"""One call that gives an existing Megatron job hyper-connections and our schedules."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, utils
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

from pipehc.config.schema import ResidualConfig
from pipehc.megatron.gradient_norm import local_l2_norm
from pipehc.megatron.job.hybrid import building
from pipehc.megatron.job.job_refusals import refuse_job
from pipehc.megatron.job.loading import loading
from pipehc.megatron.job.mirror import counted_once, gradient_groups
from pipehc.megatron.job.models import HybridModel
from pipehc.megatron.job.optimizer_shards import saved_by_name
from pipehc.megatron.job.position import acting_at, held_stages, megatron_place
from pipehc.megatron.job.prediction import predicting
from pipehc.megatron.job.promise import PROMISE
from pipehc.megatron.job.saved_residual import saving
from pipehc.megatron.job.schedule import ForwardBackward, forward_backward_func
from pipehc.megatron.job.source import refuse_unknown_options
from pipehc.megatron.job.spec import Residual, converted_once, residual_settings
from pipehc.megatron.job.wide import MegatronsOwn
from pipehc.megatron.job.wrapped_chunks import OurModelConfig, wrapped_chunks
from pipehc.schedules import Schedule


def enable(
    schedule: str | Schedule = "dualpipe",
    *,
    residual: Residual | None = None,
    from_plain: bool = False,
    allow_changes: bool = False,
    **options: Any,
) -> Enabled:
    """Call it before `pretrain()`, or before a loop of another kind builds its model.

    Nothing of Megatron's is touched before, and `disable()` of what this returns, or the end of a `with` block over it, takes
    everything back. `get_forward_backward_func`, whichever module has imported it, returns ours from then on, and every GPTModel
    and HybridModel is built with hyper-connections. In a job that runs megatron.training it also takes care of model chunks,
    gradient groups, data iterators and checkpoints; any other loop (Megatron Bridge, a hand-written one) builds its chunks as
    before where a placement is Megatron's own (1f1b, gpipe, zb_h1, interleaved), and with `build_model_chunks` and
    `wrap_model_chunks` elsewhere. The first step refuses chunks that are not built so. What a script with it needs in memory and
    time says, before there is a GPU, `python -m pipehc.megatron.job.dry_run` in the place of torchrun.

    Args:
        schedule, options: as for `forward_backward_func`; "megatron" keeps Megatron's own schedule, and takes no options.
        residual: as for `hyper_connection_layer_spec`; None leaves the residual connections as they are.
        from_plain: a checkpoint without hyper-connections may be loaded, without its optimizer state (--pretrained-checkpoint, or
            --load and --finetune): the hyper-connections start from their initial values.
        allow_changes: a checkpoint that was trained with another residual may be loaded, where it has the tensors.

    Raises:
        ValueError: for arguments that are not known. When the job starts, on every rank: for what it asks that cannot work with
            them, naming the option and the remedy.
        RuntimeError: if it is enabled already.
    """
    refuse_unknown_options(schedule, options)
    settings = None if residual is None else residual_settings(residual)
    if schedule == "megatron" and settings is None:
        raise ValueError("schedule = 'megatron' with residual = None: changes nothing; name a schedule or a residual")
    if from_plain and settings is None:
        raise ValueError("from_plain = True with residual = None: there are no hyper-connections to start; name a residual")
    enabled = Enabled(forward_backward_func(schedule, **options), settings, from_plain, allow_changes)
    enabled.install()
    return enabled


# What get_forward_backward_func returns one of.
MEGATRONS = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
)


class Enabled:
    """What `enable` installed. One at a time."""

    _current: Enabled | None = None

    def __init__(
        self, function: ForwardBackward | MegatronsOwn, residual: ResidualConfig | None, from_plain: bool, allow_changes: bool
    ) -> None:
        self._function, self._source, self._residual = function, function.source, residual
        self._from_plain, self._allow_changes = from_plain, allow_changes
        self._before: list[tuple[Any, str, Any]] = []

    def install(self) -> None:
        if Enabled._current is not None:
            raise RuntimeError("pipehc.megatron is enabled already; call disable() of the first")
        Enabled._current = self
        PROMISE.make(self._residual)
        try:
            self._install()
        except BaseException:
            self.disable()
            raise

    def _install(self) -> None:
        for name in MEGATRONS:
            self._replace(schedules, name, lambda _: self._function)
        self._replace(schedules, "get_model_config", self._begun_by_megatron)
        if clip_grads.l2_norm_impl is getattr(utils, "local_multi_tensor_l2_norm", None):
            self._replace(clip_grads, "l2_norm_impl", lambda _: local_l2_norm)
        self._replace(dist_checkpointing, "save", lambda save: saving(save, self._residual))
        own = self._from_plain, self._residual, self._allow_changes
        self._replace(dist_checkpointing, "load", lambda load: loading(load, *own))
        if self._residual is not None:
            self._replace(GPTModel, "__init__", self._gpt_model)
            self._replace(MultiTokenPredictionLayer, "__init__", predicting(self._residual))
        self._replace(HybridModel, "__init__", building(self._residual))
        try:
            from megatron.training import training
        except ImportError:  # a loop of the user's own, on megatron.core alone
            return
        self._replace(training, "setup_model_and_optimizer", self._setup_model_and_optimizer)
        self._replace(training, "get_model", self._get_model)
        self._replace(training, "get_megatron_optimizer", self._get_megatron_optimizer)
        self._replace(training, "build_train_valid_test_data_iterators", self._build_data_iterators)
        self._replace(training, "calc_params_l2_norm", self._calc_params_l2_norm)

    def disable(self) -> None:
        """Takes everything back. Chunks that were built stay as they are."""
        for owner, name, value in reversed(self._before):
            setattr(owner, name, value)
        self._before.clear()
        PROMISE.make(None)
        Enabled._current = None

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.disable()

    def _replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        self._before.append((owner, name, original))
        setattr(owner, name, wrap(original))

    # -- in the place of Megatron's functions

    def _begun_by_megatron(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's schedules, and they alone, begin with this call: also those that a loop got before they were replaced."""

        @functools.wraps(original)
        def get_config(model: Any) -> Any:
            if not PROMISE.running:
                raise RuntimeError(
                    "pipehc.megatron is enabled, but the loop runs a schedule of Megatron's that it got before, or by name; call "
                    "enable() before it asks get_forward_backward_func(), or run what forward_backward_func(...) of "
                    "pipehc.megatron returns"
                )
            return original(model)

        return get_config

    def _gpt_model(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(model: Any, config: Any, transformer_layer_spec: Any, *args: Any, **given: Any) -> None:
            assert self._residual is not None
            original(model, config, converted_once(transformer_layer_spec, self._residual), *args, **given)

        return init

    def _setup_model_and_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Refuses what cannot work before anything is built; a model builder then gets our chunks, as `get_model` does."""

        def setup_model_and_optimizer(
            model_type: Any, model_provider_func: Any = None, checkpointing_context: Any = None, **given: Any
        ) -> Any:
            from megatron.training import get_args

            pipeline = parallel_state.get_pipeline_model_parallel_group()
            refuse_job(get_args(), self._source, pipeline.size(), self._residual)
            container = given.get("cfg_container")
            if container is not None and getattr(container, "model", None) is not None:
                given["cfg_container"] = copy.copy(container)
                given["cfg_container"].model = OurModelConfig(container.model, self._source, self._residual)
            return original(model_type, model_provider_func, checkpointing_context, **given)

        return setup_model_and_optimizer

    def _get_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_model(model_provider_func: Any, *args: Any, **given: Any) -> list[Any]:
            def wrap(chunk_of: Callable[..., torch.nn.Module], groups: Any) -> list[Any]:
                seen = {} if groups is None else {"pg_collection": groups}
                return list(original(chunk_of, *args, **given | seen))

            config = {} if given.get("config") is None else {"config": given["config"]}
            return wrapped_chunks(self._source, self._residual, model_provider_func, wrap, given.get("pg_collection"), **config)

        return get_model

    def _get_megatron_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_megatron_optimizer(*args: Any, **given: Any) -> Any:
            with gradient_groups(self._source.placement(parallel_state.get_pipeline_model_parallel_world_size())):
                return saved_by_name(original(*args, **given), self._source)

        return get_megatron_optimizer

    def _build_data_iterators(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A chunk's data are built where its stage is, not where Megatron would have put it."""

        def build_train_valid_test_data_iterators(provider: Any) -> Any:
            pipeline = parallel_state.get_pipeline_model_parallel_group()
            placement = self._source.placement(pipeline.size())
            vp_stage = getattr(provider, "keywords", {}).get("vp_stage")
            place: AbstractContextManager[Any] = nullcontext()
            if vp_stage is not None:
                held = held_stages(placement, pipeline.rank())
                place = acting_at(megatron_place(placement, held[vp_stage][1])[0])
            with place:
                return original(provider)

        return build_train_valid_test_data_iterators

    def _calc_params_l2_norm(self, original: Callable[..., float]) -> Callable[..., float]:
        """--log-params-norm sums over the whole pipeline, where two ranks have each stage."""

        def calc_params_l2_norm(model: Any, force_create_fp32_copy: bool = False) -> float:
            from megatron.training import get_args

            pipeline = parallel_state.get_pipeline_model_parallel_group()
            placement = self._source.placement(pipeline.size())
            if placement.lanes == 2:
                model = counted_once(model, held_stages(placement, pipeline.rank()), get_args().bf16 and not force_create_fp32_copy)
            return original(model, force_create_fp32_copy)

        return calc_params_l2_norm
