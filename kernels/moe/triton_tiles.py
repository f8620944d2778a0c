"""What the Triton kernels of the room share: tiles of an expert's rows, activations.

Rows are sorted by expert (problem.py). Which tile of rows belongs to which expert is in two small
tables, so that the number of programs does not depend on the choice and nothing waits for it:

    tile_experts (tiles,)   the expert of each tile of rows
    tile_ends (E,)          how many tiles end with each expert's
"""

import triton
import triton.language as tl

# Triton compiles a kernel anew where an integer is 1 or a multiple of 16. These change from call to
# call, and would only multiply the kernels.
SIZES = (
    "n_experts", "slots", "index_slots", "n_panels", "n_rows",
    "group_size", "nested_block", "n_groups", "n_lines",
)  # fmt: skip


@triton.jit
def tile_of_item(item, n_first, n_second, GROUP: tl.constexpr):
    """(first, second) tile: GROUP tiles of the second axis go together, so that what they read of
    the first is still in the cache."""
    in_group = GROUP * n_first
    group = item // in_group
    size = tl.minimum(n_second - group * GROUP, GROUP)
    return item % in_group // size, group * GROUP + item % in_group % size


@triton.jit
def rows_of_tile(tile, tile_experts_ptr, tile_ends_ptr, starts_ptr, ROWS: tl.constexpr):
    """The expert of a tile, its first row, its rows (ROWS,), and which are the expert's."""
    expert = tl.load(tile_experts_ptr + tile)
    before = tl.load(tile_ends_ptr + expert - 1, mask=expert > 0, other=0)
    begin = tl.load(starts_ptr + expert).to(tl.int32) + (tile - before) * ROWS
    rows = begin + tl.arange(0, ROWS)
    return expert, begin, rows, rows < tl.load(starts_ptr + expert + 1).to(tl.int32)


@triton.jit
def gate_and_slope(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """a = act(gate) up and its derivatives by gate and by up, in float32."""
    if ACTIVATION == "swiglu":
        sigmoid = tl.sigmoid(gate)
        act = gate * sigmoid
        slope = sigmoid + act * tl.sigmoid(-gate)  # 1 - sigmoid without cancellation
        return act * up, up * slope, act
    elif ACTIVATION == "geglu":
        below = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        act = gate * below
        slope = below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        return act * up, up * slope, act
    elif ACTIVATION == "geglu_tanh":
        inner = 0.7978845608028654 * gate * (1.0 + 0.044715 * gate * gate)
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        below = tl.sigmoid(2.0 * inner)
        act = gate * below
        rise = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * gate * gate)
        slope = below + 2.0 * act * tl.sigmoid(-2.0 * inner) * rise
        return act * up, up * slope, act
    else:
        # comparisons in this order keep a NaN
        c = tl.where(gate > limit, limit, gate)
        v = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        sigmoid = tl.sigmoid(alpha * c)
        act = c * sigmoid
        slope = sigmoid + alpha * act * tl.sigmoid(-alpha * c)
        by_gate = tl.where(gate > limit, 0.0, (v + 1.0) * slope)
        by_up = tl.where((up > limit) | (up < -limit), 0.0, act)
        return act * (v + 1.0), by_gate, by_up
