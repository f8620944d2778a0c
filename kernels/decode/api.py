"""The decode room's public functions: docstrings, checks, and the call into the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch

from tilewright import choose
from tilewright.ops.decode import op
from tilewright.ops.decode.fusion import MOST_GRID_POINTS
from tilewright.ops.decode.problem import LEAST_TEMPERATURE, LOGITS, RULES, Problem
from tilewright.shapes import expect_device, expect_dtype, expect_shapes

DTYPES = (*LOGITS, torch.float64)
Real = float | Sequence[float] | torch.Tensor
Whole = int | Sequence[int] | torch.Tensor
Ids = Sequence[Sequence[int]] | torch.Tensor | None

_NEEDS = {
    "temperature": (lambda v: (v >= 0) & (v < math.inf), "a number of at least 0"),
    "top_p": (lambda v: (v > 0) & (v <= 1), "0 < top_p <= 1"),
    "min_p": (lambda v: (v >= 0) & (v <= 1), "0 <= min_p <= 1"),
    "repetition_penalty": (lambda v: (v > 0) & (v < math.inf), "a positive number"),
    "presence_penalty": (torch.isfinite, "a finite number"),
    "frequency_penalty": (torch.isfinite, "a finite number"),
}


@overload
def sample_tokens(
    logits: torch.Tensor, *, temperature: Real = 1.0, top_k: Whole = 0, top_p: Real = 1.0,
    min_p: Real = 0.0, repetition_penalty: Real = 1.0, presence_penalty: Real = 0.0,
    frequency_penalty: Real = 0.0, prompt: Ids = None, output: Ids = None, seed: Whole = 0,
    step: Whole = 0, return_logprobs: Literal[False] = False, impl: str = "auto",
) -> torch.Tensor: ...  # fmt: skip
@overload
def sample_tokens(
    logits: torch.Tensor, *, temperature: Real = 1.0, top_k: Whole = 0, top_p: Real = 1.0,
    min_p: Real = 0.0, repetition_penalty: Real = 1.0, presence_penalty: Real = 0.0,
    frequency_penalty: Real = 0.0, prompt: Ids = None, output: Ids = None, seed: Whole = 0,
    step: Whole = 0, return_logprobs: Literal[True], impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def sample_tokens(
    logits: torch.Tensor,
    *,
    temperature: Real = 1.0,
    top_k: Whole = 0,
    top_p: Real = 1.0,
    min_p: Real = 0.0,
    repetition_penalty: Real = 1.0,
    presence_penalty: Real = 0.0,
    frequency_penalty: Real = 0.0,
    prompt: Ids = None,
    output: Ids = None,
    seed: Whole = 0,
    step: Whole = 0,
    return_logprobs: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row: penalties, temperature, filters and the draw in one operator.

        x = x / r if x > 0 else x r                  tokens of the prompt or the output
        x = x - frequency count - presence           tokens of the output, `count` times in it
        x = x / temperature, then top_k, top_p, min_p, each on what the one before has left
        token = the first whose cumulative probability, in order of ids, passes u(seed, step)

    logits              (B, V)
    temperature         0: greedy, the largest logit and of equals the lowest id; no filters then
    top_k               keep the k largest and what equals the last of them; 0 keeps all
    top_p               keep the fewest largest whose probabilities reach p, lower ids first among
                        equals; 1 keeps all
    min_p               drop what is less probable than p times the most probable; 0 keeps all
    repetition_penalty  r, 1 is none; presence_penalty and frequency_penalty: 0 is none
    prompt, output      ids a row, lists or (B, N) int64 filled up with -1
    seed, step          whole numbers of at least 0: the 53-bit u is Philox4x32-10's of this key and
                        counter, so a row's token depends on its own logits, seed and step alone
    return_logprobs     also the tokens' log-probabilities under softmax(x / temperature) with
                        penalties and without filters; of greedy rows at temperature 1
    impl                "auto", "reference", "cpp_cpu" or "triton_gpu"

    Each setting is one number, or one for each row. The kept tokens are those of transformers'
    logits processors in this order. Returns (B,) int64, and (B,) float32 with return_logprobs.
    Dtypes: float32, bfloat16, float16 (float64: reference only). No gradient.
    ValueError: a shape, dtype, setting or id outside the above; a row that holds NaN or +inf, or
    nothing but -inf. RuntimeError: `impl` was named and cannot run here.

    Source: Holtzman et al., arXiv 1904.09751 (top_p); Nguyen et al., arXiv 2407.01082 (min_p);
    Keskar et al., arXiv 1909.05858 (repetition); Salmon et al., SC 2011 (Philox).
    """
    name = "sample_tokens"
    expect_dtype(name, DTYPES, logits=logits)
    n_rows, vocabulary = expect_shapes(name, logits=(logits, "BV")).values()
    if vocabulary == 0:
        raise ValueError(f"{name}: logits has shape {tuple(logits.shape)}, need V of at least 1")
    reals = torch.empty(n_rows, len(_NEEDS), dtype=torch.float64)
    given = dict(
        temperature=temperature, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
    )  # fmt: skip
    for column, (what, value) in enumerate(given.items()):
        reals[:, column] = _a_row(name, what, value, n_rows, torch.float64)
        is_right, need = _NEEDS[what]
        _expect_each(name, what, value, reals[:, column], is_right, need)
    temperatures = reals[:, 0]
    reals[:, 0] = torch.where(
        temperatures > 0, temperatures.clamp(min=LEAST_TEMPERATURE), temperatures
    )
    wholes = torch.empty(n_rows, 3, dtype=torch.int64)
    for column, (what, whole) in enumerate(dict(top_k=top_k, seed=seed, step=step).items()):
        wholes[:, column] = _a_row(name, what, whole, n_rows, torch.int64)
        need = "a whole number of at least 0"
        _expect_each(name, what, whole, wholes[:, column], lambda v: v >= 0, need)
    is_penalized = bool(((reals[:, 3] != 1) | (reals[:, 4:] != 0).any(1)).any())
    ids = {
        what: _ids(name, what, value, logits)
        for what, value in dict(prompt=prompt, output=output).items()
    }
    if not is_penalized:
        ids = dict.fromkeys(ids)
    tokens, logprobs = op.call_sample(
        logits, reals, wholes, ids["prompt"], ids["output"], return_logprobs, impl
    )
    return (tokens, logprobs) if return_logprobs else tokens


def _a_row(op_name: str, what: str, value, n_rows: int, dtype: torch.dtype):
    """`value` as something that fits a column of n_rows."""
    if isinstance(value, (int, float)):
        if dtype == torch.int64 and (isinstance(value, (bool, float)) or value >= 1 << 63):
            raise ValueError(f"{op_name}: {what} is {value!r}, need a whole number below 2^63")
        return value
    if isinstance(value, torch.Tensor):
        t = value
    else:
        try:
            # a list of floats keeps its digits
            is_whole = all(isinstance(v, int) for v in value)
            t = torch.tensor(value, dtype=torch.int64 if is_whole else torch.float64)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{op_name}: {what} does not become a row of numbers: {error}"
            ) from None
    if t.shape not in ((), (n_rows,)):
        raise ValueError(
            f"{op_name}: {what} has shape {tuple(t.shape)}, need one number or B = {n_rows}"
        )
    if dtype == torch.int64 and t.numel() and (t.is_floating_point() or t.dtype == torch.bool):
        raise ValueError(f"{op_name}: {what} is {t.dtype}, need whole numbers")
    return t


def _expect_each(op_name: str, what: str, value, column, is_right, need: str) -> None:
    wrong = ~is_right(column)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        where = what if isinstance(value, (int, float)) else f"{what}[{row}]"
        raise ValueError(f"{op_name}: {where} is {column[row].item()}, need {need}")


def _ids(op_name: str, what: str, value: Ids, logits: torch.Tensor) -> torch.Tensor | None:
    """(B, N) int64, filled up with -1, or None."""
    n_rows, vocabulary = logits.shape
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):
        if len(value) != n_rows:
            raise ValueError(f"{op_name}: {what} has {len(value)} rows, need B = {n_rows}")
        longest = max((len(row) for row in value), default=0)
        value = torch.tensor(
            [[*row, *[-1] * (longest - len(row))] for row in value], dtype=torch.int64
        ).view(n_rows, longest)
        value = value.to(logits.device)
    expect_dtype(op_name, (torch.int64,), **{what: value})
    expect_shapes(op_name, logits=(logits, "BV"), **{what: (value, "BN")})
    expect_device(op_name, logits=logits, **{what: value})
    if value.numel() and int(value.max()) >= vocabulary:
        raise ValueError(
            f"{op_name}: {what} holds token {int(value.max())}, need less than V = {vocabulary}"
        )
    return value if value.numel() else None


def fuse_logits(
    large: torch.Tensor,
    tuned_small: torch.Tensor | Sequence[torch.Tensor],
    base_small: torch.Tensor,
    *,
    rule: str = "single",
    a_max: float = 2.0,
    grid_points: int = 21,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steer a large model's logits by tuned small ones, as far as those moved from their base.

        z = large + sum_t a_t (tuned_t - base)       P = softmax(z)
        one expert: KL(P || softmax(large)) = K with K = KL(softmax(tuned) || softmax(base))

    large        (B, V)
    tuned_small  (B, V), or a list of T such tensors: the experts
    base_small   (B, V), what the experts were tuned from
    rule         "single"      one expert: its a solves the equation, which has one root, as the
                               divergence grows with a
                 "grid"        of all a_t in {0, .., a_max}, grid_points of each, the first with the
                               least sum_t (KL(P || softmax(large)) - K_t)^2
                 "per_expert"  each a_t solved alone, then all scaled by one number so that the
                               divergence is the mean of the K_t
    a_max        a divergence that is not reached up to it leaves the largest a there
    impl         "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns z (B, V) float32 and a (B, T) float64. Rows are independent. If large is base, the one
    expert's a is 1; where an expert is base, up to a constant, its a is 0. Sums are float64 over
    the logits as they come, |KL - K| <= 1e-9 where a_max does not cut.
    Several experts have infinitely many solutions of the least-squares objective: the two rules are
    choices, no claim is made about published results.
    Dtypes: float32, bfloat16, float16 (float64: reference only). No gradient.
    ValueError: unequal shapes (one vocabulary is needed), dtypes or devices; an unknown rule;
    logits that are not finite (large may hold -inf). RuntimeError: `impl` cannot run here.

    Source: Fan et al., On giant's shoulders: effortless weak to strong by dynamic logits fusion,
    arXiv 2406.15480.
    """
    name = "fuse_logits"
    tuned = [tuned_small] if isinstance(tuned_small, torch.Tensor) else list(tuned_small)
    if not tuned:
        raise ValueError(f"{name}: tuned_small is an empty list, need one expert at least")
    tensors = {"large": large, "base_small": base_small}
    tensors |= {f"tuned_small[{t}]": expert for t, expert in enumerate(tuned)}
    expect_dtype(name, DTYPES, **tensors)
    expect_device(name, **tensors)
    size = expect_shapes(name, **{what: (t, "BV") for what, t in tensors.items()})
    if size["V"] == 0:
        raise ValueError(f"{name}: large has shape {tuple(large.shape)}, need V of at least 1")
    if rule not in RULES:
        raise ValueError(f"{name}: no rule {rule!r}. Known: {', '.join(RULES)}")
    if rule == "single" and len(tuned) > 1:
        raise ValueError(
            f'{name}: rule is "single" and tuned_small holds {len(tuned)} experts, need one, or '
            'the rule "grid" or "per_expert"'
        )
    if not 0 < a_max < math.inf:
        raise ValueError(f"{name}: a_max is {a_max}, need a positive number")
    if grid_points < 2 or (rule == "grid" and grid_points ** len(tuned) > MOST_GRID_POINTS):
        raise ValueError(
            f"{name}: grid_points is {grid_points} for {len(tuned)} experts, need at least 2 and "
            f"at most {MOST_GRID_POINTS} points in all"
        )
    return op.call_fuse(large, tuned, base_small, rule, float(a_max), grid_points, impl)


_CANDIDATES = (
    choose.implementation_of("decode", "triton_gpu"),
    choose.implementation_of("decode", "cpp_cpu"),
    choose.REFERENCE,
)


def _register(name: str) -> None:
    def described(logits: torch.Tensor, *rest, **kwargs) -> Problem:
        return Problem(name, logits.device.type, logits.dtype)

    def samples() -> dict[str, object]:
        return {
            label: Problem(name, device, dtype) for label, device, dtype in choose.usual_types()
        }

    choose.register(choose.Operator(name, _CANDIDATES, described, samples))


for _name in ("sample_tokens", "fuse_logits"):
    _register(_name)
