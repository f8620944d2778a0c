"""Launchers of the Triton kernels of the decode room: tensors -> kernel arguments."""

from __future__ import annotations

import math

import torch

from tilewright.ops.common.triton_launch import Launch, contiguous, why_not_triton
from tilewright.ops.decode.problem import Problem
from tilewright.ops.decode.triton_fusion import root_kernel, tilt_kernel
from tilewright.ops.decode.triton_sample import (
    occurrences_kernel,
    penalties_kernel,
    sample_row_kernel,
)

COLUMNS = 2048  # of a row at a time
FUSED_COLUMNS = 1024  # the same where all is float64
IDS = 256  # of a row at a time
MOST_STEEPNESS = 1e30  # of 1 / temperature


def why_not(p: Problem) -> str | None:
    """None if the Triton kernels can run this problem here, else the reason."""
    return why_not_triton(p.device, p.dtype)


def _in_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


def _columns(vocabulary: int, most: int) -> int:
    return max(16, min(most, 1 << max(vocabulary - 1, 0).bit_length()))


def _warps(columns: int) -> int:
    """One program has a processor's bandwidth to itself: many threads, few elements each."""
    return max(1, min(16, columns // 32))


# --- sampling ---


def sample_tokens(logits, reals, wholes, prompt, output, wants_logprobs):
    """(B,) int64, -1 where a row is no distribution, and (B,) float32 or (0,)."""
    logits = _in_rows(logits)
    if prompt is not None or output is not None:
        logits = _penalized(logits, reals[:, 3:], prompt, output)
    n_rows = logits.shape[0]
    tokens = torch.empty(n_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(n_rows if wants_logprobs else 0, device=logits.device)
    settings = _settings(reals).to(logits.device), wholes.to(logits.device)
    sample_launch(logits, *settings, tokens, logprobs if wants_logprobs else None).run()
    return tokens, logprobs


def _settings(reals: torch.Tensor) -> torch.Tensor:
    """(B, 4) float64 as sample_row_kernel takes them, on the CPU."""
    temperature, top_p, min_p = reals[:, :3].unbind(1)
    is_greedy = temperature == 0
    inverse = torch.where(is_greedy, 0.0, 1.0 / torch.where(is_greedy, 1.0, temperature))
    steepness = torch.where(is_greedy, 1.0, inverse.clamp(max=MOST_STEEPNESS)) * math.log2(math.e)
    least = min_p.float()
    least = torch.where(least.double() < min_p, least.nextafter(least.new_tensor(2.0)), least)
    return torch.stack([inverse, steepness, top_p, least.double()], 1)


def sample_launch(logits, settings, wholes, tokens, logprobs) -> Launch:
    n_rows, vocabulary = logits.shape
    columns = _columns(vocabulary, COLUMNS)
    arguments = {
        "x_ptr": logits, "reals_ptr": settings, "wholes_ptr": wholes.contiguous(),
        "tokens_ptr": tokens, "logprobs_ptr": logprobs, "row_stride": logits.stride(0),
        "vocabulary": vocabulary, "COLUMNS": columns,
    }  # fmt: skip
    return Launch(sample_row_kernel, n_rows, arguments, _warps(columns), device=logits.device)


def _penalized(logits, rules, prompt, output) -> torch.Tensor:
    """(B, V) float32."""
    x = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).copy_(logits)
    counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
    given = [(contiguous(prompt), 0), (contiguous(output), 1)]
    given = [(ids, is_output) for ids, is_output in given if ids is not None]
    for ids, is_output in given:
        occurrences_launch(ids, counts, is_output).run()
    rules = rules.contiguous().to(logits.device)
    for ids, _ in given:
        penalties_launch(logits, ids, counts, rules, x).run()
    return x


def occurrences_launch(ids, counts, is_output: int) -> Launch:
    arguments = {
        "ids_ptr": ids, "counts_ptr": counts, "n_ids": ids.shape[1], "vocabulary": counts.shape[1],
        "is_output": is_output, "IDS": IDS,
    }  # fmt: skip
    return Launch(occurrences_kernel, len(ids), arguments, 4, device=ids.device)


def penalties_launch(logits, ids, counts, rules, x) -> Launch:
    arguments = {
        "logits_ptr": logits, "ids_ptr": ids, "counts_ptr": counts, "rules_ptr": rules, "x_ptr": x,
        "row_stride": logits.stride(0), "n_ids": ids.shape[1], "vocabulary": logits.shape[1],
        "IDS": IDS,
    }  # fmt: skip
    return Launch(penalties_kernel, len(ids), arguments, 4, device=ids.device)


# --- fusion ---


def tilt(large, tuned, base, a):
    """(B, 3) float64: log of the sum of exp(x), mean and variance of d; see `fusion.Sums`."""
    large, base, tuned = _in_rows(large), _in_rows(base), [_in_rows(t) for t in tuned]
    sums = torch.empty(large.shape[0], 3, dtype=torch.float64, device=large.device)
    tilt_launch(large, _tables(tuned), base, a.contiguous(), sums).run()
    return sums


def root(large, tuned, base, wanted, direction, most):
    """(B,) float64: see `fusion.Root`."""
    large, base, tuned = _in_rows(large), _in_rows(base), [_in_rows(t) for t in tuned]
    found = torch.empty(large.shape[0], dtype=torch.float64, device=large.device)
    given = direction.contiguous(), wanted.contiguous(), most.contiguous()
    root_launch(large, _tables(tuned), base, *given, found).run()
    return found


def _tables(tuned: list[torch.Tensor]) -> torch.Tensor:
    """(T, 2) int64 for `triton_fusion.at`; the tensors must outlive the launch."""
    rows = [[t.data_ptr(), t.stride(0)] for t in tuned]
    return torch.tensor(rows, dtype=torch.int64).to(tuned[0].device)


def tilt_launch(large, tables, base, a, sums) -> Launch:
    return _fusion(tilt_kernel, large, tables, base, {"a_ptr": a, "sums_ptr": sums})


def root_launch(large, tables, base, direction, wanted, most, found) -> Launch:
    own = {
        "direction_ptr": direction, "wanted_ptr": wanted, "most_ptr": most, "found_ptr": found
    }  # fmt: skip
    return _fusion(root_kernel, large, tables, base, own)


def _fusion(kernel, large, tables, base, own) -> Launch:
    n_rows, vocabulary = large.shape
    columns = _columns(vocabulary, FUSED_COLUMNS)
    arguments = {
        "z_ptr": large, "tables_ptr": tables, "base_ptr": base, **own,
        "z_stride": large.stride(0), "base_stride": base.stride(0), "n_experts": len(tables),
        "vocabulary": vocabulary, "COLUMNS": columns,
    }  # fmt: skip
    return Launch(kernel, n_rows, arguments, _warps(columns), device=large.device)
