"""Sparse changes of a weight as all rooms and kernels see them: rows of sorted columns.

Row o of D holds `values[n]` at `columns[n]` for row_offsets[o] <= n < row_offsets[o + 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

# Columns of a weight with so many inputs or fewer fit 16 bits. torch has next to no operations on
# uint16, so that they are kept as int16 and read modulo 2**16: column 40000 is the int16 -25536.
MAX_SHORT_INPUTS = 2**16
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class WeightDelta:
    """A sparse D (O, I) that a layer adds to its weight.

    out_features  O
    in_features   I
    row_offsets   (O + 1,) int64, from 0 to N
    columns       (N,) int32, or int16 where I <= 65536, read modulo 2**16; ascending in a row
    values        (N,) float32 or bfloat16 (float64: reference only); may require grad
    block         (rows, columns) that are there together, such as (1, 8) or (16, 16); files keep
                  places of blocks, kernels read entries
    """

    out_features: int
    in_features: int
    row_offsets: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    block: tuple[int, int] = (1, 1)

    @classmethod
    def from_blocks(
        cls,
        blocks: torch.Tensor,
        values: torch.Tensor,
        out_features: int,
        in_features: int,
        block: tuple[int, int],
    ) -> WeightDelta:
        """From places of whole blocks, in any order.

        blocks   (B,) int64, row-major among (O / rows, I / columns) blocks, no two the same
        values   (B, rows, columns)
        block    (rows, columns), which divide O and I
        """
        rows, columns = block
        shape = (out_features, in_features)
        if min(block) < 1 or out_features % rows or in_features % columns:
            raise ValueError(f"WeightDelta: blocks are {block}, need divisors of (O, I) = {shape}")
        if blocks.dim() != 1 or values.shape != (len(blocks), rows, columns):
            raise ValueError(
                f"WeightDelta: blocks has shape {tuple(blocks.shape)} and values "
                f"{tuple(values.shape)}, need (B,) and (B, {rows}, {columns})"
            )
        blocks, across = blocks.long(), in_features // columns
        row = blocks.div(max(across, 1), rounding_mode="floor")
        first = row * rows * in_features + (blocks - row * across) * columns
        within = (
            torch.arange(rows, device=blocks.device)[:, None] * in_features
            + torch.arange(columns, device=blocks.device)
        )  # fmt: skip
        places = (first[:, None, None] + within).flatten()
        delta = cls.from_flat(places, values.flatten(), out_features, in_features)
        return replace(delta, block=(rows, columns))

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) int64, ascending, and values (B, rows, columns): the inverse of from_blocks."""
        rows, columns = self.block
        across = self.in_features // columns
        of_entry = self.rows() // rows * across + self.wide_columns() // columns
        # entries are in row-major order, and so they stay within a block
        order = of_entry.sort(stable=True).indices
        whole = (
            of_entry[order].view(-1, rows * columns) if self.nnz % (rows * columns) == 0 else None
        )
        if whole is None or not bool((whole == whole[:, :1]).all()):
            raise ValueError(f"WeightDelta: a block of {self.block} is not whole")
        return whole[:, 0], self.values[order].view(-1, rows, columns)

    @classmethod
    def from_flat(
        cls, places: torch.Tensor, values: torch.Tensor, out_features: int, in_features: int
    ) -> WeightDelta:
        """From flat row-major places, in any order; columns are as short as they can be.

        places   (N,) int64, o * I + i, no two the same
        values   (N,)
        """
        if values.shape != places.shape or places.dim() != 1:
            raise ValueError(
                f"WeightDelta: places has shape {tuple(places.shape)} and values "
                f"{tuple(values.shape)}, need (N,) for both"
            )
        places, order = places.long().sort(stable=True)
        size = out_features * in_features
        if places.numel() and (int(places[0]) < 0 or int(places[-1]) >= size):
            stray = int(places[0]) if int(places[0]) < 0 else int(places[-1])
            raise ValueError(f"WeightDelta: place {stray}, need 0 <= place < O * I = {size}")
        twice = (places[1:] == places[:-1]).nonzero()
        if twice.numel():
            raise ValueError(
                f"WeightDelta: place {int(places[int(twice[0])])} is there twice, need each once"
            )
        rows = places.div(max(in_features, 1), rounding_mode="floor")
        return cls(
            out_features,
            in_features,
            offsets_of_rows(rows, out_features),
            as_columns(places - rows * in_features, in_features),
            values if bool((order[1:] > order[:-1]).all()) else values[order],
        )

    @classmethod
    def stacked(
        cls, deltas: Sequence[WeightDelta | None], out_features: int, in_features: int
    ) -> WeightDelta:
        """Deltas of several adapters (O, I), one below the other: (A O, I); None is empty.

        Values are kept as they are where all are of one type, else in float32.
        """
        if not any(deltas):
            raise ValueError(f"WeightDelta.stacked: {len(deltas)} deltas, need at least one")
        there = [d for d in deltas if d is not None]
        for a, d in enumerate(deltas):
            if d is not None:
                if d.shape != (out_features, in_features):
                    raise ValueError(
                        f"WeightDelta.stacked: deltas[{a}] is of shape {d.shape}, need "
                        f"{(out_features, in_features)}"
                    )
                d.expect_whole("WeightDelta.stacked")
        one = len({d.values.dtype for d in there}) == 1
        offsets, base = [there[0].row_offsets[:1]], 0
        for d in deltas:
            if d is None:
                offsets.append(offsets[-1][-1:].expand(out_features))
            else:
                offsets.append(d.row_offsets[1:] + base)
                base += d.nnz
        whole = cls(
            len(deltas) * out_features, in_features, torch.cat(offsets),
            torch.cat([d.short().columns for d in there]),
            torch.cat([d.values if one else d.values.float() for d in there]),
        )  # fmt: skip
        object.__setattr__(whole, "_is_whole", True)  # each has been looked through
        return whole

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def nnz(self) -> int:
        return self.columns.shape[0]

    @property
    def device(self) -> torch.device:
        return self.columns.device

    @property
    def nbytes(self) -> int:
        return self.row_offsets.nbytes + self.columns.nbytes + self.values.nbytes

    def map(self, change) -> WeightDelta:
        """The same delta with `change` applied to each tensor, such as a move to a device."""
        return replace(
            self, row_offsets=change(self.row_offsets), columns=change(self.columns),
            values=change(self.values),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> WeightDelta:
        return self.map(lambda t: t.to(device))

    def with_values(self, values: torch.Tensor) -> WeightDelta:
        """Other values at the same places; what was checked of the places stays checked."""
        changed = replace(self, values=values)
        if "_is_whole" in self.__dict__ and values.shape == self.values.shape:
            object.__setattr__(changed, "_is_whole", True)
        return changed

    @staticmethod
    def columns_dtype(in_features: int) -> torch.dtype:
        """The shortest dtype of columns among so many inputs."""
        return torch.int16 if in_features <= MAX_SHORT_INPUTS else torch.int32

    def short(self) -> WeightDelta:
        """The same with columns as short as they can be."""
        if self.columns.dtype == self.columns_dtype(self.in_features):
            return self
        return replace(self, columns=as_columns(self.wide_columns(), self.in_features))

    def rows(self) -> torch.Tensor:
        """(N,) int64"""
        return rows_of(self.row_offsets, self.nnz)

    def wide_columns(self) -> torch.Tensor:
        """(N,) int64"""
        return wide_columns(self.columns)

    def places(self) -> torch.Tensor:
        """(N,) int64, flat row-major, ascending."""
        return self.rows() * self.in_features + self.wide_columns()

    def dense(self) -> torch.Tensor:
        """(O, I) in the dtype of the values."""
        flat = self.values.new_zeros(self.out_features * self.in_features)
        return flat.index_put((self.places(),), self.values).view(self.shape)

    def expect_whole(self, name: str) -> None:
        """Refuse a delta whose tensors do not fit each other or the extents: kernels trust them.

        A delta is looked through once, and remembers it; tensors without values, such as those a
        graph compiler traces with, are looked at from outside alone.
        """
        if "_is_whole" in self.__dict__:
            return
        _expect_like(name, self)
        plain = type(self.columns) in (torch.Tensor, torch.nn.Parameter)
        if torch.compiler.is_compiling() or not plain or self.columns.is_meta:
            return
        _expect_order(name, self)
        object.__setattr__(self, "_is_whole", True)


def rows_of(row_offsets: torch.Tensor, nnz: int) -> torch.Tensor:
    """The row of each value, (N,) int64."""
    rows = torch.arange(row_offsets.shape[0] - 1, device=row_offsets.device)
    return rows.repeat_interleave(row_offsets.diff(), output_size=nnz)


def offsets_of_rows(rows: torch.Tensor, out_features: int) -> torch.Tensor:
    """(O + 1,) int64 from the ascending row of each value."""
    row_offsets = torch.zeros(out_features + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=out_features), 0, out=row_offsets[1:])
    return row_offsets


def as_columns(columns: torch.Tensor, in_features: int) -> torch.Tensor:
    """int64 columns as a delta keeps them."""
    return columns.to(WeightDelta.columns_dtype(in_features))


def wide_columns(columns: torch.Tensor) -> torch.Tensor:
    """The inverse of as_columns."""
    wide = columns.long()
    return wide & (MAX_SHORT_INPUTS - 1) if columns.dtype == torch.int16 else wide


def expect_in_range(
    name: str,
    row_offsets: torch.Tensor,
    columns: torch.Tensor,
    out_features: int,
    in_features: int,
) -> None:
    """Refuse offsets and columns with which a kernel would read outside its tensors."""
    n = columns.shape[0]
    ends = row_offsets[0].item(), row_offsets[-1].item()
    if ends != (0, n) or row_offsets.shape != (out_features + 1,):
        raise ValueError(
            f"{name}: delta's row_offsets run from {ends[0]} to {ends[1]} over "
            f"{row_offsets.shape[0] - 1} rows, need 0 to {n} over {out_features}"
        )
    falls = (row_offsets.diff() < 0).nonzero()
    if falls.numel():
        o = int(falls[0])
        raise ValueError(
            f"{name}: delta's row_offsets fall from {int(row_offsets[o])} to "
            f"{int(row_offsets[o + 1])} after row {o}, need them ascending"
        )
    if n:
        wide = columns.int() & (MAX_SHORT_INPUTS - 1) if columns.dtype == torch.int16 else columns
        low, high = (int(v) for v in wide.aminmax())
        if low < 0 or high >= in_features:
            stray = low if low < 0 else high
            raise ValueError(
                f"{name}: delta has column {stray}, need 0 <= column < I = {in_features}"
            )


def _expect_like(name: str, d: WeightDelta) -> None:
    n = d.columns.shape[0] if d.columns.dim() == 1 else -1
    short = (torch.int16, torch.int32) if d.in_features <= MAX_SHORT_INPUTS else (torch.int32,)
    for part, t, dtypes, shape in (
        ("row_offsets", d.row_offsets, (torch.int64,), (d.out_features + 1,)),
        ("columns", d.columns, short, (n,)),
        ("values", d.values, VALUE_DTYPES, (n,)),
    ):
        if t.dtype not in dtypes or t.shape != shape:
            names = " or ".join(str(x).removeprefix("torch.") for x in dtypes)
            need = "(N,)" if n < 0 else tuple(shape)
            raise ValueError(
                f"{name}: delta's {part} is {t.dtype} of shape {tuple(t.shape)}, "
                f"need {names} of shape {need}"
            )


def _expect_order(name: str, d: WeightDelta) -> None:
    expect_in_range(name, d.row_offsets, d.columns, *d.shape)
    places = d.places()
    wrong = (places[1:] <= places[:-1]).nonzero()
    if wrong.numel():
        n = int(wrong[0])
        row, first, then = (int(t) for t in (d.rows()[n], *d.wide_columns()[n : n + 2]))
        if first == then:
            raise ValueError(f"{name}: delta has column {first} of row {row} twice, need it once")
        raise ValueError(
            f"{name}: delta's columns of row {row} go from {first} to {then}, need them ascending"
        )
