"""torch tensors -> pointers, extents and strides of the C++ kernels (csrc/moe)."""

from __future__ import annotations

import torch

from tilewright.native import native
from tilewright.ops.common.cpu import NAMES, why_not_on_cpu
from tilewright.ops.common.packed import PackedWeight
from tilewright.ops.common.packed_cpu import native_packed
from tilewright.ops.moe.problem import DENSE, Operands, Problem

NO_ROWS = (0, 0)


def why_not(p: Problem) -> str | None:
    for packing, n_in in ((p.up, p.features), (p.down, p.width)):
        if packing.format != DENSE and packing.group_size % 8 and packing.group_size < n_in:
            return f"group_size is {packing.group_size}, the kernel needs a multiple of 8"
    return why_not_on_cpu(p.device, p.dtype)


def _in_rows(t: torch.Tensor) -> torch.Tensor:
    """`t` with neighbours along its last axis side by side; a copy where they are not."""
    if t.is_conj() or t.is_neg():
        raise ValueError("moe_mlp: a conjugated or negated view; call .resolve_neg() first")
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _rows(t: torch.Tensor | None) -> tuple[int, int]:
    return NO_ROWS if t is None else (t.data_ptr(), t.stride(0))


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _floats(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.detach().float().contiguous()


def _whole(packed: PackedWeight) -> PackedWeight:
    if packed.offsets is not None:
        dtype = torch.float32 if packed.nested else packed.scales.dtype
        offsets = packed.offsets
        packed = packed.map(lambda t: t.to(dtype) if t is offsets else t)
    return packed.map(torch.Tensor.contiguous)


class _Held:
    """A call's tensors in the layout the kernels read, kept alive until it returns."""

    def __init__(self, x, gates, order, starts, z_update, z, o: Operands, p: Problem):
        self.x, self.gates, self.z = _in_rows(x), _floats(gates), z
        self.z_update = z_update
        self.order, self.starts = order.contiguous(), starts.contiguous()
        self.biases = _floats(o.gate_up_bias), _floats(o.down_bias)
        self.is_packed = o.gate_up is None
        if o.gate_up is None or o.down is None:
            self.weights: tuple = _whole(p.packed_gate_up(o)), _whole(p.packed_down(o))
            self.natives = tuple(native_packed(w) for w in self.weights)
        else:
            self.weights = _in_rows(o.gate_up), _in_rows(o.down)
            self.natives = tuple((w.data_ptr(), w.stride(0), w.stride(1)) for w in self.weights)

    def arguments(self, p: Problem) -> tuple:
        return (
            NAMES[p.dtype], (p.tokens, p.slots, p.experts, p.features, p.width),
            (p.activation, p.alpha, p.limit, p.interleaved, p.transposed, p.scale_input),
            _rows(self.x), _address(self.gates), self.order.data_ptr(), self.starts.data_ptr(),
            *self.natives, self.is_packed, *(_address(b) for b in self.biases),
            _address(self.z_update), _address(self.z), torch.get_num_threads(),
        )  # fmt: skip


def forward(x, gates, order, starts, keeps, o: Operands, p: Problem, z_update=None):
    """y (T, H) and z (T K, 2 I), which is empty unless `keeps`; z_update (T K, 2 I), contiguous, is
    added to z before the activation."""
    y = x.new_empty(p.tokens, p.features)
    z = x.new_empty(order.numel() if keeps else 0, p.lines)
    z[int(starts[-1]) :] = 0  # of slots that go nowhere
    held = _Held(x, gates, order, starts, z_update, z if keeps else None, o, p)
    native().moe_forward(_rows(y), *held.arguments(p))
    return y, z


def backward(
    dy, x, gates, z, order, starts, o: Operands, p: Problem, wants, da_update=None, dz=None
):
    """Gradients of x, gates, the weights and their biases; empty where not wanted.

    da_update   (T K, I), contiguous, is added to W2^T dy; dz (T K, 2 I) receives the gradient of z
    """
    held = _Held(x, gates, order, starts, None, z, o, p)
    dy = _in_rows(dy)
    inputs = (x, gates, o.gate_up, o.down, o.gate_up_bias, o.down_bias)
    dtypes = (x.dtype, torch.float32, x.dtype, x.dtype, torch.float32, torch.float32)
    grads: list[torch.Tensor | None] = [None] * len(inputs)
    for i, (t, dtype, wants_it) in enumerate(zip(inputs, dtypes, wants, strict=False)):
        if wants_it:
            grads[i] = torch.empty(t.shape, dtype=dtype)
    if grads[1] is not None:
        grads[1].zero_()  # slots that go nowhere
    dx, *others = grads
    native().moe_backward(
        _rows(dy), _rows(dx), tuple(_address(g) for g in others), _address(da_update),
        _address(dz), *held.arguments(p),
    )  # fmt: skip
    return tuple(
        x.new_empty(0) if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)
    )


def grouped(rows, index, weight, starts) -> torch.Tensor:
    """(R, N): row r, or row index[r], of `rows` times weight[e]^T for the rows r of each expert e,
    weight (E, N, M); 0 for those of none."""
    experts, n_out, n_in = weight.shape
    n_rows = rows.shape[0] if index is None else index.numel()
    out = rows.new_empty(n_rows, n_out)
    out[int(starts[-1]) :] = 0
    rows = _in_rows(rows)
    is_transposed = weight.stride(-1) != 1 and weight.stride(-2) == 1
    if not is_transposed and weight.stride(-1) != 1:
        weight = weight.contiguous()
    along = weight.mT if is_transposed else weight
    native().moe_grouped(
        NAMES[rows.dtype], (experts, n_out, n_in, n_rows), starts.data_ptr(), _indexed(rows, index),
        (along.data_ptr(), along.stride(0), along.stride(1)), is_transposed, _rows(out),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def outer(left, left_index, right, right_index, starts) -> torch.Tensor:
    """(E, M, N): the sum of left^T right over the rows of each expert."""
    left, right = _in_rows(left), _in_rows(right)
    experts, n_left, n_right = starts.numel() - 1, left.shape[1], right.shape[1]
    n_rows = left.shape[0] if left_index is None else left_index.numel()
    out = left.new_empty(experts, n_left, n_right)
    native().moe_outer(
        NAMES[left.dtype], (experts, n_left, n_right, n_rows), starts.data_ptr(),
        _indexed(left, left_index), _indexed(right, right_index), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _indexed(rows: torch.Tensor, index: torch.Tensor | None) -> tuple[int, int, int, int]:
    """index (R,) int32, contiguous, or None."""
    return *_rows(rows), rows.shape[0], _address(index)
