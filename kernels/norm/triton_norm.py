"""Norms on a GPU: rows in registers where they fit, otherwise read again from the cache."""

import triton
import triton.language as tl

SIZES = ("n_rows", "per_block", "n_blocks")  # a new number of them compiles nothing


@triton.jit
def load_row(ptr, rows, row_stride, columns, n_rows, width):
    """A tile (rows, columns) in float32, 0 outside."""
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    at = ptr + rows[:, None] * row_stride + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def scale_of(weight_ptr, offset, columns, width):
    """offset + weight as a row of the tile, 1 without a weight."""
    if weight_ptr is None:
        return tl.full((1, columns.shape[0]), 1.0, tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return (weight + offset)[None, :]


@triton.jit(do_not_specialize=SIZES)
def norm_forward_kernel(
    x_ptr, residual_ptr, sum_ptr, weight_ptr, bias_ptr, y_ptr, rstd_ptr, mean_ptr,
    x_stride, residual_stride, n_rows, width, offset, eps,
    CENTRED: tl.constexpr, EARLY: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = s r w + bias, s = x + residual, r = 1 / sqrt(mean of squares + eps): ROWS rows a program

    x, residual (T, N) rows of contiguous elements   sum, y (T, N)   weight, bias (N)
    rstd, mean (T) float32
    WHOLE   COLUMNS is at least N: the row is read once
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, 1), tl.float32)
    s_ptr = x_ptr
    s_stride = x_stride
    if residual_ptr is not None:
        s_ptr = sum_ptr
        s_stride = width
    s = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, width, COLUMNS):
        columns = start + lanes
        s = load_row(x_ptr, rows, x_stride, columns, n_rows, width)
        if residual_ptr is not None:
            s += load_row(residual_ptr, rows, residual_stride, columns, n_rows, width)
            inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
            rounded = s.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + rows[:, None] * width + columns[None, :], rounded, mask=inside)
            s = rounded.to(tl.float32)
        if CENTRED:
            total += tl.sum(s, 1, keep_dims=True)
        else:
            total += tl.sum(s * s, 1, keep_dims=True)
    mean = tl.zeros((ROWS, 1), tl.float32)
    if CENTRED:
        mean = total / width
        total = tl.zeros((ROWS, 1), tl.float32)
        left = tl.zeros((ROWS, 1), tl.float32)  # by the rounded mean: matters far from zero
        for start in tl.range(0, width, COLUMNS):
            columns = start + lanes
            if not WHOLE:
                s = load_row(s_ptr, rows, s_stride, columns, n_rows, width)
            centred = tl.where((columns < width)[None, :], s - mean, 0.0)
            left += tl.sum(centred, 1, keep_dims=True)
            total += tl.sum(centred * centred, 1, keep_dims=True)
        mean += left / width
        total -= left * left / width
    r = 1.0 / tl.sqrt_rn(total / width + eps)
    if rstd_ptr is not None:
        row = rows[:, None]
        tl.store(rstd_ptr + row, r, mask=row < n_rows)
        if CENTRED:
            tl.store(mean_ptr + row, mean, mask=row < n_rows)

    for start in tl.range(0, width, COLUMNS):
        columns = start + lanes
        if not WHOLE:
            s = load_row(s_ptr, rows, s_stride, columns, n_rows, width)
        y = (s - mean) * r if CENTRED else s * r
        if EARLY:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        if weight_ptr is not None:
            y = y * scale_of(weight_ptr, offset, columns, width)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < width, other=0.0)
            y = y + bias.to(tl.float32)[None, :]
        inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
        at = y_ptr + rows[:, None] * width + columns[None, :]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def norm_dx_kernel(
    x_ptr, dy_ptr, dsum_ptr, weight_ptr, dx_ptr, rstd_ptr, mean_ptr,
    x_stride, dy_stride, dsum_stride, n_rows, width, offset,
    CENTRED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx = r (m - mean(m) - x^ mean(m x^)) + dsum, m = dy w: ROWS rows a program

    x (T, N) what was normalised   dy, dsum (T, N) rows of contiguous elements   dx (T, N)
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, COLUMNS)
    r = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
    mean = tl.zeros((ROWS, 1), tl.float32)
    if CENTRED:
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
    of_m = tl.zeros((ROWS, 1), tl.float32)
    of_product = tl.zeros((ROWS, 1), tl.float32)
    m = tl.zeros((ROWS, COLUMNS), tl.float32)
    normalised = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, width, COLUMNS):
        columns = start + lanes
        m = load_row(dy_ptr, rows, dy_stride, columns, n_rows, width)  # 0 past the end
        m = m * scale_of(weight_ptr, offset, columns, width)
        normalised = (load_row(x_ptr, rows, x_stride, columns, n_rows, width) - mean) * r
        of_product += tl.sum(m * normalised, 1, keep_dims=True)
        if CENTRED:
            of_m += tl.sum(m, 1, keep_dims=True)
    for start in tl.range(0, width, COLUMNS):
        columns = start + lanes
        if not WHOLE:
            m = load_row(dy_ptr, rows, dy_stride, columns, n_rows, width)
            m = m * scale_of(weight_ptr, offset, columns, width)
            normalised = (load_row(x_ptr, rows, x_stride, columns, n_rows, width) - mean) * r
        dx = r * (m - of_m / width - normalised * (of_product / width))
        if dsum_ptr is not None:
            dx += load_row(dsum_ptr, rows, dsum_stride, columns, n_rows, width)
        inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
        at = dx_ptr + rows[:, None] * width + columns[None, :]
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def norm_sums_kernel(
    x_ptr, dy_ptr, rstd_ptr, mean_ptr, dweight_ptr, dbias_ptr,
    x_stride, dy_stride, n_rows, per_block, width,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dweight[b, n] = sum over the rows of block b of dy x^, dbias[b, n] that of dy

    x, dy (T, N)   dweight, dbias (blocks, N) float32   per_block rows are a block
    """
    n_tiles = tl.cdiv(width, COLUMNS)
    block = (tl.program_id(0) // n_tiles).to(tl.int64)
    columns = tl.program_id(0) % n_tiles * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum((block + 1) * per_block, n_rows)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(block * per_block, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        dy = load_row(dy_ptr, rows, dy_stride, columns, end, width)
        if dbias_ptr is not None:
            dbias += dy
        if dweight_ptr is not None:
            x = load_row(x_ptr, rows, x_stride, columns, end, width)
            if CENTRED:
                x -= tl.load(mean_ptr + rows, mask=rows < end, other=0.0)[:, None]
            dweight += dy * (x * tl.load(rstd_ptr + rows, mask=rows < end, other=0.0)[:, None])
    at = block * width + columns
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, 0), mask=columns < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, 0), mask=columns < width)


@triton.jit(do_not_specialize=SIZES)
def norm_add_blocks_kernel(partial_ptr, to_ptr, n_blocks, width, COLUMNS: tl.constexpr):
    """to[n] = sum over b of partial[b, n], in order of b"""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for b in tl.range(0, n_blocks):
        total += tl.load(partial_ptr + b * width + columns, mask=inside, other=0.0)
    tl.store(to_ptr + columns, total.to(to_ptr.dtype.element_ty), mask=inside)
