"""For `--spec local_stack LOCAL_STACK` of a script that builds a HybridModel: what `hybrid_model` says."""

from hybrid_model import stack_spec

LOCAL_STACK = stack_spec()
