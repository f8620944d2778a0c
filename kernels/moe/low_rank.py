"""Low-rank updates of the experts' weights, around the kernels: W + s B A is never built.

    z = W1 x + s1 B1 (A1 x)      y = W2 a + s2 B2 (A2 a)      for each row, by its expert's matrices

An implementation adds `z_update` before the activation and `da_update` to W2^T dy, and gives z and
dz back; what is left are products of rows with narrow matrices, by its `grouped` and `outer`.
"""

from __future__ import annotations

import torch

from tilewright.ops.moe.problem import ALONE, Operands, Problem


def has_update(p: Problem) -> bool:
    return p.up_scale is not None or p.down_scale is not None


def forward(implementation, x, gates, order, starts, keeps, o: Operands, p: Problem):
    """y and z as `implementation.forward` gives them, with the updates."""
    z_update = None
    if p.up_scale is not None:
        low = _up_low(implementation, x, gates, order, starts, o, p)
        z_update = implementation.grouped(low, None, _b(o.up_b, p.up_scale, x), starts)
    y, z = implementation.forward(
        x, gates, order, starts, keeps or p.down_scale is not None, o, p, z_update=z_update
    )
    if p.down_scale is not None:
        low = implementation.grouped(gated(z, p), None, _in(o.down_a, x), starts)
        out = implementation.grouped(low, None, _b(o.down_b, p.down_scale, x), starts)
        if not p.scale_input:
            out = out * _by_row(gates, order)
        y = (y.float() + _add_slots(out, order, starts, p)).to(y.dtype)
    return y, z if keeps else z[:0]


def backward(implementation, dy, x, gates, z, order, starts, o: Operands, p: Problem, wants):
    """The gradients as `implementation.backward` gives them, then up_a, up_b, down_a, down_b."""
    back, da_update = None, None
    if p.down_scale is not None:
        back = implementation.grouped(dy, order // p.slots, _in(o.down_b, x).mT, starts)
        da_update = implementation.grouped(back, None, _b(o.down_a, p.down_scale, x).mT, starts)
    wants_dz = wants[0] or (wants[1] and p.scale_input) or any(wants[6:8])
    dz = torch.empty_like(z) if p.up_scale is not None and wants_dz else None
    found = list(
        implementation.backward(
            dy, x, gates, z, order, starts, o, p, wants[:6], da_update=da_update, dz=dz
        )
    )
    updates: list[torch.Tensor | None] = [None] * 4
    if dz is not None:
        updates[:2] = _up_gradients(implementation, found, dz, x, gates, order, starts, o, p, wants)
    if any(wants[8:10]):
        updates[2:] = _down_gradients(
            implementation, back, dy, x, gates, z, order, starts, o, p, wants
        )
    for update, like in zip(updates, (o.up_a, o.up_b, o.down_a, o.down_b), strict=True):
        if update is None or like is None:
            found.append(x.new_empty(0))
        else:
            found.append(update.to(like.dtype))
    return tuple(found)


def _up_gradients(implementation, found, dz, x, gates, order, starts, o, p, wants):
    """Those of up_a and up_b; what the update has of dx and dgates is added to `found`."""
    token, by_row = order // p.slots, _by_row(gates, order)
    back = implementation.grouped(dz, None, _in(o.up_b, x).mT, starts)  # B1^T dz
    low = _up_low(implementation, x, None, order, starts, o, p)
    if wants[0]:
        rows = implementation.grouped(back, None, _b(o.up_a, p.up_scale, x).mT, starts)
        if p.scale_input:
            rows = rows * by_row
        found[0] = (found[0].float() + _add_slots(rows, order, starts, p)).to(x.dtype)
    if wants[1] and p.scale_input:
        dot = p.up_scale * (back.float() * low.float()).sum(-1)
        found[1] = found[1] + _to_slots(dot, order, starts, p).to(found[1].dtype)
    factor = by_row * p.up_scale if p.scale_input else p.up_scale
    da = db = None
    if wants[6]:
        da = implementation.outer((back * factor).to(x.dtype), None, x, token, starts)
    if wants[7]:
        db = implementation.outer(dz, None, (low * factor).to(x.dtype), None, starts)
    return da, db


def _down_gradients(implementation, back, dy, x, gates, z, order, starts, o, p, wants):
    """Those of down_a and down_b; back is B2^T dy of each row."""
    a = gated(z, p)
    factor = p.down_scale if p.scale_input else _by_row(gates, order) * p.down_scale
    da = db = None
    if wants[8]:
        da = implementation.outer((back * factor).to(x.dtype), None, a, None, starts)
    if wants[9]:
        low = implementation.grouped(a, None, _in(o.down_a, x), starts)
        low = (low * factor).to(x.dtype)
        db = implementation.outer(dy, order // p.slots, low, None, starts)
    return da, db


def gated(z: torch.Tensor, p: Problem) -> torch.Tensor:
    """a (rows, I) in z's dtype from z (rows, 2 I)."""
    if p.activation in ALONE:
        return _act(z.float(), p).to(z.dtype)
    gate, up = (z[:, 0::2], z[:, 1::2]) if p.interleaved else z.chunk(2, dim=1)
    gate, up = gate.float(), up.float()
    if p.activation == "clamped_swiglu":
        gate, up = gate.clamp(max=p.limit), up.clamp(-p.limit, p.limit)
        return (gate * torch.sigmoid(p.alpha * gate) * (up + 1)).to(z.dtype)
    return (_act(gate, p) * up).to(z.dtype)


def _act(gate: torch.Tensor, p: Problem) -> torch.Tensor:
    if p.activation in ("swiglu", "silu"):
        return torch.nn.functional.silu(gate)
    if p.activation in ("reglu", "relu"):
        return gate.clamp(min=0)
    kind = "tanh" if p.activation.endswith("_tanh") else "none"
    return torch.nn.functional.gelu(gate, approximate=kind)


def _up_low(implementation, x, gates, order, starts, o, p):
    """A1 x of each row; times its gate if that stands at the input and `gates` is given."""
    low = implementation.grouped(x, order // p.slots, _in(o.up_a, x), starts)
    if p.scale_input and gates is not None:
        low = (low * _by_row(gates, order)).to(low.dtype)
    return low


def _in(t, x) -> torch.Tensor:
    return t.detach().to(x.dtype)


def _b(t, scale, x) -> torch.Tensor:
    """A factor with the update's scale in it, in x's dtype."""
    return (t.detach() * scale).to(x.dtype)


def _by_row(gates: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return gates.detach().float().reshape(-1)[order][:, None]


def _row_of_slot(order, starts, p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) the row of each slot, and whether it goes to an expert."""
    row_of = torch.empty_like(order, dtype=torch.int64)
    row_of[order] = torch.arange(order.numel(), device=order.device)
    row_of = row_of.view(p.tokens, p.slots)
    return row_of, row_of < starts[-1]


def _add_slots(rows, order, starts, p: Problem) -> torch.Tensor:
    """(T, H) float32: the rows of each token's slots, in their order."""
    row_of, inside = _row_of_slot(order, starts, p)
    total = torch.zeros(p.tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    for k in range(p.slots):
        total += torch.where(inside[:, k, None], rows[row_of[:, k]], 0).float()
    return total


def _to_slots(values, order, starts, p: Problem) -> torch.Tensor:
    """(T, K) of a value for each row, 0 where a slot goes nowhere."""
    row_of, inside = _row_of_slot(order, starts, p)
    return torch.where(inside, values[row_of], 0)
