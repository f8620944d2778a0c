"""A row of logits on a GPU: what it says about the token, and its gradient in place."""

import triton
import triton.language as tl

SIZES = ("n_rows", "n_ids")  # a new number of them compiles nothing
STRAY = tl.constexpr(-(2**62))  # ids between it and 0 are no ids, and not skipped ones either


@triton.jit
def tanh(x):
    """Absolute error 1e-7, relative 3e-7 near 0, as in csrc/common/vec.h."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    e = tl.exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, p * z * x + x, tl.where(x < 0, -large, large))


@triton.jit
def seen(raw, bias_ptr, columns, inside, scale, cap, CAPPED: tl.constexpr):
    """x of logits as they came from the product."""
    x = raw.to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    x *= scale
    if CAPPED:
        x = cap * tanh(x / cap)
    return x


@triton.jit(do_not_specialize=SIZES)
def head_rows_kernel(
    logits_ptr, bias_ptr, class_weight_ptr, weight_sum_ptr, ids_ptr, largest_ptr, mass_ptr,
    log_probs_ptr, lse_ptr, total_ptr, for_ids_ptr, for_total_ptr, for_lse_ptr, for_square_ptr,
    row_stride, n_rows, n_classes, n_ids, scale, cap,
    CAPPED: tl.constexpr, HAS_STATS: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    IDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As csrc/loss/loss.h, a row a program; logits (.., V), ids and what is theirs (.., K)

    weight_sum_ptr   (1,) the sum of class weights, or None: V
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    T: tl.constexpr = logits_ptr.dtype.element_ty
    weight_sum = n_classes.to(tl.float32)
    if weight_sum_ptr is not None:
        weight_sum = tl.load(weight_sum_ptr)

    if HAS_STATS:
        largest = tl.load(largest_ptr + row)
        mass = tl.load(mass_ptr + row)
    else:
        tops = tl.full((COLUMNS,), float("-inf"), tl.float32)
        masses = tl.zeros((COLUMNS,), tl.float32)
        for begin in tl.range(0, n_classes, COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            inside = columns < n_classes
            raw = tl.load(logits_ptr + columns, mask=inside, other=0.0)
            x = seen(raw, bias_ptr, columns, inside, scale, cap, CAPPED)
            x = tl.where(inside, x, float("-inf"))
            higher = tl.maximum(tops, x)
            pivot = tl.where(higher == float("-inf"), 0.0, higher)
            masses = masses * tl.exp(tops - pivot) + tl.exp(x - pivot)
            tops = higher
        largest = tl.max(tops, 0)
        pivot = tl.where(largest == float("-inf"), 0.0, largest)
        mass = tl.sum(masses * tl.exp(tops - pivot), 0)
        tl.store(largest_ptr + row, largest)
        tl.store(mass_ptr + row, mass)
    log_mass = tl.log(mass)

    if total_ptr is not None:
        sums = tl.zeros((COLUMNS,), tl.float32)
        for begin in tl.range(0, n_classes, COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            inside = columns < n_classes
            raw = tl.load(logits_ptr + columns, mask=inside, other=0.0)
            x = seen(raw, bias_ptr, columns, inside, scale, cap, CAPPED) - largest
            if class_weight_ptr is not None:
                x *= tl.load(class_weight_ptr + columns, mask=inside, other=0.0)
            sums += tl.where(inside, x, 0.0)
        tl.store(total_ptr + row, tl.sum(sums, 0) - weight_sum * log_mass)

    k = tl.arange(0, IDS)
    real = k < n_ids
    ids = tl.load(ids_ptr + row * n_ids + k, mask=real, other=-(2**63))
    asked = (ids >= 0) & (ids < n_classes)
    is_stray = (ids >= n_classes) | ((ids < 0) & (ids > STRAY))
    raw_ids = tl.load(logits_ptr + ids, mask=asked, other=0.0)
    x_ids = seen(raw_ids, bias_ptr, ids, asked, scale, cap, CAPPED)
    log_probs = tl.where(asked, (x_ids - largest) - log_mass, 0.0)
    log_probs = tl.where(is_stray, float("nan"), log_probs)
    tl.store(log_probs_ptr + row * n_ids + k, log_probs, mask=real)
    tl.store(lse_ptr + row, largest + log_mass)

    if HAS_GRADIENT:
        has_ids = tl.max((ids >= 0).to(tl.int32), 0) > 0
        for_ids = tl.load(for_ids_ptr + row * n_ids + k, mask=asked, other=0.0)
        for_all = -tl.sum(for_ids, 0)
        for_total = 0.0
        if for_total_ptr is not None:
            for_total = tl.load(for_total_ptr + row)
            for_all -= for_total * weight_sum
        if for_lse_ptr is not None:
            for_all += tl.load(for_lse_ptr + row)
        if for_square_ptr is not None:
            for_all += 2.0 * tl.load(for_square_ptr + row) * (largest + log_mass)
        # the entries of ids are found from their logits, which the pass below writes over
        same = ids[:, None] == ids[None, :]
        at_ids = tl.sum(tl.where(same, for_ids[None, :], 0.0), 1)
        of_class = tl.full((IDS,), 1.0, tl.float32)
        if class_weight_ptr is not None:
            of_class = tl.load(class_weight_ptr + ids, mask=asked, other=0.0)
        at_ids += for_all * tl.exp(log_probs) + for_total * of_class
        if CAPPED:
            at_ids *= 1.0 - (x_ids / cap) * (x_ids / cap)
        each = for_all / mass
        tl.debug_barrier()  # until every thread has read the logits of ids
        for begin in tl.range(0, n_classes, COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            inside = columns < n_classes
            raw = tl.load(logits_ptr + columns, mask=inside, other=0.0)
            x = seen(raw, bias_ptr, columns, inside, scale, cap, CAPPED)
            g = each * tl.exp(x - largest)
            if class_weight_ptr is not None:
                g += for_total * tl.load(class_weight_ptr + columns, mask=inside, other=0.0)
            else:
                g += for_total
            if CAPPED:
                g *= 1.0 - (x / cap) * (x / cap)
            g = tl.where(has_ids, scale * g, 0.0)
            tl.store(logits_ptr + columns, g.to(T), mask=inside)
        tl.debug_barrier()  # another thread may have written the entry of an id
        tl.store(logits_ptr + ids, (scale * at_ids).to(T), mask=asked)
