"""Plug-ins for existing Megatron-core jobs; the only place of pipehc that imports Megatron.

Here stands what the trainer's model (`trainer/`) and existing jobs (`job/`) share: a layer as sub-layers (`layer.py`,
`nodes.py`), deferred weight gradients, versions, the shim for machines without CUDA. The two do not import each other.
"""

from importlib import import_module
from typing import Any

# Imported when they are asked for: Megatron takes seconds to import, and not all of this package needs it.
_PLACES = {
    "hyper_connection_layer_spec": "job.spec",
    "forward_backward_func": "job.schedule",
    "build_model_chunks": "job.model_chunks",
    "wrap_model_chunks": "job.model_chunks",
    "gradient_groups_of": "job.model_chunks",
    "enable": "job.enable",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module(f"{__name__}.versions").check_version()
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
