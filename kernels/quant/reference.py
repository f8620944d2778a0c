"""The meaning of the quant room in float64, written out plainly; needs memory for every candidate.

Tables that follow a formula are computed from it.
"""

import torch


def _normal_quantiles():
    # the outermost quantile leaves 1 - 0.9677083 of the mass, half of it on either side
    # (QLoRA, section 3): eight steps below zero, seven above, and zero itself
    # at float32 probabilities, as the published table was computed
    low, high = (
        torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float32).double())[:-1]
        for n in (8, 9)
    )
    levels = torch.cat([-low, torch.zeros(1, dtype=torch.float64), high.flip(0)])
    return levels / levels.abs().max()


def levels(format):
    """Values of the codes 0, 1, ... of a format, float64; 8-bit codes as signed types."""
    if format == "int4":
        return torch.arange(-8, 8, dtype=torch.float64)
    if format == "uint4":
        return torch.arange(16, dtype=torch.float64)
    if format == "nf4":
        return _normal_quantiles()
    code = torch.arange(256, dtype=torch.int64)
    if format == "int8":
        return torch.where(code < 128, code, code - 256).double()
    bits = {"e2m1": (2, 1), "fp4": (2, 1), "fp8": (4, 3)}[format]
    code = code[: 2 ** (1 + sum(bits))]
    fraction = (code & (2 ** bits[1] - 1)).double() / 2 ** bits[1]
    exponent = code >> bits[1] & (2 ** bits[0] - 1)
    sign = 1 - 2 * (code >> sum(bits)).double()
    if format == "fp4":
        # bitsandbytes: 1 / 192 below the smallest normal; the exponent counts 8, 4, 2 down
        steps = torch.tensor([0.0, 8.0, 4.0, 2.0], dtype=torch.float64)[exponent]
        value = torch.where(exponent == 0, fraction / 8, steps * (1 + fraction))
        return sign * value / 12
    bias = 2 ** (bits[0] - 1) - 1
    normal = 2.0 ** (exponent - bias).double() * (1 + fraction)
    value = torch.where(exponent == 0, 2.0 ** (1 - bias) * fraction, normal)
    if format == "fp8":
        value[code % 128 == 127] = float("nan")
    return sign * value


def dynamic_map():
    """The 256 signed values in which double quantization stores scales, ascending.

    For i = 0 to 6, plus and minus 10^(i - 6) times the middles of 2^i equal cells of [0.1, 1];
    then 0 and 1. Source: Dettmers, 8-bit approximations, arXiv 1511.04561.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float64)


def dequantize(values, scales, offsets, group_size):
    """W[o, i] = values[o, i] scales[o, i // group_size] + offsets[o, i // group_size]"""
    weight = torch.empty_like(values, dtype=torch.float64)
    for i in range(values.shape[1]):
        g = i // group_size
        weight[:, i] = values[:, i].double() * scales[:, g].double()
        if offsets is not None:
            weight[:, i] += offsets[:, g].double()
    return weight


def nearest(weight, scales, offsets, group_size, levels):
    """For each weight the error of the best code: min over c of |W - levels[c] scale - offset|."""
    options = torch.stack(
        [
            dequantize(torch.full_like(weight, level), scales, offsets, group_size)
            for level in levels[~levels.isnan()].tolist()
        ]
    )
    return (options - weight.double()).abs().amin(0)


def absmax(weight, group_size):
    """max |W| of each group: (O, ceil(I / group_size)) float64"""
    starts = range(0, weight.shape[1], group_size)
    columns = [weight[:, i : i + group_size].double().abs().amax(1) for i in starts]
    return torch.stack(columns, 1)


def hqq_zero_points(groups, steps=20, p=0.7, beta=10.0, growth=1.01):
    """Scales and fitted zero points of groups (N, g): W ~ (code - zero) scale.

    Half-quadratic splitting of min over zero of sum |W - Wr|^p; a group stops for itself when its
    mean error no longer falls. Source: Badri and Shaji, Half-Quadratic Quantization, 2023.
    """
    scales, zeros = [], []
    for w in groups.double():
        inverse = 15 / (w.max() - w.min())
        zero = -w.min() * inverse
        strength, least, best = beta, float("inf"), zero
        for _ in range(steps):
            code = torch.clamp(torch.round(w * inverse + zero), 0, 15)
            error = w - (code - zero) / inverse
            if error.abs().mean() >= least:
                break
            least, best = error.abs().mean(), zero
            shrunk = error.abs() - error.abs() ** (p - 1) / strength
            kept = torch.sign(error) * torch.relu(torch.where(error == 0, 0.0, shrunk))
            zero = (code - (w - kept) * inverse).mean()
            strength *= growth
        scales.append(1 / inverse)
        zeros.append(best)
    return torch.stack(scales), torch.stack(zeros)


def blockwise(values, block, levels):
    """Flat blocks: nearest level of value / absmax of its block. Returns codes and absmax."""
    flat = values.double().flatten()
    codes, largest = [], []
    for start in range(0, flat.numel(), block):
        part = flat[start : start + block]
        largest.append(part.abs().max())
        scaled = part / largest[-1] if largest[-1] else part
        codes.append((scaled[:, None] - levels[None, :]).abs().argmin(1))
    return torch.cat(codes), torch.stack(largest)
