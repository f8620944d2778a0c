"""Experts spread over processes: tokens travel to their experts and back, by torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tilewright.ops.common.packed import PackedWeight
from tilewright.ops.moe.api import moe_mlp

NAME = "moe_mlp_parallel"


def moe_mlp_parallel(
    x: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
    gate_up: torch.Tensor | PackedWeight,
    down: torch.Tensor | PackedWeight,
    *,
    experts: int,
    group: dist.ProcessGroup | None = None,
    **options,
) -> torch.Tensor:
    """`moe_mlp` whose experts are shared out evenly among the processes of a group.

    Process r holds experts r n to (r + 1) n - 1, n = experts / number of processes. A token goes
    once to each process that has one of its experts, and comes back as the sum of what they made of
    it.

    x          (T, H) the tokens of this process; T may differ between processes, and be 0
    ids        (T, K) int32 or int64, of all experts; others than 0 to experts - 1 go nowhere
    gates      (T, K) of any floating dtype
    gate_up    (n, 2 I, H), or packed, of the experts held here; as in moe_mlp
    down       see gate_up
    experts    E, of all processes together: a multiple of their number
    group      the processes; the default group if None
    options    further ones of moe_mlp, biases and updates of the experts held here

    Returns (T, H) in x.dtype: that of moe_mlp with all experts up to the rounding of each process'
    sum. All processes of the group call it, and run its backward, in the same order. The gradients
    of the weights are those of all processes' tokens: they are whole, not to be averaged. On a GPU
    the numbers of tokens are waited for.
    ValueError: an argument outside the above.

    Source: Lepikhin et al., GShard, arXiv 2006.16668.
    """
    if not dist.is_initialized():
        raise ValueError(f"{NAME}: torch.distributed is not initialized")
    world = dist.get_world_size(group)
    if experts < 1 or experts % world:
        raise ValueError(f"{NAME}: experts is {experts}, need a multiple of {world} processes")
    if x.dim() != 2 or ids.dim() != 2 or ids.shape[0] != x.shape[0] or gates.shape != ids.shape:
        raise ValueError(
            f"{NAME}: x has shape {tuple(x.shape)}, ids {tuple(ids.shape)} and gates "
            f"{tuple(gates.shape)}, need (T, H), (T, K) and (T, K)"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{NAME}: ids is {ids.dtype}, need int32 or int64")
    held = experts // world
    if not isinstance(gate_up, PackedWeight) and gate_up.shape[0] != held:
        raise ValueError(
            f"{NAME}: gate_up has {gate_up.shape[0]} experts, need {held}: "
            f"{experts} over {world} processes"
        )
    inside = (ids >= 0) & (ids < experts)
    owner = torch.where(inside, ids // held, world).long()
    goes = torch.zeros(x.shape[0], world + 1, dtype=torch.bool, device=x.device)
    goes = goes.scatter_(1, owner, True)[:, :world]
    process, token = goes.T.nonzero(as_tuple=True)  # by process, then by token
    sent = goes.sum(0)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    splits = _Splits(sent.tolist(), received.tolist(), group)

    local = ids[token] - process[:, None].to(ids.dtype) * held
    is_local = (local >= 0) & (local < held) & inside[token]
    local = splits.there(local.masked_fill(~is_local, held))
    rows, factors = _Exchange.apply(x[token], gates[token], splits)
    out = moe_mlp(rows, local, factors, gate_up, down, **options)
    back = _Return.apply(out, splits)

    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    begin = 0
    for count in splits.sent:  # a token stands once in each part: nothing is added in doubt
        part = slice(begin, begin + count)
        y = y.index_add(0, token[part], back[part].to(y.dtype))
        begin += count
    return y.to(x.dtype)


class _Splits:
    """How many rows go to each process and come from it."""

    def __init__(self, sent: list[int], received: list[int], group):
        self.sent, self.received, self.group = sent, received, group

    def there(self, rows: torch.Tensor) -> torch.Tensor:
        return self._exchange(rows, self.sent, self.received)

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        return self._exchange(rows, self.received, self.sent)

    def _exchange(self, rows, sent, received) -> torch.Tensor:
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        return out


class _Exchange(torch.autograd.Function):
    """Rows and gates to the processes of their experts; one node, so that their gradients travel in
    the same order everywhere."""

    @staticmethod
    def forward(ctx, rows, gates, splits):
        ctx.splits = splits
        return splits.there(rows), splits.there(gates)

    @staticmethod
    def backward(ctx, drows, dgates):
        return ctx.splits.back(drows), ctx.splits.back(dgates), None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, splits):
        ctx.splits = splits
        return splits.back(rows)

    @staticmethod
    def backward(ctx, d):
        return ctx.splits.there(d), None
