"""Dropout: drawn from a counter, so that the backward and a recomputation draw the same numbers."""

import pytest
import torch
from attention_inputs import DTYPES, bitwise, dtype_name, int32
from torch.utils.checkpoint import checkpoint
from yardstick import assert_errs_at_most_twice_stock

import tilewright
from tilewright import choose
from tilewright.ops.attention import reference

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
SEED = torch.tensor([1234567890123456789])


def inputs(dtype=torch.float32, length=90):
    return [torch.randn(2, length, heads, 32).to(dtype) for heads in (4, 2, 2)]


def upstream(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


def run(name, q, k, v, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = tilewright.flash_attention(*leaves, is_causal=True, impl=name, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream(out))]


def stock(q, k, v, factor):
    """Eager attention with the factors of the pairs given."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    hq, hk, hv = (t.transpose(1, 2) for t in leaves)
    hk, hv = (t.repeat_interleave(2, 1) for t in (hk, hv))
    future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    scores = (hq @ hk.mT * q.shape[3] ** -0.5).float().masked_fill(future, float("-inf"))
    weights = (torch.softmax(scores, -1) * factor).to(q.dtype)
    out = (weights @ hv).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream(out))]


@by_dtype
def test_forward_and_gradients_replay_the_same_numbers(impl, dtype):
    q, k, v = inputs(dtype)
    options = dict(dropout_p=0.3, dropout_seed=SEED)
    impl.require("flash_attention", *(t.to(impl.device) for t in (q, k, v)), **options)
    problem = choose.OPERATORS["flash_attention"].problem(q, k, v, **options)
    factor = reference.dropout_factor(problem).float()
    truth = run("reference", q.double(), k.double(), v.double(), **options)
    ours = run(impl.name, *(t.to(impl.device) for t in (q, k, v)), **options)
    for name, a, b, true in zip(
        ("out", "dq", "dk", "dv"), ours, stock(q, k, v, factor), truth, strict=True
    ):
        assert_errs_at_most_twice_stock(name, a, b, true)


def kept_pairs(name, length=96, **options):
    """Which pairs kept their weight: values are rows of the identity, so weights are read out."""
    q = k = torch.zeros(1, length, 1, 16)
    v = torch.eye(length)[None, :, None]
    out = tilewright.flash_attention(q, k, v, impl=name, **options)
    return out[0, :, 0] != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_pairs(impl, p):
    impl.require("flash_attention", *(torch.zeros(1, 8, 1, 16) for _ in range(3)))
    if impl.device != "cpu":
        pytest.skip("reads weights out on the CPU")
    kept = kept_pairs(impl.name, dropout_p=p, dropout_seed=SEED)
    share, n = kept.float().mean().item(), kept.numel()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    other = kept_pairs(impl.name, dropout_p=p, dropout_seed=SEED + 1)
    assert torch.equal(kept, kept_pairs(impl.name, dropout_p=p, dropout_seed=SEED))
    both = (kept & other).float().mean().item()
    assert abs(both - (1 - p) ** 2) < 6 * ((1 - p) ** 2 / n) ** 0.5, "seeds are not independent"


def test_every_level_drops_the_same_pairs(impl):
    if impl.device != "cpu":
        pytest.skip("reads weights out on the CPU")
    expected = kept_pairs("reference", dropout_p=0.4, dropout_seed=SEED)
    assert torch.equal(expected, kept_pairs(impl.name, dropout_p=0.4, dropout_seed=SEED))


def test_packed_documents_draw_by_document_and_position(kernel_once):
    if kernel_once.device != "cpu":
        pytest.skip("runs on the CPU")
    q, k, v = (torch.randn(80, 2, 16) for _ in range(3))
    cu = int32([0, 30, 30, 80])
    options = dict(dropout_p=0.4, dropout_seed=SEED, is_causal=True)
    packed = tilewright.flash_attention(q, k, v, cu_seqlens=cu, **options)
    truth = tilewright.flash_attention(
        q.double(), k.double(), v.double(), cu_seqlens=cu, impl="reference", **options
    )
    assert torch.allclose(packed.double(), truth, atol=1e-5)


def test_the_default_seed_comes_from_torch():
    q, k, v = inputs()

    def draw(seed):
        torch.manual_seed(seed)
        return tilewright.flash_attention(q, k, v, dropout_p=0.5)

    first = draw(7)
    assert bitwise(first, draw(7)) and not bitwise(first, draw(8))
    torch.manual_seed(7)
    tilewright.flash_attention(q, k, v, dropout_p=0.5)
    assert not bitwise(first, tilewright.flash_attention(q, k, v, dropout_p=0.5)), "drawn twice"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays(use_reentrant):
    q, k, v = inputs()

    def layer(*t):
        return tilewright.flash_attention(*t, dropout_p=0.4)

    results = []
    for wrapped in (
        lambda *t: layer(*t),
        lambda *t: checkpoint(layer, *t, use_reentrant=use_reentrant),
    ):
        torch.manual_seed(3)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = wrapped(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]
                       if not use_reentrant else backward(out, leaves))  # fmt: skip
    assert all(bitwise(a, b) for a, b in zip(*results, strict=True))


def backward(out, leaves):
    """The reentrant form refuses autograd.grad."""
    out.sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_probability_out_of_range_is_refused(p):
    with pytest.raises(ValueError, match=r"dropout_p is .*, need 0 <= dropout_p < 1"):
        tilewright.flash_attention(*inputs(), dropout_p=p)


@pytest.mark.parametrize(
    "seed", [torch.tensor([1, 2]), torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32)]
)
def test_a_seed_of_another_kind_is_refused(seed):
    with pytest.raises(ValueError, match=r"dropout_seed is .*, need int64 of shape \(1,\)"):
        tilewright.flash_attention(*inputs(), dropout_p=0.5, dropout_seed=seed)
