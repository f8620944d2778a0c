"""Linear layers on a GPU against cuBLAS: 4-bit weights, and low-rank updates; a table, a JSON file.

    python -m tilewright.bench.gpu_linear DIR [--budget S] [--seconds S] [--dry-run]

Layers with few rows are timed as a CUDA graph over several layers whose weights together displace
the cache, as the layers of a model do, and show GB/s of what the formula has to read; the others
show TFLOP/s (forward 2 T I O, with backward to x twice that, the update counted as well). Variants
are interleaved on the same inputs; every time is that of one layer, a median with its 20 % and 80 %
quantiles. Each case first shows that ours agrees with torch on it. Cases that no time was left for
are listed.

Axes: T tokens, I in, O out, R rank, G inputs that share a scale.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F

from tilewright.bench import ceilings as machine
from tilewright.bench import on_gpu, report
from tilewright.bench.timing import Times, first_line, time_interleaved
from tilewright.ops import PackedWeight, fused_linear, lora_linear
from tilewright.ops.common.packed import (
    FORMATS,
    code_values,
    decode,
    pack_codes,
    pack_rows,
    unpack_codes,
    unpack_rows,
)

OURS = "tilewright"
DTYPE = torch.bfloat16
COLD_BYTES = 512 * 2**20  # packed weights of all layers of a case: ten times an H100's cache
FEW_ROWS = 64


def _frozen(T, format, G, I=4096, O=14336):
    return {"T": T, "I": I, "O": O, "R": 0, "format": format, "G": G, "mode": "fwd"}


def _trained(T, format="dense", G=0, dropout_p=0.0, R=16):
    return {"T": T, "I": 4096, "O": 4096, "R": R, "format": format, "G": G, "mode": "fwd+bwd",
            "dropout_p": dropout_p}  # fmt: skip


# most telling first
CASES = {
    "nf4-1-row": _frozen(1, "nf4", 64),
    "int4-1-row": _frozen(1, "int4", 128),
    "nf4-2048-rows": _frozen(2048, "nf4", 64),
    "lora-2k": _trained(2048),
    "qlora-2k": _trained(2048, "nf4", 64),
    "nf4-16-rows": _frozen(16, "nf4", 64),
    "int4-16-rows": _frozen(16, "int4", 128),
    "lora-8k-dropout": _trained(8192, dropout_p=0.1),
    "qlora-8k-dropout": _trained(8192, "nf4", 64, dropout_p=0.1),
    "nf4-64-rows": _frozen(64, "nf4", 64),
    "int4-64-rows": _frozen(64, "int4", 128),
    "nf4-256-rows": _frozen(256, "nf4", 64),
    "int4-256-rows": _frozen(256, "int4", 128),
    "int4-2048-rows": _frozen(2048, "int4", 128),
    "int4-2048-rows-int8": {**_frozen(2048, "int4", 128), "int8_activations": True},
    "fp8-1-row": _frozen(1, "fp8", 128),
    "lora-2k-rank-256": _trained(2048, R=256),
}


def small(case: dict) -> dict:
    """The same features where a CPU can follow."""
    return {**case, "T": min(case["T"], 32), "I": 256, "O": 128, "R": min(case["R"], 4)}


def weight_bytes(case: dict) -> float:
    if case["format"] == "dense":
        return case["I"] * case["O"] * float(DTYPE.itemsize)
    groups = case["I"] // case["G"]
    return case["O"] * (case["I"] * FORMATS[case["format"]].bits / 8 + 2.0 * groups)


def make_weight(case: dict, device: str, generator) -> torch.Tensor | PackedWeight:
    """(O, I) with rows of about unit length; scales are float16."""
    shape = case["O"], case["I"]
    if case["format"] == "dense":
        weight = torch.randn(shape, generator=generator, device=device)
        return (weight / case["I"] ** 0.5).to(DTYPE)
    format = FORMATS[case["format"]]
    if format.bits == 4:
        codes = torch.randint(0, 16, shape, generator=generator, device=device).to(torch.uint8)
    else:
        codes = torch.randn(shape, generator=generator, device=device).to(torch.float8_e4m3fn)
        codes = codes.view(torch.uint8)
    spread = code_values(codes[:64], case["format"]).std().item() * case["I"] ** 0.5
    scales = torch.full((case["O"], case["I"] // case["G"]), 1 / spread, device=device)
    return PackedWeight(
        case["format"], *shape, case["G"], pack_codes(codes, case["format"]),
        pack_rows(scales.half()),
    )  # fmt: skip


def make_inputs(case: dict, device: str) -> dict:
    """x, and for each layer its weight; with R, down and up of one layer."""
    generator = torch.Generator(device).manual_seed(0)
    n_layers = 1
    if case["T"] <= FEW_ROWS and device == "cuda":
        # so many that even the packed weights, the smallest, displace the cache
        n_layers = max(2, round(COLD_BYTES / weight_bytes(case)))
    inputs = {
        "x": torch.randn(case["T"], case["I"], generator=generator, device=device).to(DTYPE),
        "weights": [make_weight(case, device, generator) for _ in range(n_layers)],
    }
    if case["R"]:
        for name, shape in (("down", (case["R"], case["I"])), ("up", (case["O"], case["R"]))):
            t = torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5
            inputs[name] = t.to(DTYPE)
    return inputs


def work(case: dict) -> tuple[float, float]:
    """(operations, bytes) of one layer: what the formula needs; bytes count each tensor once."""
    T, I, O, R = (case[axis] for axis in "TIOR")
    passes = 2.0 if case["mode"] == "fwd+bwd" else 1.0
    # the update's two products, and in the backward the two to x and the two to down and up
    operations = 2.0 * T * I * O * passes + 2.0 * T * R * (I + O) * (3.0 if passes == 2 else 1.0)
    n_bytes = passes * (weight_bytes(case) + DTYPE.itemsize * (T * (I + O) + R * (I + O)))
    return operations, n_bytes


class Layer:
    """What torch needs to do the work of one layer: the codes as rows of bytes, or the weight."""

    def __init__(self, case: dict, weight: torch.Tensor | PackedWeight):
        self.case = case
        if isinstance(weight, torch.Tensor):
            self.dense = weight
            return
        self.dense = decode(weight).to(DTYPE)
        codes = unpack_codes(weight.codes, weight.format, weight.out_features, weight.in_features)
        if FORMATS[weight.format].bits == 4:
            codes = codes[:, 1::2] << 4 | codes[:, ::2]
        self.codes = codes.contiguous()
        self.scales = unpack_rows(weight.scales, weight.out_features).contiguous()
        if FORMATS[weight.format].bits == 4:
            one = code_values(torch.arange(16, dtype=torch.uint8), weight.format)
            byte = torch.arange(256)
            table = torch.stack([one[byte & 15], one[byte >> 4]], 1)
        else:
            table = code_values(torch.arange(256, dtype=torch.uint8), weight.format)[:, None]
        self.table = table.to(weight.codes.device)


def _dequantize(codes, scales, table):
    """Codes as rows of bytes -> (O, I) bfloat16; torch.compile makes one kernel of it."""
    values = table[codes.int()].flatten(1).view(codes.shape[0], scales.shape[1], -1)
    return (values * scales.float()[..., None]).to(DTYPE).flatten(1)


class _DequantizedLinear(torch.autograd.Function):
    """x W^T with W decoded again for the backward, as training over 4-bit weights does."""

    @staticmethod
    def forward(ctx, x, layer, dequantize):
        ctx.layer, ctx.dequantize = layer, dequantize
        return x @ dequantize(layer.codes, layer.scales, layer.table).T

    @staticmethod
    def backward(ctx, dy):
        layer = ctx.layer
        return dy @ ctx.dequantize(layer.codes, layer.scales, layer.table), None, None


def _ours(case: dict, t: dict) -> Callable:
    if case["R"]:
        seed = torch.tensor([1]) if case.get("dropout_p") else None
        return lambda x, weight: lora_linear(
            x, weight, t["down"], t["up"], scale=2.0, dropout_p=case.get("dropout_p", 0.0),
            dropout_seed=seed,
        )  # fmt: skip
    eight_bits = case.get("int8_activations", False)
    return lambda x, weight: fused_linear(x, weight, int8_activations=eight_bits)


def _with_update(base: Callable, case: dict, t: dict) -> Callable:
    """The base product of torch, and the update in products of its own."""
    if not case["R"]:
        return base
    p = case.get("dropout_p", 0.0)

    def run(x, layer):
        dropped = F.dropout(x, p) if p else x
        return base(x, layer) + 2.0 * F.linear(F.linear(dropped, t["down"]), t["up"])

    return run


def _int4_of_torch(case: dict, layers: list[Layer]) -> Callable:
    """torch's own int4 product, over codes it has packed beforehand."""
    packed = {}
    for layer in layers:
        # it wants even inputs in the upper half of a byte
        codes = (layer.codes << 4 | layer.codes >> 4).contiguous()
        scales = layer.scales.to(DTYPE)
        both = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
        packed[layer] = torch.ops.aten._convert_weight_to_int4pack(codes, 8), both
    return lambda x, layer: torch.ops.aten._weight_int4pack_mm(
        x, packed[layer][0], case["G"], packed[layer][1]
    )


def variants(case: dict, inputs: dict, device: str) -> dict[str, Callable | str]:
    """What is timed, by name: one call does all layers. A string is why a variant cannot be."""
    layers = [Layer(case, weight) for weight in inputs["weights"]]
    runs: dict[str, tuple[Callable, list] | str] = {
        OURS: (_ours(case, inputs), inputs["weights"]),
        "torch bf16": (
            _with_update(lambda x, layer: F.linear(x, layer.dense), case, inputs),
            layers,
        ),
    }
    if case["format"] != "dense":
        compiled = device == "cuda"
        dequantize = torch.compile(_dequantize, dynamic=False) if compiled else _dequantize
        base = _with_update(
            lambda x, layer: _DequantizedLinear.apply(x, layer, dequantize), case, inputs
        )
        runs["dequantize + torch bf16"] = (base, layers)
    if case["format"] == "int4" and not case["R"]:
        try:
            runs["torch int4"] = (_int4_of_torch(case, layers), layers)
        except Exception as error:  # a baseline that this torch lacks is a row of the table
            runs["torch int4"] = first_line(error)
    functions: dict[str, Callable | str] = {}
    for name, entry in runs.items():
        if isinstance(entry, str):
            functions[name] = entry
            continue
        function = _pass_of(*entry, case, inputs)
        try:
            replay = case["T"] <= FEW_ROWS and device == "cuda"
            functions[name] = on_gpu.replayed(function) if replay else function
        except Exception as error:
            functions[name] = first_line(error)
    return functions


def _pass_of(run: Callable, layers: list, case: dict, t: dict) -> Callable:
    """All layers once; with backward, to x, down and up."""
    if case["mode"] == "fwd":

        def forward():
            with torch.no_grad():
                for layer in layers:
                    y = run(t["x"], layer)
            return y

        return forward
    leaves = [t[name].requires_grad_() for name in ("x", "down", "up")]
    upstream = torch.randn(case["T"], case["O"], device=t["x"].device).to(DTYPE)
    return lambda: torch.autograd.grad(run(t["x"], layers[0]), leaves, upstream)


def disagreement(case: dict, t: dict) -> float:
    """Largest difference from float32 over the decoded weight, over the largest value, on some
    rows; of the gradient of x as well where the case has one. Without dropout, which has its own
    test."""
    case = {**case, "dropout_p": 0.0}
    rows, weight = slice(0, 128), t["weights"][0]
    x = t["x"][rows].detach().clone().requires_grad_()
    dense = (decode(weight) if isinstance(weight, PackedWeight) else weight).float()
    x32 = x.detach().float().requires_grad_()
    wanted = x32 @ dense.T
    if case["R"]:
        wanted = wanted + 2.0 * (x32 @ t["down"].float().T) @ t["up"].float().T
    got = _ours(case, t)(x, weight)
    found = [(got, wanted)]
    if case["mode"] == "fwd+bwd":
        upstream = torch.randn_like(wanted)
        found.append(
            (torch.autograd.grad(got, x, upstream.to(DTYPE))[0],
             torch.autograd.grad(wanted, x32, upstream.to(DTYPE).float())[0])
        )  # fmt: skip
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in found)


def measure(name: str, case: dict, device: str, seconds: float) -> list[dict]:
    """The rows of one case. RuntimeError: ours disagrees with torch."""
    inputs = make_inputs(case, device)
    difference = disagreement(case, inputs)
    limit = 0.05 if case.get("int8_activations") else 0.02  # bfloat16 has 2**-8; NaN is wrong
    if not difference <= limit:
        raise RuntimeError(
            f"{name}: ours is off torch's float32 by {difference:.2e} of the largest, need {limit}"
        )
    functions = variants(case, inputs, device)
    times: dict[str, Times | str] = {n: f for n, f in functions.items() if isinstance(f, str)}
    times |= time_interleaved(
        {n: f for n, f in functions.items() if not isinstance(f, str)},
        device=device, seconds=seconds,
    )  # fmt: skip
    n_layers = len(inputs["weights"])
    ours = times[OURS]
    operations, n_bytes = work(case)
    rows = []
    for variant in functions:
        result = times[variant]
        timed = None if isinstance(result, str) else _of_one(result, n_layers)
        rows.append(
            {
                "case": name, "shape": case, "mode": case["mode"], "variant": variant,
                "layers": n_layers, "times": timed and asdict(timed),
                "why_not": "" if timed else result,
                "tflops": timed and operations / timed.median_us / 1e6,
                "gbps": timed and n_bytes / timed.median_us / 1e3,
                "ours_over": timed and not isinstance(ours, str)
                and timed.median_us * n_layers / ours.median_us,
                "difference": difference,
            }
        )  # fmt: skip
    return rows


def _of_one(times: Times, n: int) -> Times:
    return Times(times.median_us / n, times.q20_us / n, times.q80_us / n, times.samples)


TABLE_HEAD = (
    "| case | mode | variant | us, median (20 % - 80 %) | TFLOP/s | GB/s | its time / ours |\n"
    "|---|---|---|---|---|---|---|"
)


def table_line(row: dict) -> str:
    head = f"| {row['case']} | {row['mode']} | {row['variant']} |"
    if row["times"] is None:
        return f"{head} {row['why_not']} | | | |"
    t = row["times"]
    ratio = "" if row["ours_over"] is None else f"{row['ours_over']:.2f}"
    return (
        f"{head} {t['median_us']:.1f} ({t['q20_us']:.1f}-{t['q80_us']:.1f}) | "
        f"{row['tflops']:.1f} | {row['gbps']:.0f} | {ratio} |"
    )


def steps(device: str):
    for name, full_case in CASES.items():
        case = small(full_case) if device == "cpu" else full_case

        def step(seconds, limits, name=name, case=case):
            return measure(name, case, device, seconds), ""

        yield name, step


def shown(rows: list[dict], where: dict, limits: machine.Ceilings) -> tuple[dict, list[str]]:
    lines = [report.header("linear", where, limits), TABLE_HEAD, *map(table_line, rows)]
    return {"environment": where, "rows": rows}, lines


def main(argv: list[str] | None = None) -> int:
    return on_gpu.run(
        argv, name="linear", doc=__doc__, budget=110.0, seconds=0.5,
        options={"dtype": str(DTYPE).removeprefix("torch.")}, steps=steps, shown=shown,
        has_failed=on_gpu.is_ours_without_time,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
