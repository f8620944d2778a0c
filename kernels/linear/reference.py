"""The meaning of the linear room in float64: products written out, differentiable by autograd."""

import torch


def philox_uniform(seed, token, n_inputs):
    """Uniform numbers in [0, 1) for each (token, input): Philox4x32-10, keyed by the seed.

    word (input % 4) of counter (input // 4, token, 0, 0); token (T,) int64 -> (T, I) float64.
    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    low = 0xFFFFFFFF
    column = torch.arange(n_inputs)[None, :]
    c0, c1 = torch.broadcast_tensors(column // 4, token[:, None])
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = int(seed) & low, (int(seed) >> 32) & low
    for _ in range(10):
        # products of two 32-bit words may pass 2**63; the wrapped int64 has the right bits
        wide0, wide2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((wide2 >> 32) & low) ^ c1 ^ k0,
            wide2 & low,
            ((wide0 >> 32) & low) ^ c3 ^ k1,
            wide0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    word = torch.stack([c0, c1, c2, c3]).gather(0, (column % 4).expand_as(c0)[None])[0]
    return (word >> 8).double() / 2**24


def dropout_factors(seed, n_tokens, n_inputs, p):
    """(T, I): 0 for a dropped element of x, 1 / (1 - p) for a kept one."""
    uniform = philox_uniform(seed, torch.arange(n_tokens), n_inputs)
    return torch.where(uniform >= p, 1 / (1 - p), 0.0)


def quantize_rows(x):
    """(T, I) -> whole numbers -127 .. 127 and the scale (T, 1) of each row, float64.

    The scale and the quotient are rounded to float32, which settles what lies between two codes.
    """
    x = x.float()
    largest = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    scale = largest / 127
    codes = torch.round(x / torch.where(scale > 0, scale, 1.0)).clamp(-127, 127)
    # an infinity or NaN makes the whole row NaN, and that row alone
    return codes.double(), torch.where(largest.isfinite(), scale, float("nan")).double()


def fused_linear(
    x, weight, bias=None, out_scale=None, down=None, up=None, scale=1.0, activation="none",
    dropped=None, row_adapters=None, column_adapters=None, column_scales=None, delta=None,
):  # fmt: skip
    """y (T, O) and hidden (T, R), float64, from x (T, I) and the decoded weight (O, I).

    dropped          (T, I) factors of dropout, or None
    row_adapters     (T,) the adapter of each row, -1 for none; with it
    column_adapters  (R,) the adapter of each row of down
    column_scales    (R,) factors that take the place of scale
    delta            (O, I) what is added to the weight, or None; or (A, O, I) for each adapter
    """
    weight = weight.double()
    if delta is not None and delta.dim() == 2:
        weight = weight + delta.double()
    y = x.double() @ weight.T
    if delta is not None and delta.dim() == 3:
        for adapter, of_adapter in enumerate(delta.double()):
            mine = (row_adapters == adapter)[:, None]
            y = y + torch.where(mine, x.double() @ of_adapter.T, 0.0)
    if bias is not None:
        y = y + bias.double()
    if out_scale is not None:
        y = y * out_scale.double()
    if down is None:
        return y, y.new_zeros(y.shape[0], 0)
    kept = x.double() if dropped is None else x.double() * dropped
    hidden = kept @ down.double().T
    if activation == "relu":
        hidden = hidden.relu()
    factor = torch.as_tensor(scale, dtype=torch.float64)
    if row_adapters is not None:
        hidden = torch.where(row_adapters[:, None] == column_adapters[None, :], hidden, 0.0)
        factor = column_scales.double()
    return y + (hidden * factor) @ up.double().T, hidden


def sampled_product(dy, x, rows, columns):
    """products[n] = sum_t dy[t, rows[n]] x[t, columns[n]], (N,) float64: some of dy^T x."""
    return (dy.double().T @ x.double())[rows, columns]
