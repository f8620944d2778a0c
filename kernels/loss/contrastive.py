"""Contrastive losses, a block of queries at a time, and gradients of large batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tilewright.ops.loss.api import INTEGERS, linear_cross_entropy
from tilewright.shapes import expect_device, expect_shapes


def info_nce(
    queries: torch.Tensor,
    documents: torch.Tensor,
    targets: torch.Tensor | None = None,
    *,
    temperature: float = 0.05,
    normalize: bool = True,
    symmetric: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> torch.Tensor:
    """InfoNCE, or multiple negatives ranking: each query finds its document among all.

        loss[b] = -log(exp(q[b] d[y] / temperature) / sum_c exp(q[b] d[c] / temperature))

    with y = targets[b]. It is the cross-entropy of a head whose weight is the documents, so the
    B x C similarities are never held: a block of queries at a time, with exact gradients.

    queries      (B, N)
    documents    (C, N), dtype of queries: positives, then any negatives, such as those of all ranks
    targets      (B,) int64 or int32, the document of each query; default 0 to B - 1, C at least B
    temperature  above 0
    normalize    similarities are cosines: rows are divided by their Euclidean norm first
    symmetric    the mean of this loss and that of documents[0:B] finding their queries; default
                 targets alone
    reduction    "mean", "sum" or "none", over queries
    impl         as in `linear_cross_entropy`

    Returns float32: a scalar, or (B,).
    ValueError: a shape, dtype or number outside the above. RuntimeError: `impl` was named and
    cannot run here.

    Source: van den Oord et al., Representation learning with contrastive predictive coding, arXiv
    1807.03748; Henderson et al., Efficient natural language response suggestion, arXiv 1705.00652.
    """
    name = "info_nce"
    size = expect_shapes(name, queries=(queries, "BN"), documents=(documents, "CN"))
    expect_device(name, queries=queries, documents=documents, targets=targets)
    if not temperature > 0:
        raise ValueError(f"{name}: temperature is {temperature}, need a number above 0")
    if targets is not None and symmetric:
        raise ValueError(f"{name}: symmetric goes with the default targets alone")
    if targets is None:
        if size["C"] < size["B"]:
            raise ValueError(
                f"{name}: documents has shape {tuple(documents.shape)}, need at least "
                f"{size['B']} rows, one for each query, or targets"
            )
        targets = torch.arange(size["B"], device=queries.device)
    elif targets.dtype not in INTEGERS or targets.shape != queries.shape[:1]:
        raise ValueError(
            f"{name}: targets is {targets.dtype} of shape {tuple(targets.shape)}, need "
            f"torch.int64 or torch.int32 of shape ({size['B']},)"
        )
    if normalize:
        queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    options: dict[str, Any] = {
        "logit_scale": 1 / temperature, "reduction": reduction, "impl": impl, "ignore_index": -1,
    }  # fmt: skip
    loss = linear_cross_entropy(queries, documents, targets, **options)
    if not symmetric:
        return loss
    back = linear_cross_entropy(documents[: size["B"]], queries, targets, **options)
    return (loss + back) / 2


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=t.device)
        sizes[dist.get_rank(group)] = t.shape[0]
        dist.all_reduce(sizes, group=group)
        rows = sizes.tolist()
        ctx.begin, ctx.n_rows = sum(rows[: dist.get_rank(group)]), t.shape[0]
        padded = t.new_zeros(max(rows), *t.shape[1:])  # ranks exchange blocks of one size
        padded[: t.shape[0]] = t
        blocks = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(blocks, padded, group=group)
        return torch.cat([block[:n] for block, n in zip(blocks, rows, strict=True)])

    @staticmethod
    def backward(ctx, upstream):
        upstream = upstream.contiguous().clone()
        dist.all_reduce(upstream, group=ctx.group)
        return upstream[ctx.begin : ctx.begin + ctx.n_rows], None


def gather_across_ranks(
    t: torch.Tensor, group: Any = None, *, own_first: bool = False
) -> torch.Tensor:
    """The rows of all ranks, in the order of ranks, with gradients back to each.

    t          (B, N) or (B, ...); B may differ between ranks
    group      a process group of torch.distributed; default all ranks
    own_first  this rank's rows come first, as the default targets of `info_nce` expect

    Returns (sum of B, ...). A rank's gradient is the sum over what all ranks' losses say about its
    rows. With the loss of each rank the mean over its own queries, and parameters' gradients
    averaged over ranks, as by DDP, they are those of the mean of all ranks' losses. Without an
    initialised process group t itself.
    ValueError: t is a scalar.

    Source: Radford et al., Learning transferable visual models from natural language supervision,
    arXiv 2103.00020, whose similarities are computed over all ranks.
    """
    if t.dim() == 0:
        raise ValueError("gather_across_ranks: t has shape (), need axes (B, ...)")
    if not dist.is_available() or not dist.is_initialized():
        return t
    gathered = _Gathered.apply(t, group)
    if not own_first:
        return gathered
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=t.device)
    rank = dist.get_rank(group)
    sizes[rank] = t.shape[0]
    dist.all_reduce(sizes, group=group)
    begin = int(sizes[:rank].sum())
    end = begin + t.shape[0]
    return torch.cat([gathered[begin:end], gathered[:begin], gathered[end:]])


def _random_states(device: torch.device):
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_states(states, device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)


def cached_step(
    loss_of: Callable[..., torch.Tensor],
    *towers: tuple[Callable[[Any], torch.Tensor], Sequence[Any]],
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The gradient of a loss over a large batch, whose graph is held for one chunk at a time.

    First all embeddings without a graph, then the loss and its gradient with respect to them, then
    each chunk again, with its graph and with the random numbers that it drew the first time.

    loss_of  (E_1, E_2, ...) -> a scalar, from each tower's embeddings (B, N), chunks joined
    towers   (encode, chunks): encode(chunk) gives the embeddings (b, N) of a chunk
    device   whose random numbers encode draws

    Adds to the .grad of all parameters, as backward() does, and returns the loss, detached. The
    results are those of one backward over the whole batch, dropout included. Under DDP run all but
    the last chunk within no_sync().
    ValueError: no tower, or one without chunks.

    Source: Gao et al., Scaling deep contrastive learning batch size under memory limited setup,
    arXiv 2101.06983.
    """
    if not towers or not all(len(chunks) for _, chunks in towers):
        raise ValueError("cached_step: needs at least one tower, and chunks for each")
    device = torch.device(device)
    states, embeddings = [], []
    with torch.no_grad():
        for encode, chunks in towers:
            found = []
            for chunk in chunks:
                states.append(_random_states(device))
                found.append(encode(chunk))
            embeddings.append(found)
    joined = [torch.cat(found).requires_grad_() for found in embeddings]
    loss = loss_of(*joined)
    grads = torch.autograd.grad(loss, joined)
    after = _random_states(device)
    replayed = iter(states)
    for (encode, chunks), found, of_all in zip(towers, embeddings, grads, strict=True):
        pieces = of_all.split([len(e) for e in found])
        for chunk, piece in zip(chunks, pieces, strict=True):
            _set_random_states(next(replayed), device)
            encode(chunk).backward(piece)
    _set_random_states(after, device)
    return loss.detach()
