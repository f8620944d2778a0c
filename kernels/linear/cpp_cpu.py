"""torch tensors -> pointers, extents and strides of the C++ kernels (csrc/linear)."""

from __future__ import annotations

from dataclasses import replace

import torch

from tilewright.native import native
from tilewright.ops.common.cpu import NAMES, why_not_on_cpu
from tilewright.ops.common.packed import FORMATS
from tilewright.ops.common.packed_cpu import native_packed
from tilewright.ops.linear.problem import DENSE, Operands, Problem
from tilewright.recording import expect_no_copy, keep

NO_ROWS = (0, 0)
MOST_LAYERS = 8  # csrc/linear/linear.h


def why_not(p: Problem) -> str | None:
    if p.format != DENSE and p.group_size % 8 and p.group_size < p.in_features:
        return f"group_size is {p.group_size}, the kernel needs a multiple of 8"
    return why_not_on_cpu(p.device, p.dtype)


def _in_rows(t: torch.Tensor) -> torch.Tensor:
    """`t` (rows, columns) with neighbouring columns side by side; a copy where they are not."""
    if t.is_conj() or t.is_neg():
        raise ValueError("fused_linear: a conjugated or negated view; call .resolve_neg() first")
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _rows(t: torch.Tensor | None) -> tuple[int, int]:
    return NO_ROWS if t is None else (t.data_ptr(), t.stride(0))


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def floats(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.detach().float().contiguous()


def _delta(row_offsets, columns, values: torch.Tensor | None = None) -> tuple:
    return (
        row_offsets.data_ptr(), columns.data_ptr(), columns.dtype == torch.int16, _address(values),
        values is not None and values.dtype == torch.bfloat16,
    )  # fmt: skip


class _Held:
    """A call's tensors in the layout the kernels read, kept alive until it returns."""

    def __init__(self, x: torch.Tensor, o: Operands, p: Problem):
        self.order = None
        if o.input_order is not None:
            # what is packed stands in another order of inputs: x and down follow it
            expect_no_copy("fused_linear", "its input_order copies x")
            self.order = o.input_order.long()
        self.x = self.ordered(_in_rows(x))
        self.weight = None if o.weight is None else _in_rows(o.weight)
        self.bias, self.out_scale = floats(o.bias), floats(o.out_scale)
        # the adapter is converted, x never is
        self.down = None if o.down is None else self.ordered(_in_rows(o.down.to(x.dtype)))
        self.up = None if o.up is None else _in_rows(o.up.to(x.dtype))
        self.row_adapters = None if o.row_adapters is None else o.row_adapters.contiguous()
        self.column_adapters = None if o.column_adapters is None else o.column_adapters.contiguous()
        self.column_scales = floats(o.column_scales)
        self.input_order = None if o.input_order is None else o.input_order.int().contiguous()
        self.delta: tuple | None = None
        if p.has_delta:
            d = p.delta(o).map(lambda t: t.detach().contiguous())
            # its columns are numbered as those of x before it was put into order
            self.delta_x, self.delta_tensors = _in_rows(x), d
            self.delta = (
                _delta(d.row_offsets, d.columns, d.values), _rows(self.delta_x), p.n_deltas
            )  # fmt: skip
        self.seed = 0 if o.dropout_seed is None else int(o.dropout_seed.item())
        self.weight_packed = None
        if o.codes is not None:
            packed = p.packed(o)
            if packed.offsets is not None:
                dtype = torch.float32 if packed.nested else packed.scales.dtype
                packed = replace(packed, offsets=packed.offsets.to(dtype))
            self.weight_packed = packed.map(torch.Tensor.contiguous)

    def ordered(self, t: torch.Tensor) -> torch.Tensor:
        return t if self.order is None else t.index_select(1, self.order)

    def unordered(self, t: torch.Tensor) -> torch.Tensor:
        """The inverse of `ordered`."""
        return t if self.order is None else torch.empty_like(t).index_copy_(1, self.order, t)

    def packed(self, p: Problem) -> tuple | None:
        if self.weight_packed is None:
            return None
        return native_packed(self.weight_packed, p.int8_activations)

    def rule(self, p: Problem) -> tuple:
        return (
            p.scale, p.activation == "relu", _address(self.row_adapters),
            _address(self.column_adapters), _address(self.column_scales), p.dropout_p, self.seed,
            _address(self.input_order), p.int8_activations, self.delta,
        )  # fmt: skip


def _call(held: _Held, p: Problem, y, hidden) -> tuple:
    return (
        NAMES[p.dtype], (p.tokens, p.in_features, p.out_features, p.rank), _rows(held.x), _rows(y),
        _rows(held.weight), held.packed(p), _address(held.bias), _address(held.out_scale),
        _rows(held.down), _rows(held.up), _rows(hidden), held.rule(p),
    )  # fmt: skip


def forward(x, o: Operands, p: Problem):
    return forward_of_layers(x, [(o, p)])[0]


def forward_of_layers(x, layers: list[tuple[Operands, Problem]]) -> list[tuple]:
    """y and hidden of each of several layers over the same x."""
    results = [(x.new_empty(p.tokens, p.out_features), x.new_empty(p.tokens, p.rank))
               for _, p in layers]  # fmt: skip
    x = _in_rows(x)
    held = [keep(_Held(x, o, p)) for o, p in layers]
    keep(results)
    calls = [_call(h, p, *r) for h, (_, p), r in zip(held, layers, results, strict=True)]
    native().linear_forward(calls, torch.get_num_threads())
    return results


def backward(dy, x, hidden, o: Operands, p: Problem, wants):
    dx, (rest,) = backward_of_layers([dy], x, [hidden], [(o, p)], wants[0], [wants[1:]])
    return dx, *rest


def fit_together(layers: list[tuple[Operands, Problem]]) -> bool:
    """Whether these layers over one x can be multiplied side by side."""
    first = layers[0][1]
    return len(layers) <= MOST_LAYERS and all(
        _kind(p) == _kind(first) and p.dtype == first.dtype and o.input_order is None
        and not p.int8_activations
        and p.in_features and p.out_features  # an empty weight has no address to tell its kind by
        for o, p in layers
    )  # fmt: skip


def _kind(p: Problem) -> str:
    return p.format if p.format == DENSE or FORMATS[p.format].bits == 8 else "table"


def backward_of_layers(
    dys, x, hiddens, layers: list[tuple[Operands, Problem]], wants_dx: bool, wants
) -> tuple[torch.Tensor, list[tuple]]:
    """The dx of several layers over the same x, summed in float32, and of each (dbias, ddown, dup).

    wants   of each layer, which of the three; what is not wanted is an empty tensor
    """
    x = _in_rows(x)
    held = [_Held(x, o, p) for o, p in layers]
    dx = x.new_empty(x.shape) if wants_dx else None
    calls, found = [], []
    kept = []  # until the call has returned
    for h, (o, p), dy, hidden, wanted in zip(held, layers, dys, hiddens, wants, strict=True):
        shapes = ((p.out_features,), (p.rank, p.in_features), (p.rank, p.out_features))
        grads = [
            x.new_empty(shape, dtype=torch.float32) if wants_it else None
            for shape, wants_it in zip(shapes, wanted, strict=True)
        ]
        dy, hidden = _in_rows(dy), _in_rows(hidden)
        kept.append((dy, hidden))
        calls.append((_rows(dy), _rows(dx), tuple(_address(g) for g in grads),
                      _call(h, p, None, hidden)))  # fmt: skip
        found.append((h, o, grads))
    native().linear_backward(calls, torch.get_num_threads())
    rest = [
        # each empty tensor is one of its own: an operator's results may not alias
        (
            x.new_empty(0) if dbias is None or o.bias is None else dbias.to(o.bias.dtype),
            x.new_empty(0) if ddown is None or o.down is None
            else h.unordered(ddown).to(o.down.dtype),
            x.new_empty(0) if dup is None or o.up is None else dup.T.to(o.up.dtype).contiguous(),
        )
        for h, o, (dbias, ddown, dup) in found
    ]  # fmt: skip
    return x.new_empty(0) if dx is None else held[0].unordered(dx), rest


def sampled_product(dy, x, row_offsets, columns) -> torch.Tensor:
    dy, x = _in_rows(dy), _in_rows(x)
    row_offsets, columns = row_offsets.contiguous(), columns.contiguous()
    products = x.new_empty(columns.shape, dtype=torch.float32)
    native().linear_sampled(
        NAMES[x.dtype], (x.shape[0], x.shape[1], dy.shape[1]), _rows(dy), _rows(x),
        _delta(row_offsets, columns), products.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return products
