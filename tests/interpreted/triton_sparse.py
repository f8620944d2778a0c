"""The Triton search for the largest gradients against the reference, in Triton's interpreter.

Run by tests/test_interpreted.py in a process of its own: TRITON_INTERPRET has to be 1 before
triton is imported, and other tests need the real compiler. The name keeps pytest from collecting
this file by itself. A tile has 32 outputs, 64 inputs and 16 tokens.
"""

import pytest
import torch

from tilewright import ops, settings
from tilewright.ops.sparse import reference, triton_gpu

by_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.float16), ids=lambda t: str(t).removeprefix("torch.")
)


def test_the_interpreter_is_on():
    assert settings.triton_is_interpreted()


def whole_numbers(*shape, most=3):
    return torch.randint(-most, most + 1, shape).float()


def largest(dy, x, k):
    found = ops.largest_gradients(dy, x, k, impl="triton_gpu")
    assert found.dtype == torch.int64 and found.shape == (k,)
    return found


@pytest.fixture(params=[False, True], ids=["with-room", "to-the-last"])
def room(request, monkeypatch):
    """Whether a few more than k may be collected, or the bound has to be met exactly."""
    if request.param:
        monkeypatch.setattr(triton_gpu, "room_for", lambda k: k)


SHAPES = {"one": (1, 1, 1), "below-a-tile": (5, 20, 50), "nothing-divides": (17, 70, 130)}


@by_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.usefixtures("room")
def test_whole_numbers_and_their_ties(shape, dtype):
    """Sums are exact, so that the set is that of the reference, ties and all."""
    T, O, I = shape
    dy, x = whole_numbers(T, O).to(dtype), whole_numbers(T, I).to(dtype)
    for k in {0, 1, O * I // 7, O * I // 2, O * I}:
        assert torch.equal(largest(dy, x, k), reference.largest_gradients(dy, x, k)), k


@by_dtype
def test_random_gradients(dtype):
    """What is chosen beyond a rounding's width is what float64 chooses."""
    dy, x = torch.randn(40, 70).to(dtype), torch.randn(40, 130).to(dtype)
    sizes = (dy.double().T @ x.double()).abs().flatten()
    slack = torch.finfo(torch.float32).eps * (dy.double().abs().T @ x.double().abs()).flatten()
    for k in (1, 90, 4000):
        chosen = torch.zeros(len(sizes), dtype=torch.bool)
        chosen[largest(dy, x, k)] = True
        bound = sizes.topk(k).values[-1]
        assert (sizes[chosen] >= bound - slack[chosen]).all()
        assert (sizes[~chosen] <= bound + slack[~chosen]).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.usefixtures("room")
def test_all_gradients_alike(value):
    """Nothing but ties: the first places."""
    dy, x = torch.full((3, 70), value), torch.ones(3, 130)
    for k in (1, 130, 777):
        assert torch.equal(largest(dy, x, k), torch.arange(k))


def test_more_ties_than_are_collected():
    """9100 equal ones of which 50 are wanted, below a few larger."""
    dy, x = torch.ones(3, 70), torch.ones(3, 130)
    dy[:, 60:62] = 5.0
    found = largest(dy, x, 310)
    wanted = torch.cat([torch.arange(50), torch.arange(60 * 130, 62 * 130)])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("guess", [0, 1, 0x7F800000, 0x3F800000])
def test_a_guess_however_bad_changes_nothing(monkeypatch, guess):
    dy, x = whole_numbers(10, 70), whole_numbers(10, 130)
    monkeypatch.setattr(triton_gpu, "sample_of", lambda *_: (lambda n: guess, 1))
    for k in (5, 500):
        assert torch.equal(largest(dy, x, k), reference.largest_gradients(dy, x, k))


@pytest.mark.parametrize("heavy", [0, 1])
def test_rows_of_unequal_size(monkeypatch, heavy):
    """A sample of every second row that tells nothing of the others."""
    monkeypatch.setattr(triton_gpu, "SAMPLED_ROWS", 35)
    dy, x = whole_numbers(10, 70), whole_numbers(10, 130)
    dy[:, heavy::2] *= 1000
    assert torch.equal(largest(dy, x, 900), reference.largest_gradients(dy, x, 900))


def test_strides_leading_axes_and_no_tokens():
    dy, x = whole_numbers(3, 5, 40), whole_numbers(3, 5, 50)
    plain = largest(dy, x, 90)
    wide_dy, wide_x = torch.full((15, 60), float("nan")), torch.full((50, 15), float("nan"))
    wide_dy[:, 7:47], wide_x[:] = dy.flatten(0, 1), x.flatten(0, 1).T
    assert torch.equal(largest(wide_dy[:, 7:47], wide_x.T, 90), plain)
    assert torch.equal(largest(dy[:0], x[:0], 7), torch.arange(7))
    assert largest(dy[..., :0], x, 0).shape == (0,)


@pytest.mark.usefixtures("room")
def test_nan_is_never_large_and_infinity_is():
    dy, x = whole_numbers(10, 40), whole_numbers(10, 50) + 0.5
    dy[3, 7], dy[:, 9] = float("nan"), 0.0  # rows of the gradient
    dy[2, 9] = float("inf")
    assert torch.equal(largest(dy, x, 50), torch.arange(9 * 50, 10 * 50))
    assert torch.equal(largest(dy, x, 60), reference.largest_gradients(dy, x, 60))
    found = largest(dy, x, 39 * 50)
    assert not (found // 50 == 7).any()
    with pytest.raises(ValueError, match=r"only 1950 entries of dy\^T x are numbers"):
        largest(dy, x, 39 * 50 + 1)


def test_a_search_spoilt_by_one_percent_is_seen(monkeypatch):
    """A bound 1 % too high loses some of what is wanted."""
    dy, x = torch.randn(40, 70), torch.randn(40, 130)
    right, collect = largest(dy, x, 900), triton_gpu.collect

    def spoilt(dy, x, low, *rest):
        high = torch.tensor(low, dtype=torch.int32).view(torch.float32) * 1.01
        places, sizes, n = collect(dy, x, int(high.view(torch.int32)), *rest)
        return places, sizes, max(n, 900)

    monkeypatch.setattr(triton_gpu, "collect", spoilt)
    monkeypatch.setattr(triton_gpu, "sample_of", lambda *_: (lambda n: bound, 1))
    bound = int((dy.T @ x).abs().flatten().topk(900).values[-1:].view(torch.int32))
    assert not torch.equal(ops.largest_gradients(dy, x, 900, impl="triton_gpu"), right)
