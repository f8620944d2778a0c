"""What this machine can do at most, measured in the same run as the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tilewright import native
from tilewright.bench.timing import Stopwatch

READ_BYTES = 512 * 2**20  # more than any cache holds
TRIES = 5  # the best one counts: everything that disturbs makes it slower


@dataclass(frozen=True)
class Ceilings:
    """Rates in units of 1e9 a second; None where the machine or the build cannot do it.

    fma        float32 operations; a multiplication and an addition are two
    bf16_dot   bfloat16 operations into float32
    int8_dot   int8 operations into int32
    read       bytes read from memory (on a GPU: read and written by a copy)
    """

    fma: float | None
    bf16_dot: float | None
    int8_dot: float | None
    read: float | None
    how: str

    def operations(self, dtype: torch.dtype) -> float | None:
        """The rate for products of a dtype; without an instruction of their own, float32's."""
        if dtype in (torch.bfloat16, torch.float16):
            return self.bf16_dot or self.fma
        return self.int8_dot if dtype == torch.int8 else self.fma

    def least_us(self, operations: float, n_bytes: float, dtype: torch.dtype):
        """(microseconds that the work takes at best, "compute" or "memory"), or (None, "")."""
        rate = self.operations(dtype)
        if rate is None or self.read is None:
            return None, ""
        compute_us, memory_us = operations / rate / 1e3, n_bytes / self.read / 1e3
        return max((compute_us, "compute"), (memory_us, "memory"))


def measure(device: str, seconds: float = 0.1) -> Ceilings:
    """Measure the ceilings; each try takes about `seconds`."""
    if torch.device(device).type == "cuda":
        return _measure_cuda(device)
    why_not = native.why_not_native()
    if why_not is not None:
        return Ceilings(None, None, None, None, f"not measured: {why_not}")
    module, threads = native.native(), torch.get_num_threads()
    return Ceilings(
        fma=_loop_rate(module.ceiling_fma, threads, seconds),
        bf16_dot=_loop_rate(module.ceiling_bf16_dot, threads, seconds),
        int8_dot=_loop_rate(module.ceiling_int8_dot, threads, seconds),
        read=_read_rate(module.ceiling_read, threads),
        how=f"{threads} threads: multiply-adds in registers at level {module.isa()}; "
        f"sum over {READ_BYTES >> 20} MiB",
    )


def _loop_rate(loop: Callable[[int, int], float], threads: int, seconds: float) -> float | None:
    rounds = 10_000
    if loop(rounds, threads) == 0:
        return None
    while True:  # as many rounds as take `seconds`
        begin = time.perf_counter()
        loop(rounds, threads)
        spent_s = time.perf_counter() - begin
        if spent_s >= seconds:
            break
        rounds = int(rounds * min(10.0, 1.2 * seconds / max(spent_s, 1e-6))) + 1
    best = 0.0
    for _ in range(TRIES):
        begin = time.perf_counter()
        operations = loop(rounds, threads)
        best = max(best, operations / (time.perf_counter() - begin) / 1e9)
    return best


def _read_rate(read: Callable[[int, int, int, int], float], threads: int) -> float:
    data = torch.ones(READ_BYTES // 4, dtype=torch.float32)
    best = 0.0
    for _ in range(TRIES):
        for streams in (1, 2, 4, 8):
            begin = time.perf_counter()
            read(data.data_ptr(), data.numel(), streams, threads)
            best = max(best, READ_BYTES / (time.perf_counter() - begin) / 1e9)
    return best


def _measure_cuda(device: str) -> Ceilings:
    """Square products by torch (cuBLAS) and a copy by torch; n is past the knee of both."""
    n = 8192
    watch = Stopwatch(device)

    def best_rate(function: Callable[[], object], amount: float) -> float:
        function()
        return amount / min(watch.sample_us(function, 10) for _ in range(TRIES)) / 1e3

    def product(dtype: torch.dtype) -> float:
        a = torch.randn(n, n, device=device).to(dtype)
        return best_rate(lambda: a @ a, 2.0 * n**3)

    a = torch.randint(-128, 127, (n, n), device=device, dtype=torch.int8)
    source = torch.empty(4 * READ_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        fma=product(torch.float32),
        bf16_dot=product(torch.bfloat16),
        int8_dot=best_rate(lambda: torch._int_mm(a, a.t()), 2.0 * n**3),
        read=best_rate(lambda: target.copy_(source), 2.0 * source.numel()),
        how=f"torch's products of {n} x {n} matrices and copy of {source.numel() >> 20} MiB",
    )
