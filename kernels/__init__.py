"""Operations of the hyper-connection family on n residual streams: Triton kernels, each beside its PyTorch reference."""

from pipehc.kernels import manifolds
from pipehc.kernels.coefficients import coefficients
from pipehc.kernels.coefficients_pre import coefficients_pre
from pipehc.kernels.post_res import post_res
from pipehc.kernels.post_res_pre import post_res_pre
from pipehc.kernels.pre import pre

__all__ = ["coefficients", "coefficients_pre", "manifolds", "post_res", "post_res_pre", "pre"]
