"""What a worker needs, imported once by the process that workers are forked from: each would spend seconds on it."""

# ruff: noqa: E402, F401
from importlib import import_module

from pipehc.comm.environment import quiet_libraries
from pipehc.comm.parent import end_with_parent

end_with_parent()  # it would notice by itself, but only after these imports
quiet_libraries()

from pipehc.megatron.cpu import uncompiled

with uncompiled():
    import pipehc.dry_run
    import pipehc.megatron.trainer.capabilities
    import pipehc.resume
    import pipehc.trainer

    # The commands, and what Megatron's optimizers import late.
    for _name in ("pipehc.train", "pipehc.plan", "megatron.core.models.mimo.optimizer"):
        import_module(_name)
