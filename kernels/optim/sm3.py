"""SM3 as a torch optimizer: a number for each row and column in place of one for each weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from tilewright.ops.optim import op
from tilewright.ops.optim.api import expect_options
from tilewright.ops.optim.base import FusedOptimizer, is_sharded


class Cells(NamedTuple):
    """What of a parameter trains: all of R x C cells, or those that row_offsets and columns name.

    is_compact  the parameter holds the named cells alone
    """

    n_rows: int
    n_columns: int
    row_offsets: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    is_compact: bool = False


class SM3(FusedOptimizer):
    """SM3: adaptive steps with a state of R + C numbers for a matrix of R x C.

        s = min(row[r], column[c]) + g^2      row and column are the largest s so far
        p = p (1 - lr decay) - lr g / sqrt(s + eps)

    params        parameters, or groups of them with their own lr, eps, weight_decay. A vector is a
                  matrix of one row, and has a number for each entry; of more axes, all but the
                  first count as one
    lr            0 or more; usually some ten to hundred times Adam's
    eps           0 or more
    weight_decay  decoupled from the gradient
    clip_norm     as in `AdamW`
    only          parameter -> what of it trains, as in `AdamW`; the state stays R + C numbers
    maximize      go up the gradient
    impl          "auto", "reference", "cpp_cpu" or "triton_gpu"

    No momentum. Under a GradScaler, and where the norm is not finite, it does what `AdamW` does.
    ValueError: an option outside the above; a gradient that is sparse; a sharded parameter.

    Source: Anil et al., Memory-efficient adaptive optimization, arXiv 1901.11150, SM3-II.
    """

    _OWN = (*FusedOptimizer._OWN, "_named")

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip_norm: float | None = None,
        only: Mapping[torch.Tensor, torch.Tensor] | None = None,
        maximize: bool = False,
        impl: str = "auto",
    ):
        expect_options(type(self).__name__, lr=lr, eps=eps, weight_decay=weight_decay)
        defaults = dict(lr=lr, eps=eps, weight_decay=weight_decay, maximize=maximize)
        self._named: dict[torch.Tensor, tuple[torch.Tensor, Cells]] = {}
        super().__init__(params, defaults, clip_norm=clip_norm, only=only, impl=impl)

    def _cells(self, p: torch.Tensor) -> Cells:
        if is_sharded(p):
            raise ValueError(f"{self._name}: a parameter is sharded, need a plain tensor")
        n_rows = p.shape[0] if p.dim() > 1 else 1
        n_columns = p.numel() // max(n_rows, 1) if p.dim() else 1
        if p not in self._places:
            return Cells(n_rows, n_columns)
        chosen = self._places[p]
        if self._named.get(p, (None,))[0] is not chosen:
            self._named[p] = chosen, self._name_cells(chosen.long(), n_rows, n_columns)
        return self._named[p][1]

    @staticmethod
    def _name_cells(places: torch.Tensor, n_rows: int, n_columns: int) -> Cells:
        rows = places // max(n_columns, 1)
        row_offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=rows.device)
        row_offsets[1:] = torch.bincount(rows, minlength=n_rows).cumsum(0)
        return Cells(n_rows, n_columns, row_offsets, (places - rows * n_columns).int())

    def _extremes(self, p: torch.Tensor, cells: Cells) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.state[p]
        if "row" not in state:
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            state["row"] = torch.zeros(cells.n_rows, dtype=wide, device=p.device)
            state["column"] = torch.zeros(cells.n_columns, dtype=wide, device=p.device)
            if p in self._places:
                state["places"] = self._places[p]
        return state["row"], state["column"]

    def restrict(self, p: torch.Tensor, chosen: torch.Tensor) -> None:
        """Train other entries of a parameter from now on: a mask or places, as in `only`."""
        self._places[p] = self._as_places(p, chosen)
        if self.state.get(p):
            self.state[p]["places"] = self._places[p]

    def _adopt(self, p: torch.Tensor, state: dict[str, Any]) -> None:
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        cells = self._cells(p)
        for name, n in (("row", cells.n_rows), ("column", cells.n_columns)):
            if state[name].shape != (n,):
                raise ValueError(
                    f"{self._name}: {name} in the state dict has shape {tuple(state[name].shape)}, "
                    f"need ({n},) for a parameter of shape {tuple(p.shape)}"
                )
            state[name] = state[name].to(wide).contiguous()

    def _update(self, group, parameters, gradients, scale) -> None:
        for p, g in zip(parameters, gradients, strict=True):
            cells = self._cells(p)
            row, column = self._extremes(p, cells)
            shape = (-1,) if cells.is_compact else (cells.n_rows, cells.n_columns)
            whole = p.detach() if p.is_contiguous() else p.detach().contiguous()
            op.call_sm3(
                whole.view(shape), g.reshape(shape), row, column, cells.row_offsets, cells.columns,
                None if scale is None else scale.to(g.device), float(group["lr"]),
                float(group["eps"]), float(group["weight_decay"]), self.impl,
            )  # fmt: skip
            if not p.is_contiguous():
                p.copy_(whole)
