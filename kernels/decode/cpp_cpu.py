"""torch tensors -> pointers, extents and strides of the C++ kernels (csrc/decode)."""

from __future__ import annotations

import torch

from tilewright.native import native
from tilewright.ops.common.cpu import NUMBERS, why_not_on_cpu
from tilewright.ops.decode.problem import Problem


def why_not(p: Problem) -> str | None:
    return why_not_on_cpu(p.device, p.dtype)


def _in_rows(t: torch.Tensor) -> torch.Tensor:
    if t.is_neg() or (t.shape[1] > 1 and t.stride(1) != 1):
        return t.resolve_neg().contiguous()
    return t


def _matrix(t: torch.Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.stride(0)


def _ids(t: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), t.shape[1])


def sample_tokens(logits, reals, wholes, prompt, output, wants_logprobs):
    """(B,) int64, -1 where a row is no distribution, and (B,) float32 or (0,)."""
    logits = _in_rows(logits)
    n_rows, vocabulary = logits.shape
    tokens = torch.empty(n_rows, dtype=torch.int64)
    logprobs = torch.empty(n_rows if wants_logprobs else 0, dtype=torch.float32)
    reals, wholes = reals.contiguous(), wholes.contiguous()
    prompt = None if prompt is None else prompt.contiguous()
    output = None if output is None else output.contiguous()
    native().sample_tokens(
        NUMBERS[logits.dtype], n_rows, vocabulary, _matrix(logits), reals.data_ptr(),
        wholes.data_ptr(), _ids(prompt), _ids(output), tokens.data_ptr(),
        logprobs.data_ptr() if wants_logprobs else 0, torch.get_num_threads(),
    )  # fmt: skip
    return tokens, logprobs


def tilt(large, tuned, base, a):
    """(B, 3) float64: log of the sum of exp(x), mean and variance of d; see `fusion.Sums`."""
    large, base = _in_rows(large), _in_rows(base)
    tuned, a = [_in_rows(t) for t in tuned], a.contiguous()
    sums = torch.empty(large.shape[0], 3, dtype=torch.float64)
    native().tilt(
        NUMBERS[large.dtype], *large.shape, _matrix(large), [_matrix(t) for t in tuned],
        _matrix(base), a.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sums
