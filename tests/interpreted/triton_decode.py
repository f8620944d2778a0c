"""The Triton kernels of the decode room against the reference, in Triton's interpreter.

Run by tests/test_interpreted.py in a process of its own: TRITON_INTERPRET has to be 1 before
triton is imported, and other tests need the real compiler. The name keeps pytest from collecting
this file by itself.
"""

import math

import pytest
import torch
from test_decode import RULES, random_logits
from test_decode_fusion import models

import tilewright as tw
from tilewright import settings
from tilewright.ops.decode import reference, triton_gpu

DTYPES = (torch.float32, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
BOTH = ("triton_gpu", "reference")


def test_the_interpreter_is_on():
    assert settings.triton_is_interpreted()


def agree(logits, **rule):
    """Tokens are the reference's, and log-probabilities near them."""
    rule = dict(return_logprobs=True) | rule
    ours, truth = (tw.sample_tokens(logits, **rule, impl=impl) for impl in BOTH)
    assert torch.equal(ours[0], truth[0])
    torch.testing.assert_close(ours[1], truth[1], rtol=2e-6, atol=2e-6)
    return ours[0]


@by_dtype
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_tokens_are_those_of_the_reference(rule, dtype):
    agree(random_logits(4, 503, dtype), **rule, seed=torch.arange(4), step=torch.arange(4) % 3)


def test_a_temperature_wrong_by_one_percent_is_seen(monkeypatch):
    right = triton_gpu._settings

    def spoilt(reals):
        return right(reals) * torch.tensor([1.01, 1.01, 1.0, 1.0])

    agree(random_logits(4, 503))
    monkeypatch.setattr(triton_gpu, "_settings", spoilt)
    with pytest.raises(AssertionError):
        agree(random_logits(4, 503))


@pytest.mark.parametrize("width", [1, 3, 16, 17, 64, 65])
def test_rows_of_several_tiles(width, monkeypatch):
    monkeypatch.setattr(triton_gpu, "COLUMNS", 16)
    logits, seed = random_logits(3, width), torch.arange(3)
    for rule in ({}, {"top_p": 0.9}, {"top_k": 7, "min_p": 0.01}, {"temperature": 0}):
        agree(logits, **rule, seed=seed)


def test_equals_at_the_borders(monkeypatch):
    monkeypatch.setattr(triton_gpu, "COLUMNS", 16)
    row = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, -0.0, 0.0])
    logits = torch.cat([row, torch.full((20,), -9.0), row])[None].repeat(4, 1)
    seed = torch.arange(4)
    for rule in (dict(top_k=2), dict(top_k=8), dict(top_p=0.1), dict(top_p=0.4), dict(top_p=0.75),
                 dict(min_p=0.3), dict(temperature=0)):  # fmt: skip
        agree(logits, **rule, seed=seed)


def test_flat_rows_and_masked_ones(monkeypatch):
    monkeypatch.setattr(triton_gpu, "COLUMNS", 32)
    logits, seed = torch.zeros(3, 100), torch.arange(3)
    agree(logits, top_p=0.25, seed=seed)
    logits[:, ::2] = -math.inf
    for rule in ({}, {"top_k": 70}, {"top_p": 0.5}, {"temperature": 1e-40}):
        assert (agree(logits, **rule, seed=seed, return_logprobs=True) % 2 == 1).all(), rule


def test_penalties():
    logits = random_logits(5, 60)
    prompt = [[0, 4, 4, 9], [1], [], [59] * 300, [2, 3]]
    output = [[4, 5], [], [7, 7, 7], [59], [0]]
    rule = dict(repetition_penalty=1.8, presence_penalty=0.5, frequency_penalty=-0.25)
    for seed in range(4):
        agree(logits, **rule, prompt=prompt, output=output, temperature=1.3, seed=seed)
    agree(logits, **rule, prompt=prompt, output=output, temperature=0)
    agree(logits, repetition_penalty=0.5, prompt=prompt)
    agree(logits, frequency_penalty=3.0, output=output, temperature=0)


def test_a_row_depends_on_itself_alone():
    logits = random_logits(6, 300)
    rule = dict(
        temperature=torch.rand(6) * 2, top_k=torch.randint(0, 90, (6,)),
        top_p=0.5 + torch.rand(6) / 2, seed=torch.arange(6) << 40, step=torch.arange(6) << 33,
    )  # fmt: skip
    together = agree(logits, **rule)
    alone = {name: value[5].item() for name, value in rule.items()}
    assert agree(logits[5:6], **alone).item() == together[5]
    wide = torch.full((6, 500), math.nan)
    wide[:, :300] = logits
    assert torch.equal(agree(wide[:, :300], **rule), together)
    assert torch.equal(agree(logits.t().contiguous().t(), **rule), together)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 16, 33])
def test_strange_logits_are_found_wherever_they_are(value, place, temperature, monkeypatch):
    monkeypatch.setattr(triton_gpu, "COLUMNS", 16)
    logits = torch.zeros(3, 34)
    logits[2, place] = value
    with pytest.raises(ValueError, match="row 2 of logits"):
        tw.sample_tokens(logits, temperature=temperature, impl="triton_gpu")
    with pytest.raises(ValueError, match="row 0 of logits"):
        tw.sample_tokens(torch.full((1, 34), -math.inf), impl="triton_gpu")


def test_no_rows():
    tokens = tw.sample_tokens(torch.zeros(0, 5), impl="triton_gpu")
    assert tokens.shape == (0,)


# --- fusion ---


def solved(large, tuned, base, **options):
    """Strengths and fused logits are those of the reference."""
    options = dict(a_max=2.0) | options
    ours, truth = (tw.fuse_logits(large, tuned, base, **options, impl=impl) for impl in BOTH)
    torch.testing.assert_close(ours[1], truth[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours[0], truth[0], rtol=1e-6, atol=1e-5)
    return ours[1]


@by_dtype
@pytest.mark.parametrize("width", [1, 7, 16, 17, 130])
def test_the_strength_is_the_references(width, dtype, monkeypatch):
    monkeypatch.setattr(triton_gpu, "FUSED_COLUMNS", 64)
    large, tuned, base = models(rows=5, width=width, dtype=dtype)
    a = solved(large, tuned[0], base)
    wanted = reference.divergence(base, tuned[0].double() - base.double())
    got = reference.divergence(large, a * (tuned[0].double() - base.double()))
    is_cut = a[:, 0] == 2
    assert ((got - wanted).abs()[~is_cut] < 1e-6).all() and (got[is_cut] <= wanted[is_cut]).all()
    spoilt = reference.divergence(large, 1.01 * a * (tuned[0].double() - base.double()))
    if width > 100:
        assert not ((spoilt - wanted).abs()[~is_cut] < 1e-6).any() and (~is_cut).any()


@pytest.mark.parametrize("rule", ["per_expert", "grid"])
def test_several_experts(rule):
    large, tuned, base = models(rows=3, width=100, experts=3)
    solved(large, tuned, base, rule=rule, grid_points=3)
    strided = [torch.cat([t, t], 1)[:, :100] for t in tuned]
    solved(large, strided, base, rule=rule, grid_points=3)


def test_what_is_equal_and_what_is_masked():
    large, tuned, base = models(rows=4, width=100)
    assert torch.equal(solved(base, tuned, base), torch.ones(4, 1, dtype=torch.float64))
    assert torch.equal(solved(large, base, base), torch.zeros(4, 1, dtype=torch.float64))
    large[:, ::3] = -math.inf
    solved(large, tuned, base)
    large[:, 1] = 1e4
    assert torch.equal(solved(large, tuned, base), torch.full((4, 1), 2.0, dtype=torch.float64))


def test_infinite_logits_are_refused():
    large, tuned, base = models(rows=2, width=50)
    for place in (large, tuned[0], base):
        spoilt = place.clone()
        spoilt[1, 7] = math.nan
        given = [spoilt if t is place else t for t in (large, tuned[0], base)]
        with pytest.raises(ValueError, match="row 1 of large, tuned or base holds NaN"):
            tw.fuse_logits(*given, impl="triton_gpu")
