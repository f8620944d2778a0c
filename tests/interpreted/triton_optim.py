"""The Triton kernels of the optim room against float64 and the C++ kernels, in the interpreter.

Run by tests/test_interpreted.py in a process of its own: TRITON_INTERPRET has to be 1 before
triton is imported, and other tests need the real compiler. The name keeps pytest from collecting
this file by itself.
"""

import pytest
import torch
from torch import nn
from yardstick import assert_errs_at_most_twice_stock

import tilewright as tw
from tilewright import ops, settings
from tilewright.ops.optim import cpp_cpu, reference, triton_gpu

NUMBERS = dict(lr=0.03, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
SIZES = {"none": 0, "one": 1, "below-a-block": 255, "nothing-divides": 3000}
by_size = pytest.mark.parametrize("n", SIZES.values(), ids=SIZES)


def test_the_interpreter_is_on():
    assert settings.triton_is_interpreted()


def tensors(n, dtype=torch.float32, age=3):
    p, g = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    m, v = 0.1 * torch.randn(n), torch.rand(n)
    return p, g, m, v, torch.tensor(float(age))


def check(names, ours, stock, truth):
    for name, got, theirs, true in zip(names, ours, stock, truth, strict=True):
        terms = 2 * true.abs()
        assert_errs_at_most_twice_stock(name, got, theirs.to(got.dtype), true, terms)
        if true.numel() > 30 and got.dtype == torch.float32:
            with pytest.raises(AssertionError):
                assert_errs_at_most_twice_stock(name, 1.01 * got, theirs, true, terms)


def in_float32(p, g, m, v, age, lr, betas, eps, weight_decay):
    m = betas[0] * m + (1 - betas[0]) * g.float()
    v = betas[1] * v + (1 - betas[1]) * g.float() ** 2
    root = (v / (1 - betas[1] ** age)).sqrt() + eps
    return p * (1 - lr * weight_decay) - lr * (m / (1 - betas[0] ** age)) / root, m, v


@by_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", ["step", "ages", "places", "master", "scale"])
def test_adamw(kind, dtype, n):
    p, g, m, v, age = tensors(n, dtype)
    options, want_p, want_g, want_age = {}, p, g, age + 1
    if kind == "ages":
        age = torch.randint(0, 300, (n,), dtype=torch.int32)
        age[: n // 3] = torch.randint(0, 3, (n // 3,), dtype=torch.int32)
        want_age = age + 1
    if kind == "places":
        places = torch.randperm(n)[: n // 2].sort().values
        m, v, options = m[: len(places)], v[: len(places)], {"places": [places.int()]}
        want_p, want_g = p[places], g[places]
    if kind == "master":
        want_p = p + 1e-5 * torch.randn(n)
        options = {"masters": [want_p.float().clone()]}
        want_p = options["masters"][0].clone()
    if kind == "scale":
        options, want_g = {"gradient_scale": torch.tensor(0.3)}, g.float() * 0.3
    truth = reference.adamw(want_p, want_g, m, v, want_age, 0.03, 0.9, 0.99, 1e-6, 0.1)
    stock = in_float32(want_p.float(), want_g, m, v, want_age.double(), **NUMBERS)
    stock = [t.float() for t in stock]
    new = [t.clone() for t in (p, g, m, v, age)]
    ops.adamw_update(*([t] for t in new), **NUMBERS, **options, impl="triton_gpu")
    got = options["masters"][0] if kind == "master" else new[0]
    got = got[places] if kind == "places" else got
    check(("p", "m", "v"), (got, new[2], new[3]), stock, truth)
    assert torch.equal(new[4], want_age) and torch.equal(new[1], g)
    if kind == "master":
        assert torch.equal(new[0], got.to(dtype))
    if kind == "places":
        rest = torch.ones(n, dtype=torch.bool)
        rest[places] = False
        assert torch.equal(new[0][rest], p[rest])


def test_a_scale_that_is_not_finite_changes_nothing():
    for bad in (float("nan"), float("inf")):
        for age in (torch.tensor(3.0), torch.full((300,), 3, dtype=torch.int32)):
            new = [*tensors(300)[:4], age]
            before = [t.clone() for t in new]
            scale = torch.tensor(bad)
            ops.adamw_update(*([t] for t in new), lr=1.0, gradient_scale=scale, impl="triton_gpu")
            row, column = torch.rand(10), torch.rand(30)
            kept = row.clone(), column.clone()
            ops.sm3_update(new[0].view(10, 30), new[1].view(10, 30), row, column, lr=1.0,
                           gradient_scale=scale, impl="triton_gpu")  # fmt: skip
            pairs = [*zip(new, before, strict=True), (row, kept[0]), (column, kept[1])]
            assert all(torch.equal(a, b) for a, b in pairs)


@by_size
def test_states_in_8_bits_are_those_of_the_cpu(n):
    ends = []
    for impl in ("triton_gpu", "cpp_cpu"):
        p = nn.Parameter(torch.linspace(-1, 1, n))
        optimizer = tw.AdamW([p], state_bits=8, impl=impl)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(n, generator=generator) * torch.logspace(0, -7, n)
            optimizer.step()
        ends.append((p.detach(), optimizer.state[p]))
    (p, ours), (q, theirs) = ends
    assert torch.allclose(p, q, rtol=1e-4, atol=1e-5)
    for name in ("exp_avg", "exp_avg_sq"):
        scales = ours[name + "_scale"], theirs[name + "_scale"]
        assert torch.allclose(*scales, rtol=1e-6)
        differ = (ours[name].int() - theirs[name].int()).abs()
        assert (differ > 0).sum() <= 0.01 * n + 1 and (differ <= 1).all()


def test_rounding_at_random_draws_the_cpus_numbers():
    """Stored bits alone: what the interpreter cannot do is to round a float to bfloat16."""
    ends = []
    for module in (triton_gpu, cpp_cpu):
        torch.manual_seed(5)
        p, g, m, v, age = tensors(5000)
        p = p.bfloat16()
        module.adamw_update([p], [g], [m], [v], [age], [], [], [], [], None, 1e-2, 0.9, 0.99, 1e-8,
                            0.1, "stochastic", [0xDEADBEEF])  # fmt: skip
        ends.append(p)
    assert (ends[0] != ends[1]).sum() <= 5
    nearest = p.float() - ends[0].float()
    assert nearest.isfinite().all()


@by_size
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_the_norm(dtype, n):
    both = [torch.randn(n).to(dtype), torch.randn(40_000 if n > 1000 else 3).to(dtype)]
    got = tw.gradient_norm(both, impl="triton_gpu")
    exact = torch.cat([t.double() for t in both]).norm()
    assert abs(got - exact) <= 1e-6 * exact
    assert not abs(1.01 * got - exact) <= 1e-6 * exact


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (37, 141)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_sm3(dtype, shape):
    p, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    row, column = torch.rand(shape[0]), torch.rand(shape[1])
    rows, columns = torch.ones(shape).nonzero().unbind(1)
    flat = p.flatten(), g.flatten()
    truth = reference.sm3(*flat, row, column, rows, columns, 0.3, 1e-6, 0.1)
    s = torch.minimum(row[rows], column[columns]) + g.float().flatten() ** 2
    stock = (
        flat[0].float() * (1 - 0.3 * 0.1) - 0.3 * flat[1].float() / (s + 1e-6).sqrt(),
        torch.maximum(row, s.view(shape).amax(1)), torch.maximum(column, s.view(shape).amax(0)),
    )  # fmt: skip
    ops.sm3_update(p, g, row, column, lr=0.3, eps=1e-6, weight_decay=0.1, impl="triton_gpu")
    check(("p", "row", "column"), (p.flatten(), row, column), stock, truth)


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("compact", [True, False])
def test_sm3_over_named_cells(compact, short):
    mask = torch.rand(9, 40_000) < 0.003
    mask[4] = False
    rows, columns = mask.nonzero().unbind(1)
    offsets = torch.zeros(10, dtype=torch.int64)
    offsets[1:] = mask.sum(1).cumsum(0)
    stored = torch.where(columns >= 2**15, columns - 2**16, columns).short()
    p, g = torch.randn(mask.shape), torch.randn(mask.shape)
    row, column = torch.rand(9), torch.rand(40_000)
    truth = reference.sm3(p[mask], g[mask], row, column, rows, columns, 0.3, 1e-6, 0.1)
    ours = (p[mask], g[mask]) if compact else (p.clone(), g)
    ops.sm3_update(*ours, row, column, lr=0.3, eps=1e-6, weight_decay=0.1, row_offsets=offsets,
                   columns=stored if short else columns.int(), impl="triton_gpu")  # fmt: skip
    got = ours[0] if compact else ours[0][mask]
    for mine, true in zip((got, row, column), truth, strict=True):
        assert torch.allclose(mine.double(), true, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(1.01 * mine.double(), true, rtol=1e-6, atol=1e-7)
    if not compact:
        assert torch.equal(ours[0][~mask], p[~mask])


def test_a_seeded_entry_moves_by_lr_at_every_age():
    for age in (0, 1, 7, 500, 20_000, 2**31 - 2):
        p, g = torch.zeros(5), torch.tensor([1e-3, -2.0, 1e-8, 5.0, -1.0])
        m, v = (g * (1 - 0.9**age)).clone(), (g**2 * (1 - 0.999**age)).clone()
        ages = torch.full((5,), age, dtype=torch.int32)
        ops.adamw_update([p], [g], [m], [v], [ages], lr=1e-3, eps=0.0, impl="triton_gpu")
        assert torch.allclose(p, -1e-3 * g.sign(), rtol=2e-6, atol=0), age


def test_a_training_run_is_that_of_the_cpu():
    ends = []
    for impl in ("triton_gpu", "cpp_cpu"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 3))
        x, target = torch.randn(50, 9), torch.randn(50, 3)
        mask = torch.rand(20, 9) < 0.5
        optimizer = tw.AdamW(model.parameters(), lr=1e-2, clip_norm=0.1, impl=impl,
                             only={model[0].weight: mask})  # fmt: skip
        for _ in range(10):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
        ends.append([optimizer.last_norm, *model.parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
