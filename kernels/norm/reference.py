"""The meaning of the norm room in float64, differentiable by autograd."""

import torch


def norm(x, weight=None, bias=None, residual=None, eps=1e-6, weight_offset=0.0, is_centred=False):
    """y and the sum of x and residual, both float64: (..., N), normalised over the last axis."""
    total = x.double() if residual is None else x.double() + residual.double()
    centred = total - total.mean(-1, keepdim=True) if is_centred else total
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.double() + weight_offset)
    if bias is not None:
        y = y + bias.double()
    return y, total


def rope(x, cos, sin, positions=None, interleaved=False):
    """x (B, L, H, D) with its first 2 C columns turned in pairs; tables (.., C), float64."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    if positions is not None:
        cos, sin = cos[positions], sin[positions]  # (B, L, C)
    elif cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    cos, sin = cos[:, :, None], sin[:, :, None]
    n = cos.shape[-1]
    turned, rest = x[..., : 2 * n], x[..., 2 * n :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :n], turned[..., n:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def gated(gate, up, activation):
    """f(gate) up, float64, in torch's own activations."""
    gate = gate.double()
    if activation == "silu":
        value = torch.nn.functional.silu(gate)
    else:
        how = "tanh" if activation == "gelu_tanh" else "none"
        value = torch.nn.functional.gelu(gate, approximate=how)
    return value * up.double()


def embedding(ids, weight):
    """weight[ids], float64."""
    return weight.double()[ids]


def embedding_gradient(dy, ids, n_rows, padding_row=-1, by_frequency=False):
    """dweight (V, N), float64: the sum of the rows of dy (T, N) of each id in ids (T,)."""
    dweight = dy.new_zeros(n_rows, dy.shape[-1], dtype=torch.float64)
    dweight.index_add_(0, ids, dy.double())
    if by_frequency:
        dweight /= torch.bincount(ids, minlength=n_rows).clamp(min=1)[:, None]
    if padding_row >= 0:
        dweight[padding_row] = 0.0
    return dweight
