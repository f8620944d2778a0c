"""Dropout that keeps nothing: forward and backward draw the same numbers from their positions."""

import triton
import triton.language as tl


@triton.jit
def is_kept(seed, table, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """Dropout's choice for (rows, COLUMNS) elements, first_column a multiple of 4: bool.

    Word column % 4 of Philox4x32-10 at counter (column // 4, row, table, 0) under the key `seed`;
    its upper 24 bits are kept from `threshold` = ceil(p 2**24) on.
    """
    # (rows, COLUMNS / 4) counters
    zero = tl.zeros((rows.shape[0], COLUMNS // 4), dtype=tl.int32)
    quads = (first_column // 4 + tl.arange(0, COLUMNS // 4))[None, :] + zero
    words = tl.philox(seed, quads, rows[:, None] + zero, table + zero, zero)
    even = tl.interleave(words[0], words[2])
    odd = tl.interleave(words[1], words[3])
    upper = (tl.interleave(even, odd) >> 8).to(tl.int32)
    return upper >= threshold


@triton.jit
def is_kept_by_column(seed, table, first_column, rows, threshold, COLUMNS: tl.constexpr):
    """`is_kept` with the axes exchanged: (COLUMNS, rows)."""
    zero = tl.zeros((COLUMNS // 4, rows.shape[0]), dtype=tl.int32)
    quads = (first_column // 4 + tl.arange(0, COLUMNS // 4))[:, None] + zero
    words = tl.philox(seed, quads, rows[None, :] + zero, table + zero, zero)
    # (COLUMNS / 4, rows, 2, 2): word 2 y + x at [..., x, y]
    words = tl.join(tl.join(words[0], words[1]), tl.join(words[2], words[3]))
    words = tl.permute(words, (0, 3, 2, 1)).reshape(COLUMNS, rows.shape[0])
    return (words >> 8).to(tl.int32) >= threshold


@triton.jit
def is_kept_at(seed, table, rows, columns, threshold):
    """`is_kept` for columns in any order: one counter an element, four times the work."""
    zero = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.int32)
    place = columns[None, :] + zero
    words = tl.philox(seed, place // 4, rows[:, None] + zero, table + zero, zero)
    word = tl.where(place % 4 == 0, words[0], words[1])
    word = tl.where(place % 4 == 2, words[2], word)
    word = tl.where(place % 4 == 3, words[3], word)
    return (word >> 8).to(tl.int32) >= threshold
