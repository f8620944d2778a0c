"""Linear layers: packed weights at decoding, prefill and training sizes, and low-rank updates.

Axes: T tokens, I in, O out, R rank of the update, 0 for none. `format` is how the weight is kept:
"dense", or packed by the room quant in groups of 64, with int8 one scale a row. `outs` are the
outputs of several layers over one x, O together: their weights, downs and ups stand one below the
other, and every variant hands back their results side by side in one tensor.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F

import tilewright
from tilewright.bench import peers_ggml
from tilewright.bench.variant import Variant
from tilewright.ops.common.packed import unpack_codes, unpack_rows
from tilewright.recording import Recording

GRADIENTS = ("x",)
UPDATED = ("x", "down", "up")  # of a case with an update

ONE = dict(dtypes=("bf16",), modes=("fwd",))
FORWARD = dict(dtypes=("bf16", "float32"), modes=("fwd",))
TRAINED = dict(dtypes=("bf16",), modes=("fwd", "fwd+bwd"))
SQUARE, WIDE = dict(I=4096, O=4096), dict(I=2048, O=5632)
QKV = dict(I=4096, O=6144, outs=(4096, 1024, 1024))
GATE_UP = dict(I=2048, O=11264, outs=(5632, 5632))

CASES = {
    "int4-1": dict(T=1, format="int4", **SQUARE, **FORWARD),
    "nf4-1": dict(T=1, format="nf4", **SQUARE, **FORWARD),
    "int8-1": dict(T=1, format="int8", **SQUARE, **ONE),
    "int4-1-wide": dict(T=1, format="int4", **WIDE, **ONE),
    "nf4-1-wide": dict(T=1, format="nf4", **WIDE, **ONE),
    "int4-16": dict(T=16, format="int4", **SQUARE, **ONE),
    "int4-1-int8-activations": dict(T=1, format="int4", a8=True, **SQUARE, **ONE),
    "int4-16-int8-activations": dict(T=16, format="int4", a8=True, **SQUARE, **ONE),
    "int4-128": dict(T=128, format="int4", **SQUARE, **TRAINED),
    "nf4-512": dict(T=512, format="nf4", **SQUARE, **TRAINED),
    "int4-2k": dict(T=2048, format="int4", **SQUARE, **TRAINED),
    "nf4-2k": dict(T=2048, format="nf4", **SQUARE, **TRAINED),
    "int4-128-int8-activations": dict(T=128, format="int4", a8=True, **SQUARE, **ONE),
    "int4-2k-int8-activations": dict(T=2048, format="int4", a8=True, **SQUARE, **ONE),
    "int8-128-int8-activations": dict(T=128, format="int8", a8=True, **SQUARE, **ONE),
    "int8-2k-int8-activations": dict(T=2048, format="int8", a8=True, **SQUARE, **ONE),
    "lora-512-r8": dict(T=512, format="dense", R=8, gradients=UPDATED, **SQUARE, **TRAINED),
    "lora-512-r64": dict(T=512, format="dense", R=64, gradients=UPDATED, **SQUARE, **TRAINED),
    "lora-2k-r16": dict(T=2048, format="dense", R=16, gradients=UPDATED, **SQUARE, **TRAINED),
    "qlora-512-r16": dict(T=512, format="nf4", R=16, gradients=UPDATED, **SQUARE, **TRAINED),
    "qkv-1": dict(T=1, format="nf4", **QKV, **ONE),
    "qkv-16": dict(T=16, format="nf4", **QKV, **ONE),
    "qkv-512-lora": dict(T=512, format="dense", R=16, gradients=UPDATED, **QKV, **TRAINED),
    "qkv-512-qlora": dict(T=512, format="nf4", R=16, gradients=UPDATED, **QKV, **TRAINED),
    "gate-up-512-qlora": dict(T=512, format="nf4", R=16, gradients=UPDATED, **GATE_UP, **TRAINED),
}


@functools.lru_cache(maxsize=3)
def _packed(format: str, n_out: int, n_in: int, seed: int = 0):
    """The packed weight, and what it decodes to."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator) / n_in**0.5
    formats: dict[str, tilewright.Int4 | tilewright.Int8 | tilewright.NF4] = {
        "int4": tilewright.Int4(64, solver="minmax"),
        "nf4": tilewright.NF4(64),
        "int8": tilewright.Int8(),
    }
    packed = tilewright.quantize_weight(weight, formats[format])
    return packed, tilewright.dequantize_weight(packed, torch.float32)


@functools.lru_cache(maxsize=3)
def _packed_on(format: str, n_out: int, n_in: int, device: str, seed: int = 0):
    return _packed(format, n_out, n_in, seed)[0].to(device)


def _outs(case: dict) -> tuple[int, ...]:
    """The outputs of each layer."""
    return case.get("outs", (case["O"],))


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """x (T, I), weight (O, I) as it decodes, and with an update down (R, I), of each layer, and up
    (O, R)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    inputs = dict(x=normal(case["T"], case["I"]))
    if case["format"] == "dense":
        inputs["weight"] = (normal(case["O"], case["I"]) / case["I"] ** 0.5).to(dtype)
    else:
        decoded = [_packed(case["format"], o, case["I"], n)[1] for n, o in enumerate(_outs(case))]
        inputs["weight"] = torch.cat(decoded).to(device, dtype)
    if case.get("R"):
        rows = case["R"] * len(_outs(case))
        inputs["down"] = (normal(rows, case["I"]) / case["I"] ** 0.5).to(dtype)
        inputs["up"] = (normal(case["O"], case["R"]) / case["R"] ** 0.5).to(dtype)
    return inputs


def small(case: dict) -> dict:
    if "outs" in case:
        outs = tuple(o // 64 for o in case["outs"])
        return {**case, "T": min(case["T"], 40), "I": 256, "O": sum(outs), "outs": outs}
    return {**case, "T": min(case["T"], 40), "I": 256, "O": 192}


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: the product, in the backward that to x, and two small ones for the update, six in
    the backward. Bytes: x, y and the weight once, in the backward again with their gradients."""
    n_tokens, n_in, n_out, rank = case["T"], case["I"], case["O"], case.get("R", 0)
    passes = 2 if mode == "fwd+bwd" else 1
    narrow = (n_in * len(_outs(case)) + n_out) * rank
    operations = 2.0 * n_tokens * (n_in * n_out * passes + narrow * (2 * passes - 1))
    bits = {"dense": 8 * itemsize, "int8": 8, "int4": 4.5, "nf4": 4.5}[case["format"]]
    n_bytes = n_in * n_out * bits / 8 + itemsize * n_tokens * (n_in + n_out)
    return operations, passes * n_bytes


def multiplied(case: dict, dtype: torch.dtype) -> torch.dtype:
    return torch.int8 if case.get("a8") else dtype


def _weight(case: dict, weight):
    if case["format"] == "dense":
        return weight
    return _packed_on(case["format"], case["O"], case["I"], str(weight.device))


def _layers(case: dict, weight, down, up) -> list[tilewright.LinearLayer]:
    """The layers of a case with several."""
    outs, dense = _outs(case), case["format"] == "dense"
    downs = (None,) * len(outs) if down is None else down.split(case["R"])
    ups = (None,) * len(outs) if up is None else up.split(outs)
    return [
        tilewright.LinearLayer(
            w if dense else _packed_on(case["format"], len(w), case["I"], str(w.device), n),
            down=d, up=u, scale=2.0 if case.get("R") else 1.0,
        )
        for n, (w, d, u) in enumerate(zip(weight.split(outs), downs, ups, strict=True))
    ]  # fmt: skip


def ours(case: dict, x, weight, down=None, up=None, impl: str = "auto") -> torch.Tensor:
    """The layer by tilewright, (T, O)."""
    if "outs" in case:
        return torch.cat(tilewright.linear_group(x, _layers(case, weight, down, up), impl=impl), 1)
    return tilewright.fused_linear(
        x, _weight(case, weight), down=down, up=up, scale=2.0,
        int8_activations=case.get("a8", False), impl=impl,
    )  # fmt: skip


def recorded(case: dict, inputs: dict) -> dict:
    """The call as it is made within a recorded step of `tilewright.generate`: without Python."""
    x, calls = inputs["x"], Recording()
    if not x.is_cpu or x.requires_grad:
        raise NotImplementedError("calls are recorded on a CPU and without a gradient")
    with torch.no_grad():
        ours(case, **inputs)  # what a first call prepares
        with calls.on():
            calls.keep(inputs)
            y = ours(case, **inputs)
    return dict(calls=calls, y=y)


def again(case: dict, calls: Recording, y: torch.Tensor) -> torch.Tensor:
    calls()
    return y


def apart(case: dict, x, weight, down=None, up=None) -> torch.Tensor:
    """One call of ours for each of several layers."""
    return torch.cat(
        [
            tilewright.fused_linear(x, i.weight, down=i.down, up=i.up, scale=i.scale)
            for i in _layers(case, weight, down, up)
        ],
        1,
    )


def truth(case: dict, x, weight, down=None, up=None) -> torch.Tensor:
    return ours(case, x, weight, down, up, impl="reference")


def stock(case: dict, x, weight, down=None, up=None) -> torch.Tensor:
    """torch's linear on the decoded weight: the yardstick of errors, and what PEFT computes."""
    if case.get("a8"):
        scale = x.float().abs().amax(1, keepdim=True) / 127
        x = ((x.float() / scale).round() * scale).to(x.dtype)
    if "outs" in case and down is not None:
        layers = zip(
            weight.split(case["outs"]), down.split(case["R"]), up.split(case["outs"]), strict=True
        )
        return torch.cat([F.linear(x, w) + 2.0 * F.linear(F.linear(x, d), u) for w, d, u in layers],
                         1)  # fmt: skip
    y = F.linear(x, weight)
    return y if down is None else y + 2.0 * F.linear(F.linear(x, down), up)


def dense_linear(case: dict, x, weight, down=None, up=None) -> torch.Tensor:
    """The frozen layer alone, without its update."""
    return F.linear(x, weight)


# --- torch's own packed products, and those of other libraries where they are installed ---


def _codes_and_scales(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the case's 4-bit weight: codes (O, I) 0 to 15, and scales (O, G)."""
    packed = _packed(case["format"], case["O"], case["I"])[0]
    codes = unpack_codes(packed.codes, packed.format, *packed.shape)
    return codes, unpack_rows(packed.scales, packed.out_features).float()


@functools.lru_cache(maxsize=2)
def _torch_int4(format: str, n_out: int, n_in: int):
    codes, scales = _codes_and_scales(dict(format=format, O=n_out, I=n_in))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    both = torch.stack([scales.T, torch.zeros_like(scales.T)], dim=-1)
    return packed, both.to(torch.bfloat16).contiguous()


def torch_int4(case: dict, x, weight, down=None, up=None) -> torch.Tensor:
    packed, scales = _torch_int4(case["format"], case["O"], case["I"])
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, scales.to(x.dtype))


@functools.lru_cache(maxsize=2)
def _torch_int8(format: str, n_out: int, n_in: int):
    """The weight in 8 bits with one scale a row, whatever its own format."""
    weight = _packed(format, n_out, n_in)[1]
    scale = weight.abs().amax(1) / 127
    return (weight / scale[:, None]).round().to(torch.int8).T, scale


def torch_int_mm(case: dict, x, weight, down=None, up=None) -> torch.Tensor:
    """Rows of x rounded to 8 bits, torch's product of int8, and the scales."""
    codes, weight_scale = _torch_int8(case["format"], case["O"], case["I"])
    x32 = x.float()  # in bf16 the largest would become 128, which wraps around
    scale = x32.abs().amax(1, keepdim=True) / 127
    product = torch._int_mm((x32 / scale).round().to(torch.int8), codes)
    return (product * (scale * weight_scale)).to(x.dtype)


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


@functools.lru_cache(maxsize=2)
def _bitsandbytes_state(n_out: int, n_in: int):
    import bitsandbytes.functional as bnb

    weight = _packed("nf4", n_out, n_in)[1]
    return bnb.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4")


def bitsandbytes_nf4(case: dict, x, weight, down=None, up=None) -> torch.Tensor:
    import bitsandbytes as bnb

    codes, state = _bitsandbytes_state(case["O"], case["I"])
    return bnb.matmul_4bit(x, codes.t(), quant_state=state)


@functools.lru_cache(maxsize=2)
def _onnx_session(n_out: int, n_in: int, threads: int):
    """onnxruntime's MatMulNBits as a session of one node; level 4 rounds activations to 8 bits."""
    import onnx
    import onnxruntime

    helper, kinds = onnx.helper, onnx.TensorProto
    codes, scales = _codes_and_scales(dict(format="int4", O=n_out, I=n_in))
    pairs = (codes[:, 0::2] | codes[:, 1::2] << 4).view(n_out, n_in // 64, 32)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=n_in, N=n_out,
        bits=4, block_size=64, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "linear",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["T", n_in])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, ["T", n_out])],
        [onnx.numpy_helper.from_array(pairs.numpy(), "codes"),
         onnx.numpy_helper.from_array(scales.flatten().numpy(), "scales")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # its threads would go on spinning beside the others while those are timed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def onnx_int4(case: dict, x, weight, down=None, up=None) -> torch.Tensor:
    """Activations in 8 bits; float32 in and out."""
    session = _onnx_session(case["O"], case["I"], torch.get_num_threads())
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def ggml_product(case: dict, inputs: dict) -> dict:
    """The case's own codes in ggml's blocks, and x in float32."""
    kind, blocks = _ggml_blocks(case["format"], case["O"], case["I"])
    product = peers_ggml.Product(kind, blocks, inputs["x"], torch.get_num_threads())
    return dict(x=inputs["x"], product=product)


@functools.lru_cache(maxsize=2)
def _ggml_blocks(format: str, n_out: int, n_in: int) -> tuple[str, torch.Tensor]:
    return peers_ggml.blocks_of(_packed(format, n_out, n_in)[0])


def ggml(case: dict, x, product: peers_ggml.Product) -> torch.Tensor:
    """Activations in 8 bits; float32 in and out."""
    if x.requires_grad:
        raise NotImplementedError("ggml's CPU products have no gradient for a packed weight")
    return product()


def as_float(case: dict, inputs: dict) -> dict:
    return {**inputs, "x": inputs["x"].float()}


def _is(*formats: str, update: bool = False, a8: bool | None = None):
    def applies(case: dict) -> bool:
        return (
            case["format"] in formats
            and "outs" not in case
            and bool(case.get("R")) == update
            and (a8 is None or case.get("a8", False) == a8)
        )

    return applies


def _are_several(case: dict) -> bool:
    return "outs" in case


def _is_unfused(case: dict) -> bool:
    return bool(case.get("R")) and case["format"] in ("dense", "nf4")


def _is_decode(case: dict) -> bool:
    return case["T"] == 1 and not case.get("R") and "outs" not in case


def _onnx_applies(case: dict) -> bool:
    return _is("int4")(case) and _installed("onnxruntime", "onnx")


def _bitsandbytes_applies(case: dict) -> bool:
    return _is("nf4")(case) and _installed("bitsandbytes")


VARIANTS = {
    "tilewright": Variant(ours),
    "tilewright, recorded": Variant(again, prepare=recorded, applies=_is_decode),
    "tilewright, one by one": Variant(apart, applies=_are_several),
    "torch dense": Variant(dense_linear),
    "torch unfused": Variant(stock, applies=_is_unfused),
    "torch int4": Variant(torch_int4, applies=_is("int4")),
    "torch int_mm": Variant(torch_int_mm, applies=_is("int8", "int4", a8=True)),
    "bitsandbytes nf4": Variant(bitsandbytes_nf4, applies=_bitsandbytes_applies),
    "onnxruntime int4": Variant(onnx_int4, prepare=as_float, applies=_onnx_applies),
    "llama.cpp Q4_0": Variant(
        ggml, prepare=ggml_product, applies=_is("int4"), why_not=peers_ggml.why_not
    ),
    "llama.cpp Q8_0": Variant(
        ggml, prepare=ggml_product, applies=_is("int8"), why_not=peers_ggml.why_not
    ),
}
