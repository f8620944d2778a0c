"""What the attention kernels share: the keys a query sees, tiles of rows, softcap.

Everything structural (causal, window, segments, documents, the live range of key_mask) is an
interval of keys for each query, so that tiles outside are never visited and only tiles that cross
an end are masked. Positions count within a document; a query stands at key position
i = its own + (its document's keys - its document's queries).
"""

import triton
import triton.language as tl

# how a kernel reads segments
WHOLE = tl.constexpr(0)
CUT = tl.constexpr(1)
WRAPPED = tl.constexpr(2)

# Triton compiles a kernel anew where an integer is 1 or a multiple of 16. For strides that is worth
# it, since it makes loads wide; these would only multiply the kernels, one more for each new shape.
SIZES = (
    "n_queries", "n_keys", "n_slots", "n_heads", "queries_per_kv_head", "n_documents", "n_steps",
    "n_rows", "terms_pitch", "left", "right", "group", "group_shift", "first_shifted_head",
    "threshold", "n_chunks", "n_splits", "n_packs", "window_left", "table_stride_b",
    "table_stride_p", "dlse_stride_b", "dlse_stride_h", "dlse_stride_t",
)  # fmt: skip

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_document(slot, cu_ptr, n_documents, n_steps, BLOCK: tl.constexpr):
    """(document, tile within it) of a tile slot, by bisection.

    Document n owns the slots from cu[n] // BLOCK + n + 1 up to the next one's first: at least
    ceil(its length / BLOCK), so the number of slots follows from the token count alone. Slots that
    a document does not need lie past its end. Documents -1 and N stand for the tokens before cu[0]
    and past cu[N].
    """
    low = -1
    high = n_documents
    for _ in range(n_steps):
        middle = (low + high + 1) // 2
        owns = tl.load(cu_ptr + middle) // BLOCK + middle + 1 <= slot
        low = tl.where(owns, middle, low)
        high = tl.where(owns, high, middle - 1)
    begin = tl.load(cu_ptr + low, mask=low >= 0, other=0)
    return low, slot - (begin // BLOCK + low + 1)


@triton.jit
def document_bounds(document, cu_ptr, n_documents, n_tokens):
    """(first token, length); documents -1 and N hold the tokens that belong to none."""
    begin = tl.load(cu_ptr + document, mask=document >= 0, other=0)
    past = document + 1 > n_documents
    end = tl.load(cu_ptr + document + 1, mask=document < n_documents, other=0)
    return begin, tl.where(past, n_tokens, end) - begin


@triton.jit
def floor_to(x, step):
    """The largest multiple of step at or below x; x may be negative."""
    return x - ((x % step) + step) % step


@triton.jit
def rolled_interval(at, length, group, shift, IS_CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr):
    """(near, far) intervals of wraparound segments, in positions from the first live key.

    Position p stands at (p - shift) mod length of the rolled document, where segments are cut; the
    interval there comes back as one piece on either side of the wrap. `near` is the piece around
    `at` itself. OF_KEYS: the keys that a query at `at` sees; else the queries that see that key.
    """
    shift = shift % tl.maximum(length, 1)
    is_wrapped = at < shift
    rolled = at - shift + tl.where(is_wrapped, length, 0)
    low = rolled // group * group
    high = tl.minimum(low + group, length)
    if IS_CAUSAL:
        if OF_KEYS:
            high = rolled + 1
        else:
            low = rolled
    inside = (at >= 0) & (at < length)
    before_low = tl.minimum(low + shift, length)
    before_high = tl.where(inside, tl.minimum(high + shift, length), 0)
    after_low = tl.maximum(low + shift - length, 0)
    after_high = tl.where(inside, tl.maximum(high + shift - length, 0), 0)
    near_low = tl.where(is_wrapped, after_low, before_low)
    near_high = tl.where(is_wrapped, after_high, before_high)
    far_low = tl.where(is_wrapped, before_low, after_low)
    far_high = tl.where(is_wrapped, before_high, after_high)
    return near_low, near_high, far_low, far_high


@triton.jit
def keys_of_query(i, first, last, left, right, group, shift, SEGMENTS: tl.constexpr):
    """[low, high) of the keys that a query at key position i sees, for a scalar or a vector.

    first, last   the live keys' range
    left, right   window sizes, 2**30 where unlimited; a causal query has right = 0
    """
    low = tl.maximum(i - left, first)
    high = tl.minimum(i + right + 1, last)
    if SEGMENTS == CUT:
        begin = floor_to(i - first + shift, group) + first - shift
        low = tl.maximum(low, begin)
        high = tl.minimum(high, begin + group)
    return low, high


@triton.jit
def queries_of_key(j, first, offset, n_queries, left, right, group, shift, SEGMENTS: tl.constexpr):
    """[low, high) of the queries that see a live key at j; offset is the first query's position."""
    low = tl.maximum(j - right, offset)
    high = tl.minimum(j + left + 1, offset + n_queries)
    if SEGMENTS == CUT:
        begin = floor_to(j - first + shift, group) + first - shift
        low = tl.maximum(low, begin)
        high = tl.minimum(high, begin + group)
    return low - offset, high - offset


@triton.jit
def cut_tiles(low_min, low_max, high_min, high_max, BLOCK: tl.constexpr):
    """Tiles of [low_min, high_max): (all, those before the core, those in the core).

    Every row sees all of the core, [low_max, high_min): its tiles need no mask.
    """
    n_all = tl.maximum(high_max - low_min + BLOCK - 1, 0) // BLOCK
    n_before = tl.minimum(tl.maximum(low_max - low_min + BLOCK - 1, 0) // BLOCK, n_all)
    core = low_min + n_before * BLOCK
    n_core = tl.minimum(tl.maximum(high_min - core, 0) // BLOCK, n_all - n_before)
    return n_all, n_before, n_core


@triton.jit
def union(low, high):
    """The least interval (low, high) that holds all rows' intervals; (0, 0) if all are empty."""
    is_empty = low >= high
    low = tl.min(tl.where(is_empty, 2147483647, low), 0)
    high = tl.max(tl.where(is_empty, 0, high), 0)
    return tl.minimum(low, high), high


@triton.jit
def uncounted_one(n):
    """1 for any n from 1 on: the turns of a loop around a kernel's loops over tiles.

    Without it ptxas computes the addresses of the final stores before those loops and holds them
    in registers across, up to a hundred of them, and then spills what the loops need.
    """
    return tl.minimum(n, 1)


@triton.jit
def load_rows(
    source, batch, head, origin, row, inside, stride_b, stride_h, stride_t, stride_d,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Tokens origin + [row, row + ROWS) of one head: (ROWS, BLOCK_WIDTH), columns past WIDTH zero.

    source   a pointer, or a descriptor of axes (B, heads, tokens, width)
    inside   with CHECK, the rows to read; the others are zero: they may belong to another document,
             whose infinities must not meet a zero weight
    """
    if BY_DESCRIPTOR:
        tile = source.load([batch, head, origin + row, 0]).reshape(ROWS, BLOCK_WIDTH)
        if CHECK:
            tile = tl.where(inside[:, None], tile, 0.0)
    else:
        columns = tl.arange(0, BLOCK_WIDTH)
        # int64 before any product: tokens * heads * width passes 2**31
        base = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        tokens = (origin + row + tl.arange(0, ROWS)).to(tl.int64)
        pointers = base + tokens[:, None] * stride_t + columns.to(tl.int64)[None, :] * stride_d
        if CHECK:
            is_read = inside[:, None]
            if WIDTH != BLOCK_WIDTH:
                is_read = is_read & (columns < WIDTH)[None, :]
            tile = tl.load(pointers, mask=is_read, other=0.0)
        else:
            if WIDTH == BLOCK_WIDTH:
                tile = tl.load(pointers)
            else:
                tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(
    target, values, batch, head, row, limit, token, n_heads,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Store a tile of one head whose first row is number `row` of a document, token `token` of all.

    target   a descriptor of axes (B, heads, tokens, width), which leaves out what lies past its
             ends; or a pointer to contiguous (tokens, heads, width), where rows from `limit` on
             belong to another document
    """
    if BY_DESCRIPTOR:
        tile = values.to(target.dtype).reshape(1, 1, ROWS, BLOCK_WIDTH)
        target.store([batch, head, row, 0], tile)
    else:
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK_WIDTH)
        pointers = target + (token.to(tl.int64) * n_heads + head) * WIDTH
        # int32 within a tile: 128 rows of 2**16 heads of 256
        pointers += rows[:, None] * (n_heads * WIDTH) + columns[None, :]
        inside = (row + rows < limit)[:, None] & (columns < WIDTH)[None, :]
        tl.store(pointers, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def to_unit(x, IS_WIDE: tl.constexpr):
    """A factor or a logarithm in the unit that scores have in a kernel.

    In units of log 2 a 16-bit kernel spends one multiply-add on a score. IS_WIDE (float32) keeps
    natural units: a second rounding of every score would be most of the error.
    """
    if not IS_WIDE:
        x = x * LOG2_E
    return x


@triton.jit
def from_unit(x, IS_WIDE: tl.constexpr):
    """The inverse of `to_unit`."""
    if not IS_WIDE:
        x = x * LN_2
    return x


@triton.jit
def exp_of_unit(x, IS_WIDE: tl.constexpr):
    """The exponential of a difference of scores in the kernel's unit."""
    if IS_WIDE:
        x = x * LOG2_E
    return tl.exp2(x)


@triton.jit
def log_in_unit(x, IS_WIDE: tl.constexpr):
    """The logarithm in the kernel's unit."""
    y = tl.log2(x)
    if IS_WIDE:
        y = y * LN_2
    return y


@triton.jit
def tanh(x):
    """Hyperbolic tangent to about one unit in the last place of float32."""
    square = x * x
    # near 0 the exponential form cancels: a least-squares odd polynomial, 2**-23 relative to 0.625
    near = -0.33332376 + square * (0.13308714 + square * (-0.05197161 + square * 0.0152269))
    near = x + x * square * near
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, far)
