"""The registered operators: opcheck, compiled graphs, autocast, checkpointing, the direct path."""

import functools

import pytest
import torch
from attention_inputs import bitwise, int32
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import tilewright
from tilewright import ShiftedSegments, choose
from tilewright.direct import may_go_direct
from tilewright.ops.attention import op

pytestmark = pytest.mark.usefixtures("clean_memory")


def tensors(dtype=torch.float32, length=20, grad=True):
    torch.manual_seed(0)
    return [torch.randn(2, length, heads, 16).to(dtype).requires_grad_(grad) for heads in (4, 2, 2)]


def rule(q, k, v, impl="auto", **options):
    return op.rule(choose.OPERATORS["flash_attention"].problem(q, k, v, **options), impl)


CALLS = {
    "dense": {},
    "causal": dict(is_causal=True),
    "segments": dict(is_causal=True, segments=ShiftedSegments(8)),
    "key-mask": dict(key_mask=torch.arange(20).expand(2, 20) > 4),
    "sinks": dict(sinks=torch.ones(4)),
    "dropout": dict(dropout_p=0.3, dropout_seed=torch.tensor([5])),
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_opcheck_of_the_forward(options):
    args = tensors()
    torch.library.opcheck(
        torch.ops.tilewright.flash_attention.default, (*args, *rule(*args, **options))
    )


def test_opcheck_of_packed_documents():
    q, k, v = (t[0][None].detach().requires_grad_() for t in tensors())
    cu = int32([0, 7, 7, 20])
    packed = rule(q[0], k[0], v[0], cu_seqlens=cu)
    torch.library.opcheck(torch.ops.tilewright.flash_attention.default, (q, k, v, *packed))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_backward(needs):
    q, k, v = tensors(grad=False)
    out, lse = tilewright.flash_attention(q, k, v, return_lse=True)
    args = (torch.randn_like(out), None, q, k, v, out, lse, *needs, *rule(q, k, v))
    torch.library.opcheck(torch.ops.tilewright.flash_attention_backward.default, args)
    dq, dk, dv = torch.ops.tilewright.flash_attention_backward(*args)
    assert [t.numel() > 0 for t in (dq, dk, dv)] == [needs[0], needs[1], needs[1]]


def test_opcheck_of_decode():
    q, k, v = tensors(grad=False)
    args = (
        q[:, :1],
        k,
        v,
        None,
        int32([0, 2]),
        int32([20, 9]),
        None,
        0.25,
        True,
        -1,
        0.0,
        0,
        "auto",
    )
    torch.library.opcheck(torch.ops.tilewright.flash_decode.default, args)


def train(function, *args):
    leaves = [t.detach().requires_grad_() for t in args]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.parametrize("options", [CALLS["causal"], CALLS["segments"], CALLS["key-mask"]])
def test_compiles_into_one_graph(options):
    attention = functools.partial(tilewright.flash_attention, **options)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    args = tensors()
    assert all(
        bitwise(a, b) for a, b in zip(train(attention, *args), train(compiled, *args), strict=True)
    )


def test_compiles_with_dynamic_shapes():
    attention = functools.partial(tilewright.flash_attention, is_causal=True)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (20, 33, 70):
        args = tensors(length=length)
        expected = train(attention, *args)
        assert all(bitwise(a, b) for a, b in zip(expected, train(compiled, *args), strict=True)), (
            length
        )


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
def test_autocast_casts_in_and_gradients_out(inner):
    args = tensors()
    with torch.autocast("cpu", dtype=inner):
        results = train(tilewright.flash_attention, *args)
    assert results[0].dtype == inner and all(t.dtype == torch.float32 for t in results[1:])
    expected = tilewright.flash_attention(*(t.detach().to(inner) for t in args))
    assert bitwise(results[0], expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    grads = []
    for wrap in (False, True):
        leaves = tensors()
        if wrap:
            out = checkpoint(tilewright.flash_attention, *leaves, use_reentrant=use_reentrant)
        else:
            out = tilewright.flash_attention(*leaves)
        out.sum().backward()
        grads.append([t.grad for t in leaves])
    assert all(bitwise(a, b) for a, b in zip(*grads, strict=True))


class Count(TorchDispatchMode):
    """How often each of our operators is dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tilewright":
            self.seen.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators():
    with Count() as count:
        tilewright.flash_attention(*tensors()).sum().backward()
    assert count.seen == ["flash_attention", "flash_attention_backward"]


def test_selective_checkpointing_sees_the_operator():
    def policy(ctx, function, *args, **kwargs):
        ours = function == torch.ops.tilewright.flash_attention.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    runs = []
    for context in (None, functools.partial(create_selective_checkpoint_contexts, policy)):
        options = {} if context is None else {"context_fn": context}
        with Count() as count:
            out = checkpoint(
                lambda *t: tilewright.flash_attention(*t) * 2,
                *tensors(),
                use_reentrant=False,
                **options,
            )
            out.sum().backward()
        runs.append(count.seen.count("flash_attention"))
    assert runs == [2, 1], "saved once instead of computed twice"


def test_the_direct_path_equals_the_operator_bitwise():
    args = tensors(torch.bfloat16)
    assert may_go_direct(*args)
    direct = train(functools.partial(tilewright.flash_attention, is_causal=True), *args)
    with Count():
        assert not may_go_direct(*args)
        through = train(functools.partial(tilewright.flash_attention, is_causal=True), *args)
    assert all(bitwise(a, b) for a, b in zip(direct, through, strict=True))


class Wrapped(torch.Tensor):
    """A subclass without a dispatch of its own."""


def test_subclasses_and_parameters():
    q, k, v = tensors(grad=False)
    assert not may_go_direct(q.as_subclass(Wrapped), k, v)
    expected = tilewright.flash_attention(q, k, v)
    assert bitwise(
        tilewright.flash_attention(q.as_subclass(Wrapped), k, v).as_subclass(torch.Tensor), expected
    )
    parameter = torch.nn.Parameter(k)
    tilewright.flash_attention(q, parameter, v).sum().backward()
    assert parameter.grad.abs().sum() > 0


def test_fake_tensors_give_shapes_and_dtypes():
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 20, h, 16, dtype=torch.bfloat16) for h in (4, 2, 2))
        out, lse = tilewright.flash_attention(q, k, v[..., :8], return_lse=True)
    assert out.shape == (2, 20, 4, 8) and out.dtype == torch.bfloat16
    assert lse.shape == (2, 4, 20) and lse.dtype == torch.float32


def test_a_second_backward_is_the_same():
    leaves = tensors()
    out = tilewright.flash_attention(*leaves)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    assert all(
        bitwise(a, b) for a, b in zip(first, torch.autograd.grad(out.sum(), leaves), strict=True)
    )


def test_vmap_agrees_with_a_loop():
    q, k, v = (torch.randn(3, 1, 20, 2, 16) for _ in range(3))
    looped = torch.stack([tilewright.flash_attention(*t) for t in zip(q, k, v, strict=True)])
    assert torch.allclose(torch.vmap(tilewright.flash_attention)(q, k, v), looped)
