"""Our Triton kernels by name, and what they compute. Without torch, so that reading a hardware file stays quick."""

SUMS = {"parameter_sum_kernel"}
"""Kernels that add up what they are given."""

# Of hyper-connections' others, whose first argument is streams [tokens, n, C], for a token and channel and by the number of
# streams: projections onto n^2 + 2n coefficients, and sums over streams.
_OF_CONNECTIONS = {
    "pre_kernel": lambda n: 2 * n,
    "pre_backward_kernel": lambda n: 4 * n,
    "post_res_kernel": lambda n: 2 * n * (n + 1),
    "post_res_backward_kernel": lambda n: 4 * n * (n + 1),
    "project_kernel": lambda n: 2 * n * (n * n + 2 * n) + 2 * n * n + 4 * n,
    "map_kernel": lambda n: 2 * n,
    "rebuild_kernel": lambda n: 2 * n * (n + 1) + 2 * n,
    "map_backward_kernel": lambda n: 2 * n * n + 4 * n,
    "stream_gradient_kernel": lambda n: 2 * n * (n * n + 2 * n) + 2 * n * n + 4 * n,
    "phi_gradient_kernel": lambda n: 2 * n * (n * n + 2 * n),
}
# Of SwiGLU's and routing's for a row and by its length.
_OF_FEED_FORWARD = {
    "swiglu_kernel": lambda width: 5 * width // 2,
    "swiglu_backward_kernel": lambda width: 15 * width // 2,
    "choose_kernel": lambda experts: 8 * experts,
    "choose_backward_kernel": lambda experts: 12 * experts,
    "place_kernel": lambda experts: 3 * experts,
    "spread_kernel": lambda width: 0,
    "collect_kernel": lambda width: width,
}
FLOPS_PER_CHANNEL = _OF_FEED_FORWARD | _OF_CONNECTIONS
# Besides, with the norm of y: y . x_j and the sum again; times the weight; the sum again and the weight's gradient.
NORM_FLOPS_PER_CHANNEL = {
    "map_kernel": lambda n: 4 * n + 4,
    "rebuild_kernel": lambda n: 2,
    "map_backward_kernel": lambda n: 1,
    "stream_gradient_kernel": lambda n: 2 * n + 8,
}
KERNELS = sorted(FLOPS_PER_CHANNEL.keys() | SUMS)
OF_CONNECTIONS = _OF_CONNECTIONS.keys() | SUMS
"""Those of hyper-connections."""
