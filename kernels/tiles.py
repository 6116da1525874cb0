# mypy: disable-error-code="assignment,misc"
"""Device functions that several kernels share. A *column* is one number per token, [BT, 1]; n numbers per token are a tuple of
columns, held in registers; a *tile* is a block of one stream, [BT, BC]."""

from pipehc.kernels.language import tl, triton


@triton.jit
def at_token(pointer, token, width):
    """The pointer moved to a token's row. 64 bits are needed for this step alone: what a program adds to it fits into 32.

    Not for a pointer that is None: up to Triton 3.6 a device function cannot return None."""
    return pointer + token.to(tl.int64) * width


@triton.jit
def load_columns(pointer, t, tokens, count: tl.constexpr):
    """`count` numbers of every token as columns, from a contiguous [T, count] fp32 tensor; zeros past the last token."""
    out = ()
    for k in tl.static_range(count):
        out += (tl.load(pointer + t * count + k, mask=tokens, other=0.0),)
    return out


@triton.jit
def load_tiles(pointer, t, c, C, mask, n: tl.constexpr, DEAD: tl.constexpr = False):
    """The n streams of [T, n, C] at tokens t and channels c, in the dtype they are stored in. DEAD where nothing reads them
    again soon: L2 has better use for the room (tools/kernel_report.py --only caches)."""
    out = ()
    for j in tl.static_range(n):
        out += (tl.load(pointer + t * (n * C) + j * C + c, mask=mask, other=0.0, eviction_policy="evict_first" if DEAD else ""),)
    return out


@triton.jit
def aggregate(streams, weights, n: tl.constexpr):
    """[BT, BC], fp32: the sum of n tiles with n columns as weights."""
    out = weights[0] * streams[0].to(tl.float32)
    for j in tl.static_range(1, n):
        out += weights[j] * streams[j].to(tl.float32)
    return out


@triton.jit
def opaque(tile, FENCE: tl.constexpr):
    """The tile, of which the compiler no longer knows what it was computed from, and so neither moves nor repeats that."""
    if FENCE:
        PACK: tl.constexpr = 32 // tile.dtype.primitive_bitwidth
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=PACK)
    return tile


@triton.jit
def widened(tile, FENCE: tl.constexpr):
    """The tile in fp32, converted where this stands: a bf16 tile that a loop reads stays in half the registers."""
    return opaque(tile, FENCE).to(tl.float32)


@triton.jit
def fold(tile):
    """Sum of a tile over groups of eight neighbouring channels, [BT, BC // 8]: a group lies in one thread and needs no shuffle.
    Accumulate these, and sum the remaining lanes once at the end of a row."""
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 8, 8]), 2)


@triton.jit
def zeros(count: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """A tuple of `count` fp32 accumulators [rows, columns]."""
    out = ()
    for _ in tl.static_range(count):
        out += (tl.zeros([rows, columns], tl.float32),)
    return out


@triton.jit
def row_sums(accumulators, count: tl.constexpr, PADDED: tl.constexpr, MAX_LEVELS: tl.constexpr = 7):
    """[BT, PADDED], column k the row sum of accumulator k of `count`, zeros after: one reduction for all instead of one each.
    PADDED is a power of two, at most 2 ** MAX_LEVELS."""
    parts = accumulators
    for _ in tl.static_range(PADDED - count):
        parts += (tl.zeros_like(accumulators[0]),)
    lanes: tl.constexpr = accumulators[0].shape[1]
    rows: tl.constexpr = accumulators[0].shape[0]
    # Each round halves the tuple and adds a last dimension of size 2, whose bit comes after those of the rounds before.
    for level in tl.static_range(MAX_LEVELS):
        if PADDED >> (level + 1) > 0:
            pairs = ()
            for k in tl.static_range(PADDED >> (level + 1)):
                pairs += (tl.join(parts[k], parts[k + (PADDED >> (level + 1))]),)
            parts = pairs
    return tl.sum(tl.reshape(parts[0], [rows, lanes, PADDED]), 1)


@triton.jit
def store_rounded(pointer, value, mask, DEAD: tl.constexpr = False):
    """Store fp32 values in the dtype of the pointer. fp16 saturates: the gradient of a row of zeros is huge, but stays finite.
    DEAD as in `load_tiles`."""
    if pointer.dtype.element_ty == tl.float16:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask, eviction_policy="evict_first" if DEAD else "")


def block_channels(n: int) -> int:
    """Channels of one tile of 16 tokens: eight per thread of four warps, half of that for more than four streams."""
    return 64 if n <= 4 else 32


def row_channels(n: int, tokens: int) -> int:
    """As `block_channels`, of a tile of so many tokens."""
    return 16 * block_channels(n) // tokens


def max_registers(n: int, factors: bool = False) -> int:
    """Of a thread, so that a multiprocessor holds sixteen warps; eight for more than four streams. factors: of products are in
    registers, too (projection.py), and it holds twelve."""
    if n > 4:
        return 255
    return 168 if factors else 128
