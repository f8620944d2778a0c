"""The meaning of the optim room in float64."""

import torch


def adamw(p, g, m, v, age, lr, beta1, beta2, eps, weight_decay):
    """p, m and v after the step that makes every entry `age` steps old; all (N,), age may be ()."""
    p, g, m, v, age = (t.double() for t in (p, g, m, v, age))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    mean = m / (1 - beta1**age)
    square = v / (1 - beta2**age)
    p = p * (1 - lr * weight_decay) - lr * mean / (square.sqrt() + eps)
    return p, m, v


def sm3(p, g, row, column, rows, columns, lr, eps, weight_decay):
    """p, row and column after a step: p and g (N,) at the places (rows, columns), both (N,)."""
    p, g, row, column = (t.double() for t in (p, g, row, column))
    s = torch.minimum(row[rows], column[columns]) + g**2
    row = row.scatter_reduce(0, rows, s, "amax")
    column = column.scatter_reduce(0, columns, s, "amax")
    p = p * (1 - lr * weight_decay) - lr * g / (s + eps).sqrt()
    return p, row, column


def gradient_norm(gradients):
    """The root of the sum of the squares of all elements, float64."""
    return torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()


def decoded_state(codes, scales, n_exponents, is_signed, block):
    """(N,) float64 from codes (N,) uint8 of 3 bits of mantissa, over a scale for each block."""
    code = codes.long() & (0x7F if is_signed else 0xFF)
    exponent, mantissa = code // 8, code % 8
    least = 2.0 ** (1 - n_exponents)
    magnitude = torch.where(
        exponent == 0, mantissa / 8 * least, (1 + mantissa / 8) * least * 2.0 ** (exponent - 1)
    )
    sign = 1 - 2 * (codes.long() >> 7) if is_signed else 1
    return sign * magnitude * scales.double().repeat_interleave(block)[: codes.numel()]
