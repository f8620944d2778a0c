"""A token from a row of logits on a GPU: thresholds are searched for, nothing is sorted.

Each pass streams over the row, whose second reading comes from a cache. Keys are the logits' bits
as integers that order as the floats do.
"""

import triton
import triton.language as tl

SIZES = ("n_ids", "is_output")  # a new number of them compiles nothing
LOWEST_KEY = tl.constexpr(-(2**31))  # below that of -inf; of columns outside of the row
KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
HAS_OCCURRED = tl.constexpr(1 << 30)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit(do_not_specialize=SIZES)
def occurrences_kernel(ids_ptr, counts_ptr, n_ids, vocabulary, is_output, IDS: tl.constexpr):
    """counts[b, id] += 1 for ids of the output, and HAS_OCCURRED for all   ids (B, N), -1: none"""
    row = tl.program_id(0).to(tl.int64)
    for begin in tl.range(0, n_ids, IDS):
        place = begin + tl.arange(0, IDS)
        ids = tl.load(ids_ptr + row * n_ids + place, mask=place < n_ids, other=-1)
        real = (ids >= 0) & (ids < vocabulary)
        target = counts_ptr + row * vocabulary + ids
        # whole numbers: their sum is the same in any order
        tl.atomic_or(target, tl.full((IDS,), HAS_OCCURRED, tl.int32), mask=real)
        tl.atomic_add(target, tl.zeros((IDS,), tl.int32) + is_output, mask=real)


@triton.jit(do_not_specialize=SIZES)
def penalties_kernel(
    logits_ptr, ids_ptr, counts_ptr, rules_ptr, x_ptr, row_stride, n_ids, vocabulary,
    IDS: tl.constexpr,
):  # fmt: skip
    """x[b, id] = the penalized logit; an id that occurs twice is written twice with one value

    rules   (B, 3) float64: repetition, presence, frequency
    """
    row = tl.program_id(0).to(tl.int64)
    repetition = tl.load(rules_ptr + 3 * row)
    presence = tl.load(rules_ptr + 3 * row + 1)
    frequency = tl.load(rules_ptr + 3 * row + 2)
    for begin in tl.range(0, n_ids, IDS):
        place = begin + tl.arange(0, IDS)
        ids = tl.load(ids_ptr + row * n_ids + place, mask=place < n_ids, other=-1)
        real = (ids >= 0) & (ids < vocabulary)
        seen = tl.load(counts_ptr + row * vocabulary + ids, mask=real, other=0)
        count = (seen & (HAS_OCCURRED - 1)).to(tl.float64)

        x = tl.load(logits_ptr + row * row_stride + ids, mask=real, other=0.0).to(tl.float64)
        x = tl.where(x < 0, x * repetition, x / repetition)
        x = tl.where(count > 0, x - (frequency * count + presence), x)
        tl.store(x_ptr + row * vocabulary + ids, x.to(tl.float32), mask=real)


@triton.jit
def read(x_ptr, columns, vocabulary):
    """Logits as floats; -inf outside of the row."""
    x = tl.load(x_ptr + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
    return tl.where(x == 0, 0.0, x)  # -0 too


@triton.jit
def key_of(x, columns, vocabulary):
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(columns < vocabulary, bits ^ ((bits >> 31) & 0x7FFFFFFF), LOWEST_KEY)


@triton.jit
def weight_of(x, top, steepness):
    return tl.exp2((x - top) * steepness)


@triton.jit
def mass_from(x_ptr, vocabulary, key, top, steepness, COLUMNS: tl.constexpr):
    """float64: the weights of keys from `key` on up. A lane adds up one of COLUMNS in float32."""
    lanes = tl.zeros((COLUMNS,), tl.float32)
    for begin in tl.range(0, vocabulary, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        x = read(x_ptr, columns, vocabulary)
        is_from = key_of(x, columns, vocabulary) >= key
        lanes += tl.where(is_from, weight_of(x, top, steepness), 0.0)
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def highest_key_reaching(
    x_ptr, vocabulary, low, high, target, top, steepness, WEIGHED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The highest key from which on up weights (else numbers of tokens) make up `target`.

    low    int64, a key that reaches it; high int64, one that does not. A pass halves twice what
           lies between. A lower key is returned where no token lies between it and the highest.
    """
    while high - low > 1:
        width = high - low
        first = low + (width + 3) // 4
        second = low + (2 * width + 3) // 4
        third = tl.minimum(low + (3 * width + 3) // 4, high - 1)
        second = tl.minimum(second, third)
        lanes1 = tl.zeros((COLUMNS,), tl.float32)
        lanes2 = tl.zeros((COLUMNS,), tl.float32)
        lanes3 = tl.zeros((COLUMNS,), tl.float32)
        for begin in tl.range(0, vocabulary, COLUMNS):
            columns = begin + tl.arange(0, COLUMNS)
            x = read(x_ptr, columns, vocabulary)
            key = key_of(x, columns, vocabulary)
            if WEIGHED:
                each = weight_of(x, top, steepness)
            else:
                each = tl.full((COLUMNS,), 1.0, tl.float32)
            lanes1 += tl.where(key >= first.to(tl.int32), each, 0.0)
            lanes2 += tl.where(key >= second.to(tl.int32), each, 0.0)
            lanes3 += tl.where(key >= third.to(tl.int32), each, 0.0)
        sum1 = tl.sum(lanes1.to(tl.float64), 0)
        sum2 = tl.sum(lanes2.to(tl.float64), 0)
        sum3 = tl.sum(lanes3.to(tl.float64), 0)

        if sum3 >= target:
            low = third
        elif sum2 >= target:
            low, high = second, third
        elif sum1 >= target:
            low, high = first, second
        else:
            high = first
        if not WEIGHED:  # as many as are wanted, and nobody equals one that is left out
            if sum1 == target:
                low, high = first, first + 1
            if sum2 == target:
                low, high = second, second + 1
            if sum3 == target:
                low, high = third, third + 1
    return low


@triton.jit
def last_tie(x_ptr, vocabulary, key, wanted, COLUMNS: tl.constexpr):
    """The column of the `wanted`-th token that has this key, counted from 1."""
    found = vocabulary
    so_far = wanted * 0
    begin = 0
    while (begin < vocabulary) & (so_far < wanted):
        columns = begin + tl.arange(0, COLUMNS)
        is_tie = (key_of(read(x_ptr, columns, vocabulary), columns, vocabulary) == key).to(tl.int32)
        here = tl.sum(is_tie, 0)
        if so_far + here >= wanted:
            is_it = (is_tie > 0) & (so_far + tl.cumsum(is_tie, 0) == wanted)
            found = tl.min(tl.where(is_it, columns, vocabulary), 0)
        so_far += here
        begin += COLUMNS
    return found


@triton.jit
def kept_weights(
    x_ptr, columns, vocabulary, key, last, least, top, steepness
):  # fmt: skip
    """Weights of what is kept, else 0: keys above `key`, those equal up to the column `last`, and
    of these what weighs at least `least`."""
    x = read(x_ptr, columns, vocabulary)
    own = key_of(x, columns, vocabulary)
    weight = weight_of(x, top, steepness)
    is_kept = (own > key) | ((own == key) & (columns <= last))
    return tl.where(is_kept & (weight >= least), weight, 0.0)


@triton.jit
def uniform_of(seed, step):
    """float64 in [0, 1): 53 bits of Philox4x32-10 with key `seed` and counter (step, 0, 0)."""
    low = (step & 0xFFFFFFFF).to(tl.uint32)
    high = ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    upper = (first >> 5).to(tl.float64)
    lower = (second >> 6).to(tl.float64)
    return (upper * 67108864.0 + lower) * (1.0 / 9007199254740992.0)


@triton.jit
def sample_row_kernel(
    x_ptr, reals_ptr, wholes_ptr, tokens_ptr, logprobs_ptr, row_stride, vocabulary,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """As csrc/decode/sample_cpu.cpp, a row a program; x (.., V), penalized

    reals    (B, 4) float64: 1 / temperature or 0 if greedy, its product with log2(e), top_p, and
             the least float32 that is no less than min_p
    wholes   (B, 3) int64: top_k, seed, step
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    inverse = tl.load(reals_ptr + 4 * row)
    steepness = tl.load(reals_ptr + 4 * row + 1).to(tl.float32)
    top_p = tl.load(reals_ptr + 4 * row + 2)
    least = tl.load(reals_ptr + 4 * row + 3).to(tl.float32)
    top_k = tl.load(wholes_ptr + 3 * row)

    tops = tl.full((COLUMNS,), float("-inf"), tl.float32)
    where = tl.zeros((COLUMNS,), tl.int32)
    strange = tl.zeros((COLUMNS,), tl.int32)
    for begin in tl.range(0, vocabulary, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        x = read(x_ptr, columns, vocabulary)
        strange = tl.where(x <= LARGEST, strange, 1)  # NaN and +inf
        where = tl.where(x > tops, columns, where)
        tops = tl.where(x > tops, x, tops)
    top = tl.max(tops, 0)
    is_right = (tl.max(strange, 0) == 0) & (top > float("-inf"))
    token = tl.min(tl.where(tops == top, where, vocabulary), 0)

    total = 1.0 + 0.0 * inverse
    if is_right:
        if logprobs_ptr is not None:
            total = mass_from(x_ptr, vocabulary, LOWEST_KEY + 1, top, steepness, COLUMNS)
        if inverse > 0.0:
            bits = top.to(tl.int32, bitcast=True)
            above = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 1  # no token has that key
            key = above * 0 + KEY_OF_MINUS_INFINITY
            last = vocabulary
            if (top_k > 0) & (top_k < vocabulary):
                key = highest_key_reaching(
                    x_ptr, vocabulary, key, above, top_k.to(tl.float64), top, steepness, False,
                    COLUMNS,
                )  # fmt: skip
            if top_p < 1.0:
                left = mass_from(x_ptr, vocabulary, key.to(tl.int32), top, steepness, COLUMNS)
                target = top_p * left
                key = highest_key_reaching(
                    x_ptr, vocabulary, key, above, target, top, steepness, True, COLUMNS
                )
                next = mass_from(x_ptr, vocabulary, (key + 1).to(tl.int32), top, steepness, COLUMNS)
                border = key.to(tl.int32)
                ties = tl.zeros((COLUMNS,), tl.int32)
                for begin in tl.range(0, vocabulary, COLUMNS):
                    columns = begin + tl.arange(0, COLUMNS)
                    x = read(x_ptr, columns, vocabulary)
                    ties += (key_of(x, columns, vocabulary) == border).to(tl.int32)
                n_ties = tl.sum(ties, 0)
                value = (border ^ ((border >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
                each = weight_of(value, top, steepness).to(tl.float64)
                need = tl.minimum((target - next) / each, n_ties.to(tl.float64))
                wanted = need.to(tl.int32)
                wanted += (wanted.to(tl.float64) < need).to(tl.int32)
                wanted = tl.maximum(wanted, 1)
                if wanted < n_ties:
                    last = last_tie(x_ptr, vocabulary, border, wanted, COLUMNS)

            border = key.to(tl.int32)
            mass = 0.0 * inverse
            for begin in tl.range(0, vocabulary, COLUMNS):
                columns = begin + tl.arange(0, COLUMNS)
                weight = kept_weights(
                    x_ptr, columns, vocabulary, border, last, least, top, steepness
                )
                mass += tl.sum(weight, 0).to(tl.float64)
            goal = uniform_of(
                tl.load(wholes_ptr + 3 * row + 1), tl.load(wholes_ptr + 3 * row + 2)
            ) * mass  # fmt: skip
            so_far = 0.0 * inverse
            before = so_far  # the last block that weighs anything, and what lies before it
            block = 0
            begin = 0
            while (begin < vocabulary) & (so_far <= goal):
                columns = begin + tl.arange(0, COLUMNS)
                weight = kept_weights(
                    x_ptr, columns, vocabulary, border, last, least, top, steepness
                )
                here = tl.sum(weight, 0).to(tl.float64)
                if here > 0.0:
                    block = begin
                    before = so_far
                so_far += here
                begin += COLUMNS
            columns = block + tl.arange(0, COLUMNS)
            weight = kept_weights(x_ptr, columns, vocabulary, border, last, least, top, steepness)
            within = before + tl.cumsum(weight.to(tl.float64), 0)
            passed = tl.where((weight > 0.0) & (within > goal), columns, vocabulary)
            token = tl.min(passed, 0)
            if token == vocabulary:  # the block's sum was rounded up
                token = tl.max(tl.where(weight > 0.0, columns, 0), 0)
    tl.store(tokens_ptr + row, tl.where(is_right, token, -1).to(tl.int64))
    if logprobs_ptr is not None:
        x = tl.load(x_ptr + tl.where(is_right, token, 0)).to(tl.float64)
        scale = tl.where(inverse > 0.0, inverse, 1.0)
        logprob = (x - top.to(tl.float64)) * scale - tl.log(total)
        tl.store(logprobs_ptr + row, logprob.to(tl.float32))
