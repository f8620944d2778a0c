"""torch.library schemas, fakes and autograd of the loss room.

`head_statistics` gives what any loss is made of; its backward makes the logits again. `head_loss`
is for a loss that is known to be summed up: each block of logits yields its gradients at once.
The choice among implementations is made inside the operators, so that a compiled graph holds one
opaque call whatever runs in it. Neither triton nor _C is imported before a call needs it.
"""

from __future__ import annotations

import functools
import importlib

import torch

from tilewright import choose, settings
from tilewright.direct import may_go_direct
from tilewright.ops.loss import reference
from tilewright.ops.loss.problem import Found, Head, Problem, Upstream, expect_ids

library = torch.library.Library("tilewright", "FRAGMENT")

_HEAD = (
    "Tensor h, Tensor weight, Tensor? bias, Tensor ids, Tensor? class_weight, float scale, "
    "float softcap"
)
# name, n_labels: of the public function and how many of the ids are its labels, for errors
_REST = "str name, int n_labels, str impl"
library.define(
    f"head_statistics({_HEAD}, bool wants_total, {_REST}) -> (Tensor, Tensor, Tensor, Tensor)"
)
# wants: dh, dweight, dbias
library.define(
    f"head_statistics_backward({_HEAD}, Tensor stats, Tensor for_ids, Tensor? for_total, "
    f"Tensor? for_lse, bool[3] wants, {_REST}) -> (Tensor, Tensor, Tensor)"
)
library.define(
    f"head_loss({_HEAD}, Tensor for_ids, Tensor? for_total, Tensor? for_square, bool[3] wants, "
    f"{_REST}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def first_order(backward):
    """A backward that refuses to be differentiated: its results would pass for constants."""

    @functools.wraps(backward)
    def checked(ctx, *upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tilewright: losses over a linear head have no gradient of a gradient; "
                "create_graph is True, need False"
            )
        return backward(ctx, *upstream)

    return checked


class _ReferenceImplementation:
    """The reference in the operators' dtypes."""

    @staticmethod
    def run(head, upstream=None, stats=None, wants=(False, False, False), wants_total=False):
        with torch.enable_grad(), torch.autocast(head.h.device.type, enabled=False):
            like = (head.h, head.weight, head.bias)
            leaves = [None if t is None else t.detach().double().requires_grad_() for t in like]
            log_probs, lse, total = reference.head(*leaves, *head[3:])
            grads: list[torch.Tensor | None] = [None, None, None]
            if upstream is not None:
                terms = zip((log_probs, total, lse, lse.square()), upstream, strict=True)
                loss = sum((t * u.double()).sum() for t, u in terms if u is not None)
                for i, (t, leaf) in enumerate(zip(like, leaves, strict=True)):
                    if wants[i] and t is not None and leaf is not None:
                        (g,) = torch.autograd.grad(loss, leaf, retain_graph=True)
                        grads[i] = g.to(t.dtype)
        of = {"dtype": kept_dtype(head.h.dtype)}
        log_probs, lse, total = (t.detach().to(**of) for t in (log_probs, lse, total))
        nothing = lse.new_zeros(2, lse.shape[0])
        return Found(log_probs, lse, total if wants_total else None, nothing, *grads)


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _found(name: str, impl: str, device: str, dtype: torch.dtype, forced: str | None):
    # `forced` is not read: with another value of the variable the choice is made again
    chosen = choose.choose(name, impl, Problem(name, device, dtype))
    if chosen == "reference":
        return _ReferenceImplementation
    return importlib.import_module(f"tilewright.ops.loss.{chosen}")


def _chosen(name: str, impl: str, h: torch.Tensor):
    return _found(name, impl, h.device.type, h.dtype, settings.forced_impl())


def _or_empty(like: torch.Tensor, tensors):
    """Operators return tensors alone: nothing becomes one of no elements."""
    return tuple(like.new_empty(0) if t is None else t for t in tensors)


def _or_none(wants, tensors):
    return [t if wants_it else None for t, wants_it in zip(tensors, wants, strict=True)]


# --- statistics ---


def _statistics(*inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    head, wants_total, (name, n_labels, impl) = Head(*inputs[:7]), inputs[7], inputs[8:]
    if head.ids.device.type == "cpu":
        expect_ids(name, head.ids, n_labels, head.weight.shape[0])
    return _chosen(name, impl, head.h).run(head, wants_total=wants_total)[:4]


def _statistics_operator(*inputs):
    return _or_empty(inputs[0], _statistics(*inputs))


def _statistics_backward(*inputs):
    head, stats, wants, name, impl = (
        Head(*inputs[:7]),
        inputs[7],
        inputs[11],
        inputs[12],
        inputs[14],
    )
    upstream = Upstream(*inputs[8:11])
    return _chosen(name, impl, head.h).run(head, upstream, stats, tuple(wants))[4:]


def _statistics_backward_operator(*inputs):
    return _or_empty(inputs[0], _statistics_backward(*inputs))


def _statistics_setup(ctx, inputs, output):
    h, weight, bias, ids, class_weight, scale, softcap, wants_total, *rest = inputs
    ctx.save_for_backward(h, weight, bias, ids, class_weight, output[3])
    ctx.set_materialize_grads(False)
    ctx.numbers, ctx.wants_total, ctx.rest = (scale, softcap), wants_total, rest


def _statistics_autograd(ctx, d_log_probs, d_lse, d_total, d_stats, is_direct=False):
    *head, stats = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:3])
    if not ctx.wants_total:
        d_total = None
    if d_log_probs is None:
        d_log_probs = torch.zeros(head[3].shape, dtype=torch.float32, device=stats.device)
    inputs = (*head, *ctx.numbers, stats, d_log_probs, d_total, d_lse, wants, *ctx.rest)
    if is_direct:
        grads = _statistics_backward(*inputs)
    else:
        grads = _or_none(wants, torch.ops.tilewright.head_statistics_backward(*inputs))
    return *grads, *[None] * 8


class _Statistics(torch.autograd.Function):
    """The same forward and backward for calls that go direct."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _statistics(*inputs)
        _statistics_setup(ctx, inputs, output)
        ctx.mark_non_differentiable(output[3])
        return output

    @staticmethod
    @first_order
    def backward(ctx, d_log_probs, d_lse, d_total, d_stats):
        is_direct = may_go_direct(d_log_probs, d_lse, d_total)
        return _statistics_autograd(ctx, d_log_probs, d_lse, d_total, d_stats, is_direct)


def wants_gradient(*tensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def call_statistics(head: Head, wants_total: bool, name: str, n_labels: int, impl: str):
    """log_probs (T, K), lse (T,), total (T,) or None: the registered operator, or in plain eager
    mode what it would end up calling."""
    inputs = (*head, wants_total, name, n_labels, impl)
    if not may_go_direct(*head[:5]):
        found = torch.ops.tilewright.head_statistics(*inputs)
    elif wants_gradient(*head[:3]):
        found = _Statistics.apply(*inputs)
    else:
        found = _statistics(*inputs)
    log_probs, lse, total, _ = found
    return log_probs, lse, total if wants_total else None


# --- a loss that is summed up ---


def summed(log_probs, lse, total, upstream: Upstream) -> torch.Tensor:
    """The loss of all tokens, whose sum is rounded once."""
    loss = (log_probs.double() * upstream.for_ids.double()).sum()
    for value, factor in (
        (total, upstream.for_total),
        (lse.double().square(), upstream.for_square),
    ):
        if factor is not None:
            loss = loss + (value.double() * factor.double()).sum()
    return loss.to(log_probs.dtype)


def _loss(*inputs):
    head, (name, n_labels, impl) = Head(*inputs[:7]), inputs[11:]
    for_ids, for_total, for_square, wants = inputs[7:11]
    if head.ids.device.type == "cpu":
        expect_ids(name, head.ids, n_labels, head.weight.shape[0])
    upstream = Upstream(for_ids, for_total, None, for_square)
    found = _chosen(name, impl, head.h).run(
        head, upstream, wants=tuple(wants), wants_total=for_total is not None
    )
    loss = summed(found.log_probs, found.lse, found.total, upstream)
    return loss, *found[:3], *found[4:]


def _loss_operator(*inputs):
    return _or_empty(inputs[0], _loss(*inputs))


def _loss_setup(ctx, inputs, output):
    _, log_probs, lse, total, *grads = output
    ctx.has = [inputs[8] is not None, inputs[9] is not None]
    ctx.wants = list(inputs[10])
    ctx.was_used = False
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(log_probs, lse, total, *grads)


def _loss_autograd(ctx, d_loss, *_, is_direct=False):
    if d_loss is None:
        return (None,) * 14
    log_probs, lse, total, *grads = ctx.saved_tensors
    grads = _or_none(ctx.wants, grads)
    if not (is_direct and d_loss.device.type == "cpu" and d_loss.item() == 1.0):
        grads = [None if g is None else (g * d_loss).to(g.dtype) for g in grads]
    elif ctx.was_used:  # the caller may hold what the first backward gave away
        grads = [None if g is None else g.clone() for g in grads]
    ctx.was_used = True
    needs = ctx.needs_input_grad
    for_ids = log_probs * d_loss if needs[7] else None
    for_total = total * d_loss if ctx.has[0] and needs[8] else None
    for_square = lse.square() * d_loss if ctx.has[1] and needs[9] else None
    return *grads, *[None] * 4, for_ids, for_total, for_square, *[None] * 4


class _Loss(torch.autograd.Function):
    """The same forward and backward for calls that go direct."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _loss(*inputs)
        _loss_setup(ctx, inputs, output)
        return output[0]

    @staticmethod
    @first_order
    def backward(ctx, d_loss):
        return _loss_autograd(ctx, d_loss, is_direct=may_go_direct(d_loss))


def call_loss(head: Head, upstream: Upstream, name: str, n_labels: int, impl: str):
    """The loss (), summed over tokens, with gradients that are found on the way."""
    wants = [t is not None and t.requires_grad for t in head[:3]]
    for_ids, for_total, _, for_square = upstream
    inputs = (*head, for_ids, for_total, for_square, wants, name, n_labels, impl)
    if may_go_direct(*head[:5], for_ids, for_total, for_square):
        return _Loss.apply(*inputs)
    return torch.ops.tilewright.head_loss(*inputs)[0]


# --- registration ---

for _operator, _function in (
    ("head_statistics", _statistics_operator),
    ("head_statistics_backward", _statistics_backward_operator),
    ("head_loss", _loss_operator),
):
    library.impl(_operator, _function, "CPU")
    library.impl(_operator, _function, "CUDA")


def _fake_statistics(h, weight, bias, ids, class_weight, scale, softcap, wants_total, *rest):
    of, n_tokens = {"dtype": kept_dtype(h.dtype)}, h.shape[0]
    return (
        h.new_empty(ids.shape, **of),
        h.new_empty(n_tokens, **of),
        h.new_empty(n_tokens, **of) if wants_total else h.new_empty(0),
        h.new_empty(2, n_tokens, **of),
    )


def _fake_gradients(h, weight, bias, wants):
    return tuple(
        t.new_empty(t.shape) if wants_it else h.new_empty(0)
        for t, wants_it in zip((h, weight, bias), wants, strict=True)
    )


def _fake_statistics_backward(h, weight, bias, *rest):
    return _fake_gradients(h, weight, bias, rest[8])


def _fake_loss(h, weight, bias, ids, class_weight, scale, softcap, for_ids, for_total,
               for_square, wants, *rest):  # fmt: skip
    log_probs, lse, total, _ = _fake_statistics(
        h, weight, bias, ids, class_weight, scale, softcap, for_total is not None
    )
    return lse.new_empty(()), log_probs, lse, total, *_fake_gradients(h, weight, bias, wants)


for _operator, _fake in (
    ("head_statistics", _fake_statistics),
    ("head_statistics_backward", _fake_statistics_backward),
    ("head_loss", _fake_loss),
):
    torch.library.register_fake(f"tilewright::{_operator}", _fake, lib=library)

for _operator, _backward, _setup in (
    ("head_statistics", _statistics_autograd, _statistics_setup),
    ("head_loss", _loss_autograd, _loss_setup),
):
    torch.library.register_autograd(
        f"tilewright::{_operator}", _backward, setup_context=_setup, lib=library
    )
