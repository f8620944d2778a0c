"""Mixtures of low-rank experts, against a loop over tokens in float64."""

import pytest
import torch
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops
from tilewright.ops.moe import mixture

T, K, E, R, H, O = 23, 3, 5, 4, 40, 24
NAMES = ("x", "gates", "a", "b")


def inputs(dtype=torch.float32, tokens=T):
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    ids = torch.randint(-1, E + 1, (tokens, K), generator=generator)  # repeated, and nowhere
    ids[ids == 3] = 0
    return dict(
        x=normal(tokens, H).to(dtype), ids=ids, gates=normal(tokens, K),
        a=(normal(E, R, H) / H**0.5).to(dtype), b=(normal(E, O, R) / R**0.5).to(dtype),
    )  # fmt: skip


def loop(x, ids, gates, a, b, scale):
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros(O, dtype=x.dtype)
        for k in range(K):
            e = int(ids[t, k])
            if 0 <= e < E:
                row = row + (scale * gates[t, k] * (b[e] @ (a[e] @ x[t]))).to(x.dtype)
        rows.append(row)
    return torch.stack(rows)


def both_ways(function, given, dy):
    leaves = {n: given[n].clone().requires_grad_() for n in NAMES}
    y = function(**{**given, **leaves}, scale=0.7)
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}


@pytest.mark.parametrize("most", [mixture.DENSE_RANK, 0], ids=["dense", "by expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errs_at_most_twice_the_loop(dtype, most, monkeypatch):
    monkeypatch.setattr(mixture, "DENSE_RANK", most)
    given, dy = inputs(dtype), torch.randn(T, O).to(dtype)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    got, stock = (both_ways(f, given, dy) for f in (ops.lora_mixture, loop))
    truth = both_ways(loop, exact, dy.double())
    for n, true in truth.items():
        terms = 16 * true.abs().mean() + 0 * true
        assert_errs_at_most_twice_stock(n, got[n], stock[n], true, terms)
        if dtype == torch.float32:
            with pytest.raises(AssertionError):
                assert_errs_at_most_twice_stock(n, 1.01 * got[n], stock[n], true, terms)
    assert not got["a"][3].any() and not got["b"][3].any() and got["a"][0].any()


def test_leading_axes_and_no_tokens():
    given = inputs()
    need = ops.lora_mixture(**given)
    shaped = {n: t.view(1, T, -1) if n in ("x", "ids", "gates") else t for n, t in given.items()}
    assert torch.equal(ops.lora_mixture(**shaped)[0], need)
    assert ops.lora_mixture(**inputs(tokens=0)).shape == (0, O)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(ids=torch.zeros(T, K)), "ids is torch.float32, need int32 or int64"),
        (dict(gates=torch.zeros(T, 2)), r"ids has shape \(23, 3\) and gates \(23, 2\), need \(23,"),
        (dict(b=torch.zeros(E, O, 3)), r"b has shape \(5, 24, 3\), need R = 4 as in a"),
        (dict(a=torch.zeros(E, R, H).double()), "a is torch.float64, need torch.float32 as x"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=f"lora_mixture: {message}"):
        ops.lora_mixture(**{**inputs(), **change})
