"""The meaning of the moe room in float64: expert by expert, differentiable by autograd."""

import torch


def gated(z, activation, interleaved=False, alpha=0.0, limit=0.0):
    """a (R, I) from z (R, 2 I): the activation of the gate's half times the other half; or from
    z (R, I) alone."""
    if activation == "silu":
        return z * torch.sigmoid(z)
    if activation == "gelu":
        return 0.5 * z * (1 + torch.erf(z / 2**0.5))
    if activation == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    if activation == "relu":
        return z.clamp(min=0)
    gate, up = (z[:, 0::2], z[:, 1::2]) if interleaved else z.chunk(2, dim=1)
    if activation == "swiglu":
        return gate * torch.sigmoid(gate) * up
    if activation == "geglu":
        return 0.5 * gate * (1 + torch.erf(gate / 2**0.5)) * up
    if activation == "geglu_tanh":
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up
    if activation == "reglu":
        return gate.clamp(min=0) * up
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    raise ValueError(f"no activation {activation!r}")


def moe_mlp(
    x, ids, gates, gate_up, down, gate_up_bias=None, down_bias=None, activation="swiglu",
    interleaved=False, transposed=False, scale_input=False, alpha=0.0, limit=0.0,
    up_a=None, up_b=None, up_scale=1.0, down_a=None, down_b=None, down_scale=1.0,
):  # fmt: skip
    """y (T, H) float64 from x (T, H), ids and gates (T, K), gate_up (E, 2 I, H), down (E, H, I).

    up_a (E, R, H) and up_b (E, 2 I, R) add up_scale up_b up_a to gate_up, and so for down.
    """
    x, gates, gate_up, down = (t.double() for t in (x, gates, gate_up, down))
    if transposed:
        gate_up, down = gate_up.mT, down.mT
    y = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate = gates[token, slot][:, None]
        row = x[token] * gate if scale_input else x[token]
        z = row @ gate_up[e].T
        if gate_up_bias is not None:
            z = z + gate_up_bias[e].double()
        if up_a is not None:
            z = z + up_scale * (row @ up_a[e].double().T @ up_b[e].double().T)
        a = gated(z, activation, interleaved, alpha, limit)
        out = a @ down[e].T
        if down_bias is not None:
            out = out + down_bias[e].double()
        if down_a is not None:
            out = out + down_scale * (a @ down_a[e].double().T @ down_b[e].double().T)
        y = y.index_add(0, token, out if scale_input else out * gate)
    return y
