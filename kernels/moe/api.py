"""The public function of the experts' MLPs: docstring, checks, and the call into the operators."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tilewright import choose
from tilewright.ops.common.packed import ROWS, PackedWeight
from tilewright.ops.common.packed_check import expect_whole
from tilewright.ops.moe import op
from tilewright.ops.moe.problem import ALONE, GATED, Operands, Packing, Problem
from tilewright.shapes import expect_device, expect_dtype, expect_shapes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = (*GATED, *ALONE)
NAME = "moe_mlp"


class ExpertsLora(NamedTuple):
    """A low-rank update of one weight of all experts: W[e] + scale b[e] a[e].

    a       (E R, in) expert by expert, as PEFT's lora_A.weight for `target_parameters`; or
            (E, R, in)
    b       (out, R E) with the experts running fastest, as PEFT's lora_B.weight; or (E, out, R)
    scale   alpha / R, already divided
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0


def moe_mlp(
    x: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor | None,
    gate_up: torch.Tensor | PackedWeight,
    down: torch.Tensor | PackedWeight,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    gate_up_lora: ExpertsLora | None = None,
    down_lora: ExpertsLora | None = None,
    activation: str = "swiglu",
    alpha: float = 1.702,
    limit: float = 7.0,
    interleaved: bool = False,
    transposed: bool = False,
    scale_input: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Each token through the gated MLPs of its experts, weighted by its gates, as one operator.

        y[t] = sum_k g[t, k] (W2[e] a + b2[e]),  a = act(gate) up,  (gate, up) = W1[e] x[t] + b1[e]

    with e = ids[t, k]. Slots whose id is not 0 to E - 1 add nothing, and get no gradient.

    x              (T, H) or (..., H) activations; T may be 0
    ids            (T, K) or (..., K) int32 or int64, or without the last axis where K is 1
    gates          like ids, of any floating dtype; None for 1, as with forced routing
    gate_up        W1: (E, 2 I, H) in x.dtype, the I rows of the gates before those of up; or a
                   PackedWeight of shape (E 2 I, H), all experts one below the other, I a multiple
                   of 16, which gets no gradient
    down           W2: (E, H, I) in x.dtype; or a PackedWeight of shape (E H, I), H a multiple of 16
    gate_up_bias   b1: (E, 2 I)
    down_bias      b2: (E, H)
    gate_up_lora   ExpertsLora: W1[e] + scale b[e] a[e] takes the place of W1[e], and is not built;
                   a (E R, H) and b (2 I, R E), or (E, R, H) and (E, 2 I, R), of any dtype below
    down_lora      the same for W2, with I inputs and H outputs; the ranks may differ
    activation     "swiglu" (silu), "geglu" (gelu), "geglu_tanh" (gelu with tanh), "reglu" (relu),
                   or "clamped_swiglu": gate sigmoid(alpha gate) (up + 1), the gate at most `limit`
                   and up between -limit and limit, as in GPT-OSS; or without a gate, where I
                   stands for 2 I and a = act(W1[e] x[t] + b1[e]): "silu", "gelu", "gelu_tanh",
                   "relu"
    alpha, limit   of clamped_swiglu
    interleaved    rows of gate_up alternate: gate 0, up 0, gate 1, up 1, ..
    transposed     gate_up is (E, H, 2 I) and down (E, I, H)
    scale_input    a gate multiplies its expert's input instead of its output, as in Llama 4
    impl           "auto", "reference", "cpp_cpu" or "triton_gpu"

    Returns (..., H) in x.dtype: float32, bfloat16 or float16 (float64: reference only). Sums are
    float32; packed weights are decoded tile by tile, forward and backward, and never as a whole.
    The error against float64 is at most twice that of the expert by expert loop in torch in the
    same dtype. A token's outputs are added up in the order of its slots, without atomics: results
    are bitwise reproducible and do not depend on the number of threads. For the backward x, the
    products with gate_up, the gates and the order of rows are kept, nothing else; frozen weights
    cost no gradient, and experts without tokens get gradients of exactly 0.
    ValueError: a shape, dtype or value outside the above. RuntimeError: `impl` was named and
    cannot run here.

    Source: Shazeer et al., Outrageously Large Neural Networks, arXiv 1701.06538; Tan et al.,
    ScatterMoE, arXiv 2403.08245; Guo et al., SonicMoE, arXiv 2512.14080.
    """
    p, x2, ids2, gates2, o = _describe(
        x, ids, gates, gate_up, down, gate_up_bias=gate_up_bias, down_bias=down_bias,
        gate_up_lora=gate_up_lora, down_lora=down_lora, activation=activation, alpha=alpha,
        limit=limit, interleaved=interleaved, transposed=transposed, scale_input=scale_input,
    )  # fmt: skip
    return op.call_moe_mlp(x2, ids2, gates2, o, p, impl).view(x.shape)


def _describe(
    x, ids, gates, gate_up, down, *, gate_up_bias=None, down_bias=None, gate_up_lora=None,
    down_lora=None, activation="swiglu", alpha=1.702, limit=7.0, interleaved=False,
    transposed=False, scale_input=False,
):  # fmt: skip
    """Check everything, and return the problem record, x, ids, gates and the weights."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        gate_up, down = (w if isinstance(w, PackedWeight) else w.to(dtype) for w in (gate_up, down))
    expect_dtype(NAME, DTYPES, x=x)
    for argument, t in (("gates", gates), ("gate_up_bias", gate_up_bias), ("down_bias", down_bias)):
        if t is not None and t.dtype not in DTYPES:
            expect_dtype(NAME, DTYPES, **{argument: t})
    expect_device(
        NAME, x=x, ids=ids, gates=gates, gate_up=_tensor(gate_up), down=_tensor(down),
        gate_up_bias=gate_up_bias, down_bias=down_bias,
    )  # fmt: skip
    if x.dim() == 0:
        raise ValueError(f"{NAME}: x has shape (), need axes (..., H)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: no activation {activation!r}. Known: {', '.join(ACTIVATIONS)}")
    if activation == "clamped_swiglu" and not (abs(alpha) < math.inf and 0 < limit < math.inf):
        raise ValueError(
            f"{NAME}: alpha is {alpha} and limit {limit}, need finite numbers, limit above 0"
        )
    if activation in ALONE and interleaved:
        raise ValueError(f"{NAME}: interleaved is for experts with a gate, activation {activation}")
    per_width = 1 if activation in ALONE else 2
    features = x.shape[-1]
    x2, ids, gates = _check_route(x, ids, gates)
    experts, width = _check_weights(
        x2, gate_up, down, gate_up_bias, down_bias, transposed, per_width
    )
    up_a, up_b, up_scale = _check_update(
        x2, "gate_up_lora", gate_up_lora, experts, features, per_width * width
    )
    down_a, down_b, down_scale = _check_update(x2, "down_lora", down_lora, experts, width, features)
    up, of_down = (), ()
    operands = Operands(
        gate_up_bias=gate_up_bias, down_bias=down_bias, up_a=up_a, up_b=up_b, down_a=down_a,
        down_b=down_b,
    )  # fmt: skip
    if isinstance(gate_up, PackedWeight):
        up = _packing(gate_up)
        operands = operands._replace(**_tensors("up_", gate_up))
    else:
        operands = operands._replace(gate_up=gate_up)
    if isinstance(down, PackedWeight):
        of_down = _packing(down)
        operands = operands._replace(**_tensors("down_", down))
    else:
        operands = operands._replace(down=down)
    problem = Problem(
        device=device, dtype=x.dtype, tokens=x2.shape[0], slots=ids.shape[1], experts=experts,
        features=features, width=width, activation=activation, alpha=float(alpha),
        limit=float(limit), interleaved=interleaved, transposed=transposed,
        scale_input=scale_input, up=Packing(*up), down=Packing(*of_down), up_scale=up_scale,
        down_scale=down_scale,
    )  # fmt: skip
    return problem, x2, ids, gates, operands


def _tensor(weight: torch.Tensor | PackedWeight) -> torch.Tensor:
    return weight.codes if isinstance(weight, PackedWeight) else weight


def _packing(weight: PackedWeight) -> tuple:
    nested = weight.nested
    second = (0.0, 0) if nested is None else (float(nested.offset), nested.block)
    return (weight.format, weight.group_size, *second)


def _tensors(prefix: str, weight: PackedWeight) -> dict:
    return {prefix + name: t for name, t in weight.tensors().items()}


def _check_route(x, ids, gates):
    """x as (T, H), ids and gates as (T, K)."""
    lead = x.shape[:-1]
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{NAME}: ids is {ids.dtype}, need int32 or int64")
    if ids.shape[: len(lead)] != lead or ids.dim() - len(lead) not in (0, 1):
        raise ValueError(
            f"{NAME}: ids has shape {tuple(ids.shape)}, need {tuple(lead)}: x without its last "
            "axis, or K slots after it"
        )
    if gates is not None and gates.shape != ids.shape:
        raise ValueError(
            f"{NAME}: gates has shape {tuple(gates.shape)}, need {tuple(ids.shape)} as ids"
        )
    slots = ids.shape[-1] if ids.dim() > len(lead) else 1
    n_tokens = math.prod(lead)
    if n_tokens * slots >= 2**31:
        raise ValueError(f"{NAME}: {n_tokens} x {slots} slots, need less than 2**31")
    if gates is None:
        gates = torch.ones(ids.shape, dtype=torch.float32, device=ids.device)
    shape = (n_tokens, slots)
    return x.reshape(n_tokens, x.shape[-1]), ids.reshape(shape), gates.reshape(shape)


def _check_weights(
    x, gate_up, down, gate_up_bias, down_bias, transposed, per_width
) -> tuple[int, int]:
    """E and I; gate_up has per_width I rows."""
    features = x.shape[1]
    packed = [isinstance(w, PackedWeight) for w in (gate_up, down)]
    if any(packed):
        if not all(packed):
            which = "down" if packed[0] else "gate_up"
            raise ValueError(f"{NAME}: {which} is dense beside a packed weight, need both packed")
        if transposed:
            raise ValueError(f"{NAME}: transposed is for dense weights, got packed ones")
        return _check_packed(x, gate_up, down, gate_up_bias, down_bias, per_width)
    expect_dtype(NAME, DTYPES, x=x, gate_up=gate_up, down=down)
    lines = _lines(per_width)
    axes = ("E", "H", lines), ("E", "I", "H")
    if not transposed:
        axes = ("E", lines, "H"), ("E", "H", "I")
    size = expect_shapes(NAME, x=(x, "TH"), gate_up=(gate_up, axes[0]), down=(down, axes[1]))
    if size[lines] != per_width * size["I"]:
        raise ValueError(
            f"{NAME}: gate_up has shape {tuple(gate_up.shape)}, "
            f"need {lines} = {per_width * size['I']}, I = {size['I']} as in down"
        )
    _check_biases(size["E"], size[lines], features, gate_up_bias, down_bias)
    return size["E"], size["I"]


def _lines(per_width: int) -> str:
    return "I" if per_width == 1 else "2 I"


def _check_packed(x, gate_up, down, gate_up_bias, down_bias, per_width) -> tuple[int, int]:
    features = x.shape[1]
    for argument, w in (("gate_up", gate_up), ("down", down)):
        expect_whole(NAME, argument, w, x)
        if w.input_order is not None:
            raise ValueError(f"{NAME}: {argument} has an input_order, which experts do not take")
    width, rows = down.in_features, down.out_features
    if features == 0 or width == 0 or rows % features or features % ROWS or width % ROWS:
        raise ValueError(
            f"{NAME}: down is packed as {down.shape} for H = {features}, "
            f"need (E H, I) with H and I multiples of {ROWS}"
        )
    experts = rows // features
    if gate_up.shape != (experts * per_width * width, features):
        raise ValueError(
            f"{NAME}: gate_up is packed as {gate_up.shape}, "
            f"need {(experts * per_width * width, features)}: (E {_lines(per_width)}, H) as in "
            "down and x"
        )
    _check_biases(experts, per_width * width, features, gate_up_bias, down_bias)
    return experts, width


def _check_update(x, name, update, experts, n_in, n_out):
    """a (E, R, in), b (E, out, R) and the scale of an update; three times None without one."""
    if update is None:
        return None, None, None
    a, b, scale = update
    for argument, t in ((f"{name}.a", a), (f"{name}.b", b)):
        if t.dtype not in DTYPES:
            expect_dtype(NAME, DTYPES, **{argument: t})
    expect_device(NAME, x=x, **{f"{name}.a": a, f"{name}.b": b})
    if not abs(scale) < math.inf:
        raise ValueError(f"{NAME}: {name}.scale is {scale}, need a finite number")
    rank = a.shape[0] // experts if experts and a.dim() == 2 else a.shape[1] if a.dim() == 3 else 0
    needs: tuple[tuple, tuple] = ((experts * rank, n_in), (n_out, rank * experts))
    if a.dim() == 3 and b.dim() == 3:
        needs = ((experts, rank, n_in), (experts, n_out, rank))
    for argument, t, need in ((f"{name}.a", a, needs[0]), (f"{name}.b", b, needs[1])):
        if t.shape != need:
            raise ValueError(
                f"{NAME}: {argument} has shape {tuple(t.shape)}, need {need} for "
                f"E = {experts}, R = {rank}"
            )
    if a.dim() == 2:
        a = a.view(experts, rank, n_in)
        b = b.unflatten(1, (rank, experts)).permute(2, 0, 1)
    return a, b, float(scale)


def _check_biases(experts, lines, features, gate_up_bias, down_bias) -> None:
    for argument, t, need in (
        ("gate_up_bias", gate_up_bias, (experts, lines)),
        ("down_bias", down_bias, (experts, features)),
    ):
        if t is not None and t.shape != need:
            raise ValueError(f"{NAME}: {argument} has shape {tuple(t.shape)}, need {need}")


def _problem(*args, **kwargs) -> Problem:
    return _describe(*args, **kwargs)[0]


def _sample() -> dict[str, object]:
    """What `doctor` asks about: fine-grained experts, dense and packed, on each device here."""
    samples: dict[str, object] = {}
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for packing in (Packing(), Packing("nf4", 64)):
                label = f"{device} {str(dtype).removeprefix('torch.')} {packing.format}"
                samples[label] = Problem(
                    device=device, dtype=dtype, tokens=512, slots=8, experts=64, features=2048,
                    width=1024, up=packing, down=packing,
                )  # fmt: skip
    return samples


choose.register(
    choose.Operator(
        NAME,
        (
            choose.implementation_of("moe", "triton_gpu"),
            choose.implementation_of("moe", "cpp_cpu"),
            choose.REFERENCE,
        ),
        _problem,
        _sample,
    )
)
