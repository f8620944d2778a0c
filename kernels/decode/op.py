"""torch.library schemas and fakes of the decode room; neither is differentiable."""

from __future__ import annotations

import importlib

import torch

from tilewright import choose
from tilewright.direct import may_go_direct
from tilewright.ops.decode import fusion, reference
from tilewright.ops.decode.problem import Problem

library = torch.library.Library("tilewright", "FRAGMENT")

# reals (B, 6) float64 and wholes (B, 3) int64, on the CPU, have the columns of problem.py
library.define(
    "sample_tokens(Tensor logits, Tensor reals, Tensor wholes, Tensor? prompt, Tensor? output, "
    "bool wants_logprobs, str impl) -> (Tensor, Tensor)"
)
library.define(
    "fuse_logits(Tensor large, Tensor[] tuned, Tensor base, str rule, float a_max, int points, "
    "str impl) -> (Tensor, Tensor)"
)


def _sample_by_reference(logits, reals, wholes, prompt, output, wants_logprobs):
    reals, wholes = reals.to(logits.device), wholes.to(logits.device)
    x = reference.penalized(logits, prompt, output, *reals[:, 3:, None].unbind(1))
    is_strange = ~(x < torch.inf).all(-1) | (x == -torch.inf).all(-1)
    logits = logits.masked_fill(is_strange[:, None], 0.0)
    tokens, logprobs = reference.sample_tokens(logits, reals, wholes, prompt, output)
    tokens = torch.where(is_strange, -1, tokens)
    return tokens, logprobs.float() if wants_logprobs else logprobs.new_empty(0).float()


def _sample_tokens(logits, reals, wholes, prompt, output, wants_logprobs, impl):
    problem = Problem("sample_tokens", logits.device.type, logits.dtype)
    chosen = choose.choose("sample_tokens", impl, problem)
    run = _sample_by_reference
    if chosen != "reference":
        run = importlib.import_module(f"tilewright.ops.decode.{chosen}").sample_tokens
    tokens, logprobs = run(logits, reals, wholes, prompt, output, wants_logprobs)
    if tokens.numel() and int(tokens.min()) < 0:
        raise ValueError(
            f"sample_tokens: row {int((tokens < 0).nonzero()[0])} of logits (penalties applied) "
            "holds NaN, +inf or nothing but -inf; need finite logits or -inf, one finite at least"
        )
    return tokens, logprobs


def _fuse_logits(large, tuned, base, rule, a_max, points, impl):
    problem = Problem("fuse_logits", large.device.type, large.dtype)
    chosen = choose.choose("fuse_logits", impl, problem)
    if chosen == "reference":
        fusion.expect_finite(
            [base.double().sum(-1), *(t.double().sum(-1) for t in tuned), large.amax(-1)]
        )
        a = reference.strengths(large, tuned, base, rule, a_max, points)
    else:
        module = importlib.import_module(f"tilewright.ops.decode.{chosen}")
        root = getattr(module, "root", None)
        a = fusion.strengths(module.tilt, large, tuned, base, rule, a_max, points, root)
    wide = torch.float64 if large.dtype == torch.float64 else torch.float32
    fused, small = large.to(wide, copy=True), base.to(wide)
    for t, expert in enumerate(tuned):
        fused += a[:, t, None].to(wide) * (expert.to(wide) - small)
    return fused, a


def call_sample(logits, reals, wholes, prompt, output, wants_logprobs, impl):
    """The registered operator, or in plain eager mode what it would end up calling."""
    tensors = (logits, reals, wholes, prompt, output)
    run = _sample_tokens if may_go_direct(*tensors) else torch.ops.tilewright.sample_tokens
    return run(*tensors, wants_logprobs, impl)


def call_fuse(large, tuned, base, *rest):
    is_direct = may_go_direct(large, base, *tuned)
    return (_fuse_logits if is_direct else torch.ops.tilewright.fuse_logits)(
        large, tuned, base, *rest
    )


for _operator, _function in (("sample_tokens", _sample_tokens), ("fuse_logits", _fuse_logits)):
    library.impl(_operator, _function, "CPU")
    library.impl(_operator, _function, "CUDA")


@torch.library.register_fake("tilewright::sample_tokens", lib=library)
def _(logits, reals, wholes, prompt, output, wants_logprobs, impl):
    n = logits.shape[0]
    return (
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n if wants_logprobs else 0, dtype=torch.float32),
    )


@torch.library.register_fake("tilewright::fuse_logits", lib=library)
def _(large, tuned, base, rule, a_max, points, impl):
    wide = torch.float64 if large.dtype == torch.float64 else torch.float32
    a = large.new_empty(large.shape[0], len(tuned), dtype=torch.float64)
    return large.new_empty(large.shape, dtype=wide), a
