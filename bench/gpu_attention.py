"""Attention on a GPU against torch's cuDNN and flash kernels: one table, one JSON file.

    python -m tilewright.bench.gpu_attention DIR [--seconds S] [--dry-run]

Training shapes show TFLOP/s of the visible pairs (forward 4 D, with backward 14 D operations a
pair, whatever an implementation really does), decoding shapes GB/s of the cache. Variants are
interleaved on the same inputs; every time is a median with its 20 % and 80 % quantiles. Each case
first shows that ours agrees with torch on it. Both files are written after each case. They list the
cases that no time was left for, and what became of the prediction in kernels/attention/README.md.

Axes: B batch rows, L queries and keys, H query heads, Hkv key/value heads, D head width, G group
size of shifted segments, S cached keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tilewright
from tilewright.bench import ceilings as machine
from tilewright.bench import on_gpu, report
from tilewright.bench.bench_attention import visible_pairs
from tilewright.bench.timing import Times, first_line, time_interleaved

OURS = "tilewright"
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
DTYPE = torch.bfloat16


def _dense(B, L, H, D, is_causal, Hkv=None):
    return {"B": B, "L": L, "H": H, "Hkv": Hkv or H, "D": D, "is_causal": is_causal}


def _decode(B, S, H, Hkv, page=0):
    return {"B": B, "S": S, "H": H, "Hkv": Hkv, "D": 128, "page": page}


# 16k tokens and 2048 columns of q throughout, as published figures have; most telling first
CASES = {
    "causal-8k-d128": _dense(2, 8192, 16, 128, True),
    "shifted-8k-g2k-d128": {**_dense(2, 8192, 16, 128, True), "G": 2048},
    "decode-b8-8k-gqa4": _decode(8, 8192, 32, 8),
    "causal-16k-d128": _dense(1, 16384, 16, 128, True),
    "full-8k-d128": _dense(2, 8192, 16, 128, False),
    "causal-8k-d64": _dense(2, 8192, 32, 64, True),
    "causal-2k-d128": _dense(8, 2048, 16, 128, True),
    "causal-8k-d128-gqa4": _dense(2, 8192, 32, 128, True, Hkv=8),
    "shifted-32k-g8k-d128": {**_dense(1, 32768, 16, 128, True), "G": 8192},
    "decode-b1-32k-gqa4": _decode(1, 32768, 32, 8),
    "decode-b8-8k-gqa4-pages16": _decode(8, 8192, 32, 8, page=16),
    "decode-b64-4k-gqa4": _decode(64, 4096, 32, 8),
    "decode-b8-8k-mha": _decode(8, 8192, 32, 32),
    "causal-8k-d256": _dense(2, 8192, 8, 256, True),
    # last, since torch compiles it for many seconds
    "causal-8k-d128-flex": {**_dense(2, 8192, 16, 128, True), "flex": True},
}

# kernels/attention/README.md: forward, D 128, causal, 8192 tokens and more, on an H200
PREDICTED_TFLOPS = 450.0


def is_predicted(case: dict, mode: str) -> bool:
    return (
        mode == "fwd" and case.get("is_causal", False) and not case.get("G")
        and case["D"] == 128 and case["L"] >= 8192
    )  # fmt: skip


def outcome_of_prediction(rows: list[dict]) -> str:
    """What was measured of ours where there is a prediction, in one line."""
    found = {
        row["case"]: row["tflops"] for row in rows
        if row["variant"] == OURS and row["times"] and is_predicted(row["shape"], row["mode"])
    }  # fmt: skip
    words = (
        "Predicted for an H200: forward, D 128, causal, 8192 tokens and more, at least "
        f"{PREDICTED_TFLOPS:.0f} TFLOP/s."
    )
    if not found:
        return f"{words} Not measured here."
    verdict = "holds" if min(found.values()) >= PREDICTED_TFLOPS else "does not hold"
    measured = ", ".join(f"{name} {tflops:.0f}" for name, tflops in found.items())
    return f"{words} Measured: {measured} TFLOP/s; it {verdict}."


def small(case: dict) -> dict:
    """The same features where a CPU can follow."""
    sizes = {"B": min(case["B"], 2), "H": min(case["H"], 4), "D": 16}
    sizes["Hkv"] = 4 if case["Hkv"] == case["H"] else 1
    sizes |= {"S": 64} if "S" in case else {"L": 64}
    return {**case, **sizes, **({"G": 32} if "G" in case else {})}


def make_inputs(case: dict, device: str) -> dict[str, torch.Tensor]:
    """q (B, L, H, D), k and v (B, L, Hkv, D); for decoding (B, 1, H, D) and (B, S, Hkv, D)."""
    generator = torch.Generator(device).manual_seed(0)
    rows, heads, kv_heads, width = (case[axis] for axis in ("B", "H", "Hkv", "D"))

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(DTYPE)

    n_queries, n_keys = (1, case["S"]) if "S" in case else (case["L"], case["L"])
    return {
        "q": normal(rows, n_queries, heads, width),
        "k": normal(rows, n_keys, kv_heads, width),
        "v": normal(rows, n_keys, kv_heads, width),
    }


def work(case: dict, mode: str) -> tuple[float, float]:
    """(operations, bytes): see the head of this file; bytes count each tensor once."""
    rows, heads, kv_heads, width = (case[axis] for axis in ("B", "H", "Hkv", "D"))
    itemsize = DTYPE.itemsize
    if "S" in case:
        operations = 4.0 * width * rows * heads * case["S"]
        return operations, itemsize * rows * width * 2.0 * (heads + kv_heads * case["S"])
    factor = 14.0 if mode == "fwd+bwd" else 4.0
    tensors = (6.0 if mode == "fwd+bwd" else 2.0) * (heads + kv_heads)
    return factor * width * visible_pairs(case), itemsize * rows * case["L"] * width * tensors


def _ours(case: dict, device: str) -> Callable:
    if "S" not in case:
        segments = tilewright.ShiftedSegments(case["G"]) if case.get("G") else None
        return lambda q, k, v: tilewright.flash_attention(
            q, k, v, is_causal=case["is_causal"], segments=segments
        )
    lengths = torch.full((case["B"],), case["S"], dtype=torch.int32, device=device)
    if not case["page"]:
        return lambda q, k, v: tilewright.flash_decode(q, k, v, key_lengths=lengths)
    page, pages_of_a_row = case["page"], case["S"] // case["page"]
    n_pages = case["B"] * pages_of_a_row
    order = torch.randperm(n_pages, generator=torch.Generator().manual_seed(0)).to(device)
    # page n of the rows in a line lies at order[n]
    table = order.view(case["B"], pages_of_a_row).int()
    kept: dict = {}

    def in_pages(t):
        if t.data_ptr() not in kept:
            pages = torch.empty_like(t).view(n_pages, page, *t.shape[2:])
            pages[order] = t.view(pages.shape)
            kept[t.data_ptr()] = pages
        return kept[t.data_ptr()]

    return lambda q, k, v: tilewright.flash_decode(
        q, in_pages(k), in_pages(v), key_lengths=lengths, page_table=table
    )


def _stock(case: dict, backend: SDPBackend | None) -> Callable:
    """torch's own, in the layout (B, L, H, D) that models hold; None: whatever torch picks."""
    rule = {
        "is_causal": case.get("is_causal", False),
        "enable_gqa": case["H"] != case["Hkv"],
    }

    def run(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, **rule).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **rule).transpose(1, 2)

    return run


def _flex(case: dict, device: str) -> Callable:
    """torch's FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b, h, i, j):
        return i >= j

    blocks = create_block_mask(causal, None, None, case["L"], case["L"], device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2)

    return run


def _with_backward(run: Callable, inputs: dict) -> Callable:
    leaves = [t.detach().requires_grad_() for t in inputs.values()]
    with torch.no_grad():
        upstream = torch.randn_like(inputs["q"])
    return lambda: torch.autograd.grad(run(*leaves), leaves, upstream)


def _forward(run: Callable, inputs: dict) -> Callable:
    def function():
        with torch.no_grad():
            return run(*inputs.values())

    return function


def disagreement(case: dict, inputs: dict, ours: Callable) -> float:
    """Largest difference from torch in float32, over the largest value, on a slice of the rows."""
    q, k, v = (t[:1].float() for t in inputs.values())
    last = min(q.shape[1], 512)  # the last queries, which see the most
    repeats = case["H"] // case["Hkv"]
    scores = torch.einsum("bihd,bjhd->bhij", q[:, -last:], k.repeat_interleave(repeats, 2)) * (
        case["D"] ** -0.5
    )
    i = torch.arange(k.shape[1] - last, k.shape[1], device=q.device)[:, None]
    j = torch.arange(k.shape[1], device=q.device)[None, :]
    visible = torch.ones_like(scores, dtype=torch.bool)
    if case.get("is_causal"):
        visible &= j <= i
    if case.get("G"):
        shift = torch.zeros(case["H"], device=q.device, dtype=torch.long)
        shift[(case["H"] + 1) // 2 :] = case["G"] // 2
        shift = shift[:, None, None]
        visible &= (i + shift) // case["G"] == (j + shift) // case["G"]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    truth = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(repeats, 2))
    got = ours(*inputs.values())[:1, -last:].float()
    return ((got - truth).abs().max() / truth.abs().max()).item()


def variants(case: dict, mode: str, inputs: dict, device: str) -> dict[str, Callable | str]:
    """What is timed, by name; a string is the reason why a variant cannot be."""
    runs: dict[str, Callable] = {OURS: _ours(case, device)}
    if not (case.get("G") or case.get("page") or case.get("flex")):
        backends = BACKENDS if device == "cuda" else {"sdpa": None}
        runs |= {f"torch {name}": _stock(case, backend) for name, backend in backends.items()}
    if case.get("flex") and device == "cuda":
        runs["torch flex"] = _flex(case, device)
    if case.get("G"):
        runs[f"{OURS}, dense"] = _ours({**case, "G": 0}, device)
    wrap = _with_backward if mode == "fwd+bwd" else _forward
    eager = {name: wrap(run, inputs) for name, run in runs.items()}
    functions: dict[str, Callable | str] = {**eager}
    if "S" in case and device == "cuda":  # a step of a few microseconds: also without launching
        for name, function in eager.items():
            try:
                functions[f"{name}, graph"] = on_gpu.replayed(function)
            except Exception as error:  # a baseline that cannot be captured is a row of the table
                functions[f"{name}, graph"] = first_line(error)
    return functions


def table_line(row: dict) -> str:
    head = f"| {row['case']} | {row['mode']} | {row['variant']} |"
    if row["times"] is None:
        return f"{head} {row['why_not']} | | | |"
    t = row["times"]
    ratio = "" if row["ours_over"] is None else f"{row['ours_over']:.2f}"
    return (
        f"{head} {t['median_us']:.0f} ({t['q20_us']:.0f}-{t['q80_us']:.0f}) | "
        f"{row['tflops']:.0f} | {row['gbps']:.0f} | {ratio} |"
    )


TABLE_HEAD = (
    "| case | mode | variant | us, median (20 % - 80 %) | TFLOP/s | GB/s | its time / ours |\n"
    "|---|---|---|---|---|---|---|"
)


def measure(name: str, case: dict, mode: str, device: str, seconds: float) -> list[dict]:
    """The rows of one case. RuntimeError: ours disagrees with torch."""
    inputs = make_inputs(case, device)
    difference = disagreement(case, inputs, _forward_only(case, device))
    if not difference <= 0.02:  # bfloat16 has 2**-8; NaN is wrong
        raise RuntimeError(
            f"{name}: ours is off torch's float32 by {difference:.2e} of the largest"
        )
    functions = variants(case, mode, inputs, device)
    times: dict[str, Times | str] = {n: f for n, f in functions.items() if isinstance(f, str)}
    times |= time_interleaved(
        {n: f for n, f in functions.items() if not isinstance(f, str)},
        device=device, seconds=seconds,
    )  # fmt: skip
    ours = times[OURS]
    rows = []
    for variant in functions:
        result = times[variant]
        dense = {**case, "G": 0} if variant == f"{OURS}, dense" else case
        operations, n_bytes = work(dense, mode)
        timed = None if isinstance(result, str) else result
        rows.append(
            {
                "case": name, "shape": case, "mode": mode, "variant": variant,
                "times": timed and asdict(timed), "why_not": "" if timed else result,
                "tflops": timed and operations / timed.median_us / 1e6,
                "gbps": timed and n_bytes / timed.median_us / 1e3,
                "ours_over": timed and not isinstance(ours, str)
                and timed.median_us / ours.median_us,
                "difference": difference,
            }
        )  # fmt: skip
    return rows


def _forward_only(case: dict, device: str) -> Callable:
    run = _ours(case, device)

    def forward(*tensors):
        with torch.no_grad():
            return run(*tensors)

    return forward


def steps(device: str):
    for name, full_case in CASES.items():
        case = small(full_case) if device == "cpu" else full_case
        for mode in ("fwd",) if "S" in case else ("fwd", "fwd+bwd"):

            def step(seconds, limits, name=name, case=case, mode=mode):
                return measure(name, case, mode, device, seconds), ""

            yield f"{name} {mode}", step


def shown(rows: list[dict], where: dict, limits: machine.Ceilings) -> tuple[dict, list[str]]:
    prediction = outcome_of_prediction(rows)
    lines = [report.header("attention", where, limits), TABLE_HEAD, *map(table_line, rows)]
    record = {"environment": where, "rows": rows, "prediction": prediction}
    return record, [*lines, f"\n{prediction}"]


def main(argv: list[str] | None = None) -> int:
    return on_gpu.run(
        argv, name="attention", doc=__doc__, budget=170.0, seconds=0.6,
        options={"dtype": str(DTYPE).removeprefix("torch.")}, steps=steps, shown=shown,
        has_failed=on_gpu.is_ours_without_time,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
