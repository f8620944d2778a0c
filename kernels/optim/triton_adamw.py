"""AdamW and the sum of squares on a GPU."""

import triton
import triton.language as tl

NUMBERS = ("n", "key")  # another number of entries, or another key, compiles nothing


@triton.jit
def one_less_power(log_beta, age):
    """1 - beta^age in float32 from ln beta <= 0: a series near 0, where 1 - exp(y) would cancel."""
    y = log_beta * age
    series = 1.0 + y / 7.0 * (1.0 + y / 8.0)
    series = 1.0 + y / 5.0 * (1.0 + y / 6.0 * series)
    series = 1.0 + y / 3.0 * (1.0 + y / 4.0 * series)
    series = y * (1.0 + y / 2.0 * series)
    return tl.where(y > -0.5, -series, 1.0 - tl.exp(y))


@triton.jit
def mixed(x):
    """A bijection of 32 bits, as csrc/optim/adamw_cpu.cpp has it."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def code_of(x, EXPONENTS: tl.constexpr):
    """The code of a magnitude in [0, 1]; csrc/optim/state_codes.h says what it is."""
    least: tl.constexpr = 128 - EXPONENTS
    bits = x.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFFF + ((bits >> 20) & 1)
    shift: tl.constexpr = 2.0 ** (least + 20 - 127)
    low = (x + shift).to(tl.int32, bitcast=True) & 0xFF
    return tl.where(bits < (least << 23), low, (rounded >> 20) - (least - 1) * 8)


@triton.jit
def value_of(code, EXPONENTS: tl.constexpr):
    """The magnitude of a code."""
    least: tl.constexpr = 128 - EXPONENTS
    step: tl.constexpr = 2.0 ** (-2 - EXPONENTS)
    normal = ((code + (least - 1) * 8) << 20).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * step, normal)


@triton.jit
def over_block(x, scale):
    """x / scale, at most 1, and 0 where the scale is."""
    return tl.minimum(tl.where(scale > 0.0, x / tl.where(scale > 0.0, scale, 1.0), 0.0), 1.0)


@triton.jit(do_not_specialize=NUMBERS)
def adamw_kernel(
    p_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, master_ptr, ages_ptr, step_ptr,
    places_ptr, scale_ptr, n, key, lr, log_beta1, log_beta2, one_less_beta1, beta2, one_less_beta2,
    eps, kept,
    STOCHASTIC: tl.constexpr, CODED: tl.constexpr, MEAN_EXPONENTS: tl.constexpr,
    SQUARE_EXPONENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of ROWS blocks of BLOCK entries a program; nothing where the scale is not finite

    p, g (..)   m, v, master, ages, places (N)   m_scale, v_scale (blocks), with CODED
    step ()     float32, of all entries, this step included; ages do without this one
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    entries = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # int64: N may pass 2**31
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
        n = tl.where(scale - scale == 0.0, n, 0)
    inside = entries < n
    places = entries
    if places_ptr is not None:
        places = tl.load(places_ptr + entries, mask=inside, other=0).to(tl.int64)

    g = tl.load(g_ptr + places, mask=inside, other=0.0).to(tl.float32) * scale
    if master_ptr is not None:
        p = tl.load(master_ptr + entries, mask=inside, other=0.0)
    else:
        p = tl.load(p_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if CODED:
        blocks_inside = rows * BLOCK < n
        m_scale = tl.load(m_scale_ptr + rows, mask=blocks_inside, other=0.0)[:, None]
        v_scale = tl.load(v_scale_ptr + rows, mask=blocks_inside, other=0.0)[:, None]
        m_code = tl.load(m_ptr + entries, mask=inside, other=0).to(tl.int32)
        v_code = tl.load(v_ptr + entries, mask=inside, other=0).to(tl.int32)
        m = m_scale * value_of(m_code & 0x7F, MEAN_EXPONENTS)
        m = tl.where(m_code >= 128, -m, m)
        v = v_scale * value_of(v_code, SQUARE_EXPONENTS)
    else:
        m = tl.load(m_ptr + entries, mask=inside, other=0.0)
        v = tl.load(v_ptr + entries, mask=inside, other=0.0)
    if ages_ptr is not None:
        ages = tl.load(ages_ptr + entries, mask=inside, other=0) + 1
        tl.store(ages_ptr + entries, ages, mask=inside)
        age = ages.to(tl.float32)
    else:
        age = tl.load(step_ptr)
        ages = age.to(tl.int32)

    m += one_less_beta1 * (g - m)
    v = beta2 * v + one_less_beta2 * g * g
    rate = lr / one_less_power(log_beta1, age)
    root = tl.sqrt_rn(v) * (1.0 / tl.sqrt_rn(one_less_power(log_beta2, age)))
    p = p * kept - tl.div_rn(rate * m, root + eps)

    if CODED:
        m_scale = tl.max(tl.abs(tl.where(inside, m, 0.0)), 1)
        v_scale = tl.max(tl.where(inside, v, 0.0), 1)
        m_code = code_of(over_block(tl.abs(m), m_scale[:, None]), MEAN_EXPONENTS)
        m_code = tl.where(m < 0.0, m_code | 128, m_code)
        v_code = code_of(over_block(v, v_scale[:, None]), SQUARE_EXPONENTS)
        v_code = tl.maximum(v_code, tl.where(v > 0.0, 1, 0))
        tl.store(m_scale_ptr + rows, m_scale, mask=blocks_inside)
        tl.store(v_scale_ptr + rows, v_scale, mask=blocks_inside)
        tl.store(m_ptr + entries, m_code.to(tl.uint8), mask=inside)
        tl.store(v_ptr + entries, v_code.to(tl.uint8), mask=inside)
    else:
        tl.store(m_ptr + entries, m, mask=inside)
        tl.store(v_ptr + entries, v, mask=inside)
    if master_ptr is not None:
        tl.store(master_ptr + entries, p, mask=inside)
    if STOCHASTIC:
        entry = mixed(entries.to(tl.uint32) ^ key.to(tl.uint32))
        high = (entries >> 32).to(tl.uint32)
        random = mixed(entry + ages.to(tl.uint32) * 0x9E3779B9 + high * 0x85EBCA6B)
        bits = p.to(tl.uint32, bitcast=True)
        cut = ((bits + (random & 0xFFFF)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        is_odd = (bits & 0x7F800000) == 0x7F800000  # infinity, NaN
        tl.store(p_ptr + places, tl.where(is_odd, p.to(tl.bfloat16), cut), mask=inside)
    else:
        tl.store(p_ptr + places, p.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("n",))
def squares_kernel(x_ptr, sums_ptr, n, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """sums[program] = the sum of the squares of CHUNK elements      x (N)   sums (programs)"""
    begin = tl.program_id(0).to(tl.int64) * CHUNK
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, CHUNK, BLOCK):
        at = begin + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))
