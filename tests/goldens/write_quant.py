"""Write the quantized weights that tests/test_quant_*.py read, each by the tool that defines it.

    pip install --no-deps bitsandbytes==0.50.2 compressed-tensors==0.20.0 loguru gguf==0.19.0
    pip download --no-deps auto-gptq==0.7.1 autoawq==0.2.9     # unpack both, they need not install
    PYTHONPATH=UNPACKED_AUTO_GPTQ:UNPACKED_AUTOAWQ python tests/goldens/write_quant.py

Each file holds the tensors under the tool's own names and, beside them, the weight as the same tool
decodes it (`decoded`); those of bitsandbytes also hold what was quantized (`original`).
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parent


def write(name, tensors):
    plain = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    save_file(plain, FOLDER / name, metadata={"format": "pt"})


def submodule(package, path):
    """A module of a package whose own __init__ needs more than is installed."""
    if package not in sys.modules:
        parts = path.split(".")
        for depth in range(1, len(parts)):
            name = ".".join(parts[:depth])
            holder = types.ModuleType(name)
            if depth == 1:
                spec = importlib.util.find_spec(package)
                holder.__path__ = list(spec.submodule_search_locations)
            else:
                above = sys.modules[".".join(parts[: depth - 1])].__path__
                holder.__path__ = [f"{folder}/{parts[depth - 1]}" for folder in above]
            sys.modules[name] = holder
    return importlib.import_module(path)


def bitsandbytes_weights():
    import bitsandbytes.functional as bnb

    tensors = {}
    for code in ("nf4", "fp4"):
        for nested in (False, True):
            # bfloat16 scales add up without rounding, so that their mean is the same everywhere
            weight = (torch.randn(65, 128) * 0.02).to(torch.bfloat16)
            name = f"{code}-{'nested' if nested else 'plain'}"
            packed, state = bnb.quantize_4bit(
                weight, blocksize=32, compress_statistics=nested, quant_type=code
            )
            tensors[f"{name}.original"] = weight
            tensors[f"{name}.decoded"] = bnb.dequantize_4bit(packed, state)
            tensors[f"{name}.weight"] = packed
            for part, tensor in state.as_dict(packed=True).items():
                tensors[f"{name}.weight.{part}"] = tensor
    flat = torch.randn(7 * 63)
    flat[:64] = 0
    packed, state = bnb.quantize_4bit(flat, blocksize=64, quant_type="nf4")
    tensors["flat.original"], tensors["flat.codes"] = flat, packed
    tensors["flat.absmax"], tensors["flat.decoded"] = (
        state.absmax,
        bnb.dequantize_4bit(packed, state),
    )
    write("quant_bitsandbytes.safetensors", tensors)


def gptq_weights():
    module = submodule("auto_gptq", "auto_gptq.nn_modules.qlinear.qlinear_cuda")
    tensors = {}
    n_in, n_out, group = 128, 32, 32
    for name, bits, symmetric, spread in (
        ("sym", 4, True, False), ("asym", 4, False, False),
        ("act-order", 4, False, True), ("8-bit", 8, True, False),
    ):  # fmt: skip
        linear = torch.nn.Linear(n_in, n_out, bias=False)
        weight = torch.randn(n_out, n_in) * 0.02
        g_idx = torch.arange(n_in, dtype=torch.int32) // group
        if spread:
            g_idx = g_idx[torch.randperm(n_in)]
        parts = [weight[:, g_idx == g] for g in range(n_in // group)]
        largest, most = 2**bits - 1, torch.stack([p.abs().amax(1) for p in parts], 1)
        scales, zeros = 2 * most / largest, torch.full_like(most, (largest + 1) / 2)
        if not symmetric:
            low = torch.stack([p.amin(1) for p in parts], 1)
            scales = (torch.stack([p.amax(1) for p in parts], 1) - low) / largest
            zeros = (-low / scales).round()
        scales = scales.half().float()
        codes = ((weight / scales[:, g_idx]).round() + zeros[:, g_idx]).clamp(0, largest)
        linear.weight.data = (codes - zeros[:, g_idx]) * scales[:, g_idx]
        layer = module.QuantLinear(bits, group, n_in, n_out, False, weight_dtype=torch.float32)
        layer.pack(linear, scales, zeros, g_idx)
        layer.autogptq_cuda_available = False
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{name}.{part}"] = getattr(layer, part)
        tensors[f"{name}.scales"] = layer.scales.half()
        tensors[f"{name}.decoded"] = layer(torch.eye(n_in)).t()
    write("quant_gptq.safetensors", tensors)


def awq_weights():
    gemm = submodule("awq", "awq.modules.linear.gemm")
    packing = importlib.import_module("awq.utils.packing_utils")
    tensors = {}
    n_in, n_out, group = 128, 32, 32
    linear = torch.nn.Linear(n_in, n_out, bias=False)
    groups = (torch.randn(n_out, n_in) * 0.02).view(n_out, -1, group)
    low = groups.amin(-1)
    scales = ((groups.amax(-1) - low) / 15).half().float()
    zeros = (-low / scales).round()
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    linear.weight.data = ((codes - zeros[..., None]) * scales[..., None]).view(n_out, n_in)
    layer = gemm.WQLinear_GEMM.from_linear(
        linear, 4, group, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
    )
    for part in ("qweight", "qzeros", "scales"):
        tensors[f"layer.{part}"] = getattr(layer, part)
    decoded = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group)
    tensors["layer.decoded"] = decoded.t()
    write("quant_awq.safetensors", tensors)


def compressed_tensors_weights():
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors = {}
    for name, bits, symmetric, group, shape in (
        ("sym", 4, True, 32, (12, 96)), ("asym", 4, False, 32, (12, 96)),
        ("row", 4, True, None, (5, 83)), ("8-bit", 8, True, 32, (12, 96)),
    ):  # fmt: skip
        strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, type="int", **strategy)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = (torch.randn(shape) * 0.02).to(torch.bfloat16)
        parts = weight.view(shape[0], -1, group or shape[1])
        half = 2 ** (bits - 1)
        state = {"weight": weight, "weight_scale": parts.abs().amax(-1) / (half - 0.5)}
        if not symmetric:
            low, high = parts.amin(-1), parts.amax(-1)
            state["weight_scale"] = (high - low) / (2 * half - 1)
            zeros = -half - (low / state["weight_scale"]).round()
            state["weight_zero_point"] = zeros.clamp(-half, half - 1).to(torch.int8)
        packed = PackedQuantizationCompressor.compress(state, scheme)
        decoded = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        tensors |= {f"{name}.{part}": t for part, t in packed.items()}
        tensors[f"{name}.decoded"] = decoded
    write("quant_compressed_tensors.safetensors", tensors)


def gguf_file():
    import gguf

    draw = np.random.default_rng(0)
    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(FOLDER / "quant.gguf", "llama")
    decoded = {}
    for kind in (types.Q4_0, types.Q8_0):
        data = gguf.quantize(draw.standard_normal((5, 96), dtype=np.float32), kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        decoded[kind.name] = gguf.dequantize(data, kind)
    # the package cannot quantize Q4_K: any bytes are valid blocks, with two finite float16 first
    blocks = draw.integers(0, 256, (3, 2, 144), dtype=np.uint8)
    blocks[..., :4] = draw.uniform(0.001, 0.1, (3, 2, 2)).astype(np.float16).view(np.uint8)
    data = blocks.reshape(3, 288)
    writer.add_tensor("Q4_K", data, raw_dtype=types.Q4_K)
    decoded["Q4_K"] = gguf.dequantize(data, types.Q4_K)
    plain = draw.standard_normal(7, dtype=np.float32)
    decoded["norm"] = plain
    writer.add_tensor("norm", plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write("quant_gguf.safetensors", {k: torch.from_numpy(v) for k, v in decoded.items()})


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        bitsandbytes_weights()
        gptq_weights()
        awq_weights()
        compressed_tensors_weights()
        gguf_file()
