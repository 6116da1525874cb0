"""Operations of the hyper-connection family on n residual streams: Triton kernels, each beside its PyTorch reference.

Here live the operations, the maps they are made with (`manifolds/`) and what their kernels share; they import nothing else of
pipehc. Begin with `pre.py`, the smallest operation: checks, choice of the backend (`backend.py`), reference, kernels, launches,
autograd function. `coefficients.py`, `coefficients_pre.py` and `post_res_pre.py` share a forward (`forward.py`) and a backward
(`backward.py`) behind `mapping.py`, the RMSNorm of y included; `post_res.py` leaves half of its backward to them (`link.py`).
What holds under autocast and of second derivatives is in `differentiation.py`, what arguments must be in `shapes.py`. A new map
from logits to H_res: see `manifolds/__init__.py`.
"""

from pipehc.kernels import manifolds
from pipehc.kernels.coefficients import coefficients
from pipehc.kernels.coefficients_pre import coefficients_pre
from pipehc.kernels.post_res import post_res
from pipehc.kernels.post_res_pre import post_res_pre
from pipehc.kernels.pre import pre

__all__ = ["coefficients", "coefficients_pre", "manifolds", "post_res", "post_res_pre", "pre"]
