"""Rotary positions, gated activations and embeddings on a GPU."""

import triton
import triton.language as tl

SIZES = ("n_rows", "length", "n_ids")  # a new number of them compiles nothing


@triton.jit
def product(a, b, ROUNDED: tl.constexpr, T: tl.constexpr):
    """a b in float32, with ROUNDED as it would come back from memory."""
    c = a * b
    if ROUNDED:
        c = c.to(T).to(tl.float32)
    return c


@triton.jit(do_not_specialize=SIZES)
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, y_ptr,
    x_batch, x_token, x_head, y_batch, y_token, y_head, table_batch, table_row,
    length, n_heads, head_dim, n_angles, sign,
    INTERLEAVED: tl.constexpr, ROUNDED: tl.constexpr, COPIES: tl.constexpr,
    HEADS: tl.constexpr, ANGLES: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """y[a] = x[a] cos - x[b] sin, y[b] = x[b] cos + x[a] sin: HEADS heads of a token a program

    x, y (B, L, H, D) neighbouring columns   cos, sin (.., C)   positions (B, L) int64
    COPIES   columns past 2 C are copied, REST at a time; not in place
    """
    T: tl.constexpr = x_ptr.dtype.element_ty
    n_tiles = tl.cdiv(n_heads, HEADS)
    token = (tl.program_id(0) // n_tiles).to(tl.int64)
    heads = (tl.program_id(0) % n_tiles * HEADS + tl.arange(0, HEADS))[:, None]
    batch = token // length
    place = token % length
    angles = tl.arange(0, ANGLES)[None, :]
    if positions_ptr is not None:
        at = tl.load(positions_ptr + token) * table_row
    else:
        at = batch * table_batch + place * table_row
    few = angles < n_angles
    cos = tl.load(cos_ptr + at + angles, mask=few, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at + angles, mask=few, other=0.0).to(tl.float32) * sign

    inside = few & (heads < n_heads)
    low = 2 * angles if INTERLEAVED else angles
    high = low + 1 if INTERLEAVED else low + n_angles
    x_ptr += batch * x_batch + place * x_token + heads * x_head
    y_ptr += batch * y_batch + place * y_token + heads * y_head
    a = tl.load(x_ptr + low, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + high, mask=inside, other=0.0).to(tl.float32)
    first = product(a, cos, ROUNDED, T) - product(b, sin, ROUNDED, T)
    second = product(b, cos, ROUNDED, T) + product(a, sin, ROUNDED, T)
    tl.store(y_ptr + low, first.to(T), mask=inside)
    tl.store(y_ptr + high, second.to(T), mask=inside)
    if COPIES:
        for start in tl.range(2 * n_angles, head_dim, REST):
            columns = start + tl.arange(0, REST)[None, :]
            live = (columns < head_dim) & (heads < n_heads)
            tl.store(y_ptr + columns, tl.load(x_ptr + columns, mask=live), mask=live)


@triton.jit
def activated(a, ACTIVATION: tl.constexpr):
    """The activation and its slope, in float32."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(a)
        value = a * sigmoid
        slope = sigmoid + value * tl.sigmoid(-a)  # 1 - sigmoid without cancellation
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
        value = a * below
        slope = below + a * 0.3989422804014327 * tl.exp(-0.5 * a * a)
    else:
        inner = 0.7978845608028654 * a * (1.0 + 0.044715 * a * a)
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        below = tl.sigmoid(2.0 * inner)
        value = a * below
        rise = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * a * a)
        slope = below + 2.0 * a * below * tl.sigmoid(-2.0 * inner) * rise
    return value, slope


@triton.jit(do_not_specialize=SIZES)
def gated_forward_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, width,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = round(f(gate)) up      gate, up (T, F) rows of contiguous elements   y (T, F)"""
    n_tiles = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    columns = tl.program_id(0) % n_tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)

    value, _ = activated(gate, ACTIVATION)
    y = value.to(y_ptr.dtype.element_ty).to(tl.float32) * up

    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gated_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    dy_stride, gate_stride, up_stride, d_stride, width,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dgate = dy up f'(gate), dup = dy f(gate)      all (T, F) rows of contiguous elements"""
    n_tiles = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    columns = tl.program_id(0) % n_tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)

    value, slope = activated(gate, ACTIVATION)
    at = row * d_stride + columns
    if dup_ptr is not None:
        tl.store(dup_ptr + at, (dy * value).to(dup_ptr.dtype.element_ty), mask=inside)
    if dgate_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(dgate_ptr + at, (dy * up * slope).to(dgate_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def embedding_forward_kernel(
    ids_ptr, weight_ptr, y_ptr, weight_stride, n_rows, width, COLUMNS: tl.constexpr
):  # fmt: skip
    """y[t] = weight[ids[t]], NaN where there is no such row      ids (T) int64   weight (V, N)"""
    n_tiles = tl.cdiv(width, COLUMNS)
    token = (tl.program_id(0) // n_tiles).to(tl.int64)
    columns = tl.program_id(0) % n_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(ids_ptr + token)
    is_row = (row >= 0) & (row < n_rows)
    inside = columns < width
    at = weight_ptr + row * weight_stride + columns
    found = tl.load(at, mask=inside & is_row, other=float("nan"))
    tl.store(y_ptr + token * width + columns, found, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def embedding_backward_kernel(
    sorted_ptr, order_ptr, ends_ptr, dy_ptr, dweight_ptr, dy_stride, n_rows, width, padding_row,
    BY_FREQUENCY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dweight[v] = sum of dy[t] over the t with id v, in their order; the first of each v adds up

    sorted (T) int64 ids in order   order (T) int64 their tokens   ends (T) where a run of ids ends
    dy (T, N)   dweight (V, N), zeros
    """
    n_tiles = tl.cdiv(width, COLUMNS)
    place = (tl.program_id(0) // n_tiles).to(tl.int64)
    columns = tl.program_id(0) % n_tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    row = tl.load(sorted_ptr + place)
    before = tl.load(sorted_ptr + place - 1, mask=place > 0, other=-1)
    is_first = (place == 0) | (before != row)
    if is_first & (row >= 0) & (row < n_rows) & (row != padding_row):
        end = tl.load(ends_ptr + place)
        total = tl.zeros((COLUMNS,), tl.float32)
        for i in tl.range(place, end):
            token = tl.load(order_ptr + i)
            dy = tl.load(dy_ptr + token * dy_stride + columns, mask=inside, other=0.0)
            total += dy.to(tl.float32)
        if BY_FREQUENCY:
            total = total / (end - place).to(tl.float32)
        at = dweight_ptr + row * width + columns
        tl.store(at, total.to(dweight_ptr.dtype.element_ty), mask=inside)
