# mypy: disable-error-code="assignment,misc"
"""The streams and y again, from maps that are known: one sweep, in which nothing is projected or summed.

Every number is the one that `project_kernel` and `map_kernel` (forward.py) made, to the bit: the same sums, in the same order.
"""

from torch import Tensor

from pipehc.kernels.language import launch, launches, tl, triton
from pipehc.kernels.rms_norm import Norm
from pipehc.kernels.tiles import aggregate, block_channels, load_columns, load_tiles, store_rounded


@triton.jit(do_not_specialize=["T"])
def rebuild_kernel(
    x, f, h_post, h_res, h_pre, norm_weight, norms, x_next, y, T, C, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """x' = H_res x + H_post^T f unless x_next is None, where it is x; y = H_pre x', and with norm_weight its RMSNorm, whose scale
    is the first number of every token in `norms` [T, 1 + n]."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    tokens = t < T
    inside = tokens & (c < C)
    streams = load_tiles(x, t, c, C, inside, n)
    if x_next is not None:
        branch = tl.load(f + t * C + c, mask=inside, other=0.0).to(tl.float32)
        made = ()
        for i in tl.static_range(n):
            stream = tl.load(h_post + t * n + i, mask=tokens, other=0.0) * branch
            for j in tl.static_range(n):
                stream += tl.load(h_res + t * (n * n) + i * n + j, mask=tokens, other=0.0) * streams[j].to(tl.float32)
            stream = stream.to(x_next.dtype.element_ty)
            tl.store(x_next + t * (n * C) + i * C + c, stream, mask=inside)
            made += (stream,)
        out = aggregate(made, load_columns(h_pre, t, tokens, n), n)
    else:
        out = aggregate(streams, load_columns(h_pre, t, tokens, n), n)
    if norm_weight is not None:
        scale = tl.load(norms + t * (n + 1), mask=tokens, other=0.0)
        out *= scale * tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
    store_rounded(y + t * C + c, out, inside)


@launches
def launch_rebuild(
    x: Tensor, previous: tuple[Tensor, Tensor, Tensor] | None, maps: dict[str, Tensor], norm: Norm | None
) -> dict[str, Tensor]:
    """y and, with `previous`, x_next of `launch_mapping` with these arguments, in one launch; maps: its other results."""
    tokens, n, channels = x.shape
    out = {"y": x.new_empty(tokens, channels)}
    if previous is not None:
        out["x_next"] = x.new_empty(x.shape)
    if tokens:
        launch(
            rebuild_kernel,
            (triton.cdiv(tokens, 16), triton.cdiv(channels, block_channels(n))),
            x,
            *(previous if previous is not None else (None, None, None)),
            maps["h_pre"],
            None if norm is None else norm.weight,
            None if norm is None else maps["norms"],
            out.get("x_next"),
            out["y"],
            tokens,
            channels,
            n=n,
            BT=16,
            BC=block_channels(n),
            num_warps=4,
        )
    return out
