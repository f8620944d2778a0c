"""Sampling: the kept sets of transformers, one random number a row, refusals."""

import math

import pytest
import torch
from transformers.generation import logits_process as stock

import tilewright as tw
from tilewright.ops.decode import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = torch.ops.tilewright


def random_logits(rows=7, width=1000, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, width, generator=generator)).to(dtype)


def sample(impl, logits, **rule):
    """`sample_tokens` by an implementation, on its device; the results are on the CPU."""
    found = tw.sample_tokens(logits.to(impl.device), **rule, impl=impl.name)
    return found.cpu() if isinstance(found, torch.Tensor) else tuple(t.cpu() for t in found)


RULES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 5.0},
    "top_k-1": {"top_k": 1},
    "top_k-5": {"top_k": 5},
    "top_k-all": {"top_k": 10**9},
    "top_p-tiny": {"top_p": 1e-9},
    "top_p-0.6": {"top_p": 0.6},
    "top_p-nearly-all": {"top_p": 0.999},
    "min_p-0.2": {"min_p": 0.2},
    "min_p-1": {"min_p": 1.0},
    "all": {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
}


def stock_scores(logits, rule):
    """What transformers' processors leave, in float64."""
    width = logits.shape[-1]
    steps = [
        stock.TemperatureLogitsWarper(rule.get("temperature", 1.0)),
        stock.TopKLogitsWarper(min(rule["top_k"], width)) if "top_k" in rule else None,
        stock.TopPLogitsWarper(rule["top_p"]) if "top_p" in rule else None,
        stock.MinPLogitsWarper(rule["min_p"]) if "min_p" in rule else None,
    ]
    scores = logits.double()
    for step in filter(None, steps):
        scores = step(None, scores)
    return scores


def by_inversion(scores, seeds, steps):
    cumulative = scores.softmax(-1).cumsum(-1)
    target = reference.uniform(seeds, steps)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_reference_keeps_what_transformers_keeps(rule):
    logits = random_logits()
    scores = logits.double() / rule.get("temperature", 1.0)
    columns = [
        torch.tensor([[rule.get(name, off)]]).expand(len(logits), 1)
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    ]
    kept = reference.kept(scores, *(c.double() if i else c for i, c in enumerate(columns)))
    assert torch.equal(kept, stock_scores(logits, rule) > -math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_tokens_are_those_of_transformers_filters_and_one_uniform(rule, dtype, impl):
    """A kept set or a weight that is off moves every later threshold of the inverse: of 600 draws
    many would differ."""
    impl.require("sample_tokens", random_logits(dtype=dtype).to(impl.device))
    rows = 600
    # ids 0 to 299 thrice, so that bfloat16 has ties inside and outside of the kept sets
    logits = random_logits(6, 1003, dtype).repeat(rows // 6, 1)
    seeds, steps = torch.arange(rows), torch.arange(rows) % 5
    if dtype == torch.float32:
        expected = by_inversion(stock_scores(logits, rule), seeds, steps)
    else:  # ties at a border: transformers leaves their order open
        scores = logits.double() / rule.get("temperature", 1.0)
        columns = [
            torch.full((rows, 1), rule.get(name, off))
            for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
        ]
        kept = reference.kept(scores, *columns)
        expected = by_inversion(scores.masked_fill(~kept, -math.inf), seeds, steps)
    got = sample(impl, logits, **rule, seed=seeds, step=steps)
    assert got.dtype == torch.int64 and torch.equal(got, expected)


@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 1023, 1024, 1025, 5000])
def test_every_width(width, impl):
    logits = random_logits(40, width)
    seeds = torch.arange(40)
    for rule in ({}, {"top_p": 0.9}, {"top_k": 7, "min_p": 0.01}, {"top_k": width}):
        expected = by_inversion(stock_scores(logits, rule | {"top_k": width} if not rule else {
            **rule, **({"top_k": min(rule["top_k"], width)} if "top_k" in rule else {})
        }), seeds, 0 * seeds)  # fmt: skip
        got = sample(impl, logits, **rule, seed=seeds)
        assert torch.equal(got, expected), rule
    assert torch.equal(sample(impl, logits, temperature=0), logits.argmax(-1))


def test_equals_at_the_borders(impl):
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, -0.0, 0.0]]).repeat(400, 1)
    seed = torch.arange(400)

    def seen(**rule):
        return set(sample(impl, logits, **rule, seed=seed).tolist())

    assert seen(top_k=2) == {1, 2, 4}  # all that equal the second
    assert seen(top_k=4) == {0, 1, 2, 4}
    assert seen(top_k=5) == {0, 1, 2, 3, 4, 5, 6}  # -0 equals 0
    third = math.exp(2) / (3 * math.exp(2) + math.exp(1) + 3)
    assert seen(top_p=0.9 * third) == {1}  # the lowest id among equals
    assert seen(top_p=1.5 * third) == {1, 2}
    assert seen(temperature=0) == {1}
    assert seen(min_p=0.3) == {0, 1, 2, 4}


def test_flat_rows_and_masked_ones(impl):
    logits = torch.zeros(200, 4096)
    seed = torch.arange(200)
    tokens = sample(impl, logits, top_p=0.25, seed=seed)
    assert tokens.max() < 1024 and tokens.unique().numel() > 150
    logits[:, ::2] = -math.inf
    for rule in ({}, {"top_k": 3000}, {"top_p": 0.5}, {"temperature": 1e-40}):
        tokens = sample(impl, logits, **rule, seed=seed)
        assert (tokens % 2 == 1).all(), rule
    logits[:, 77] = 1.0
    cold = sample(impl, logits, temperature=1e-40, seed=seed)
    assert (cold == 77).all()


def test_penalties(impl):
    """Repetition as in transformers; frequency and presence on the output alone."""
    logits = random_logits(5, 60)
    prompt = [[0, 4, 4, 9], [1], [], [59] * 3, [2, 3]]
    output = [[4, 5], [], [7, 7, 7], [59], [0]]
    settings = dict(repetition_penalty=1.8, presence_penalty=0.5, frequency_penalty=-0.25)
    expected = logits.double()
    for row, (p, o) in enumerate(zip(prompt, output, strict=True)):
        processor = stock.RepetitionPenaltyLogitsProcessor(1.8)
        expected[row] = processor(torch.tensor([p + o]), expected[row : row + 1])[0]
        for token in set(o):
            expected[row, token] -= 0.5 - 0.25 * o.count(token)
    for penalized_seed in range(20):
        tokens, logprobs = sample(
            impl, logits, **settings, prompt=prompt, output=output, temperature=1.3,
            seed=penalized_seed, return_logprobs=True,
        )  # fmt: skip
        scores = expected / 1.3
        seeds = torch.full((5,), penalized_seed)
        assert torch.equal(tokens, by_inversion(scores, seeds, 0 * seeds))
        want = scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, want.float(), rtol=2e-6, atol=2e-6)
    greedy = sample(impl, logits, **settings, prompt=prompt, output=output, temperature=0)
    assert torch.equal(greedy, expected.argmax(-1))


def test_logprobs_are_of_the_unfiltered_distribution(impl):
    logits = random_logits(30, 500)
    temperature = torch.linspace(0, 2, 30)
    tokens, logprobs = sample(
        impl, logits, temperature=temperature, top_k=3, top_p=0.9, return_logprobs=True
    )
    scores = logits.double() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    want = scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, want.float(), rtol=2e-6, atol=2e-6)


def test_a_row_depends_on_itself_alone(impl):
    logits = random_logits(64, 3000)
    rule = dict(
        temperature=torch.rand(64) * 2, top_k=torch.randint(0, 90, (64,)),
        top_p=0.5 + torch.rand(64) / 2, seed=torch.arange(64) << 40, step=torch.arange(64),
    )  # fmt: skip
    together = sample(impl, logits, **rule)
    order = torch.randperm(64)
    shuffled = {name: value[order] for name, value in rule.items()}
    assert torch.equal(sample(impl, logits[order], **shuffled), together[order])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(sample(impl, logits, **rule), together)
    finally:
        torch.set_num_threads(before)
    alone = {name: value[5].item() for name, value in rule.items()}
    assert sample(impl, logits[5:6], **alone).item() == together[5]
    # strided rows are read where they lie
    assert torch.equal(sample(impl, logits.t().contiguous().t(), **rule), together)
    wide = torch.full((64, 5000), math.nan)
    wide[:, :3000] = logits
    assert torch.equal(sample(impl, wide[:, :3000], **rule), together)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, -50.0]])
    n = 8000
    expected = logits.double().softmax(-1)[0]
    for varied in ("seed", "step"):
        tokens = tw.sample_tokens(logits.repeat(n, 1), **{varied: torch.arange(n)})
        counts = torch.bincount(tokens, minlength=5)
        spread = (expected * (1 - expected) * n).sqrt()
        # four standard deviations; the seeds are fixed, so this either always holds or never
        assert ((counts - n * expected).abs() <= 4 * spread + 1e-6).all()


def test_philox_is_the_published_one():
    # known answers of Random123: counter and key all zero, and all ones
    words = reference.philox(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


REFUSED = {
    "row 1 of logits .* holds NaN": {"logits": torch.tensor([[0.0, 1.0], [math.nan, 1.0]])},
    "row 0 of logits .* nothing but -inf": {"logits": torch.full((1, 2), -math.inf)},
    r"row 0 of logits .* \+inf": {"logits": torch.tensor([[0.0, math.inf]])},
    "temperature is -1.0, need a number of at least 0": {"temperature": -1.0},
    r"temperature\[1\] is nan": {"temperature": [1.0, math.nan]},
    "top_p is 0.0, need 0 < top_p <= 1": {"top_p": 0.0},
    "min_p is 1.5, need 0 <= min_p <= 1": {"min_p": 1.5},
    "top_k is -1, need a whole number": {"top_k": -1},
    "top_k is 1.5, need a whole number": {"top_k": 1.5},
    "seed is torch.float32, need whole numbers": {"seed": torch.ones(2)},
    "seed does not become a row of numbers": {"seed": [1 << 63, 0]},
    r"top_k has shape \(3,\), need one number or B = 2": {"top_k": [1, 2, 3]},
    "repetition_penalty is 0.0, need a positive number": {"repetition_penalty": 0.0},
    "prompt holds token 9, need less than V = 4": {"prompt": [[9], []], "presence_penalty": 1.0},
    "output has 1 rows, need B = 2": {"output": [[1]]},
    "logits is torch.int64, need one of float32": {"logits": torch.ones(1, 2).long()},
    r"logits has shape \(2,\), need axes": {"logits": torch.ones(2)},
    r"logits has shape \(2, 0\), need V of at least 1": {"logits": torch.ones(2, 0)},
    'no impl "fast"': {"impl": "fast"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(ValueError, match=f"sample_tokens: {message}"):
        tw.sample_tokens(**{"logits": torch.zeros(2, 4), **REFUSED[message]})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 16, 33])
def test_strange_logits_are_found_wherever_they_are(value, place, temperature, impl_once):
    logits = torch.zeros(3, 34)
    logits[2, place] = value
    with pytest.raises(ValueError, match="row 2 of logits"):
        sample(impl_once, logits, temperature=temperature)


def test_no_rows(impl_once):
    tokens, logprobs = sample(impl_once, torch.zeros(0, 5), return_logprobs=True)
    assert tokens.shape == logprobs.shape == (0,)


def test_registration():
    logits = random_logits(3, 20)
    reals = torch.tensor([[1.0, 0.9, 0.0, 1.2, 0.0, 0.0]] * 3, dtype=torch.float64)
    wholes = torch.tensor([[5, 1, 2]] * 3)
    prompt = torch.tensor([[1, -1]] * 3)
    torch.library.opcheck(OPS.sample_tokens, (logits, reals, wholes, prompt, None, True, "auto"))
    torch.library.opcheck(
        OPS.fuse_logits, (logits, [logits + 1], logits, "single", 2.0, 21, "auto")
    )
    explained = tw.explain("sample_tokens", logits, top_k=3)
    assert explained.chosen in ("cpp_cpu", "reference") and "triton_gpu" in explained.reasons
    compiled = torch.compile(lambda x: tw.sample_tokens(x, top_k=4), backend="eager")
    assert torch.equal(compiled(logits), tw.sample_tokens(logits, top_k=4))
