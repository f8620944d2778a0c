"""Sparse fine-tuning of a linear layer: its training step, and the search for larger gradients.

Axes: T tokens, I in, O out. `share` of the weight's entries have a value of their own.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

import tilewright
from tilewright.bench import peers_peft
from tilewright.bench.variant import Variant

GRADIENTS = ("x", "values")
TRAINED = dict(step="train", dtypes=("bf16",), modes=("fwd", "fwd+bwd"))
SEARCH = dict(step="search", dtypes=("bf16",), modes=("fwd",))
SQUARE, WIDE = dict(I=4096, O=4096), dict(I=4096, O=11008)

CASES = {
    "train-512": dict(T=512, share=0.01, **SQUARE, **TRAINED),
    "train-512-thin": dict(T=512, share=0.001, **SQUARE, **TRAINED),
    "train-512-dense": dict(T=512, share=0.02, **SQUARE, **TRAINED),
    "train-2k": dict(T=2048, share=0.01, **SQUARE, **TRAINED),
    "train-512-wide": dict(T=512, share=0.01, **WIDE, **TRAINED),
    "search-512": dict(T=512, share=0.01, **SQUARE, **SEARCH),
    "search-2k": dict(T=2048, share=0.01, **SQUARE, **SEARCH),
}


@functools.lru_cache(maxsize=4)
def _places(n_out: int, n_in: int, share: float, device: str = "cpu") -> tilewright.WeightDelta:
    """Drawn alike; the values are nothing."""
    generator = torch.Generator().manual_seed(0)
    n = round(share * n_out * n_in)
    places = torch.randperm(n_out * n_in, generator=generator)[:n]
    delta = tilewright.WeightDelta.from_flat(places, torch.zeros(n), n_out, n_in).to(device)
    delta.expect_whole("bench_sparse")
    return delta


def _delta(case: dict, values: torch.Tensor) -> tilewright.WeightDelta:
    device = str(values.device)
    return _places(case["O"], case["I"], case["share"], device).with_values(values)


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """x (T, I) and weight (O, I), and values (N,) float32; or x and dy (T, O) in whole numbers, so
    that which gradients are largest does not hang on a rounding."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    if case["step"] == "search":
        return {
            name: (2 * normal(case["T"], case[axis])).round().to(dtype)
            for name, axis in (("dy", "O"), ("x", "I"))
        }
    n = _places(case["O"], case["I"], case["share"]).nnz
    return dict(
        x=normal(case["T"], case["I"]).to(dtype),
        weight=(normal(case["O"], case["I"]) / case["I"] ** 0.5).to(dtype),
        values=normal(n) / (case["share"] * case["I"]) ** 0.5,
    )


def small(case: dict) -> dict:
    return {**case, "T": min(case["T"], 40), "I": 256, "O": 192, "share": max(case["share"], 0.01)}


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: the dense product and the sparse one, in the backward both to x and the values'.
    Bytes: tokens, the weight, four for a value and two for its column; in the backward again."""
    n_tokens, n_in, n_out = case["T"], case["I"], case["O"]
    size = n_in * n_out
    tokens = itemsize * n_tokens * (n_in + n_out)
    if case["step"] == "search":
        return 2.0 * n_tokens * size, tokens + 8 * case["share"] * size
    passes = 2 if mode == "fwd+bwd" else 1
    products = size * (passes + case["share"] * (2 * passes - 1))
    return 2.0 * n_tokens * products, passes * (size * (itemsize + 6 * case["share"]) + tokens)


def _k(case: dict) -> int:
    return round(case["share"] * case["O"] * case["I"])


def ours(case: dict, x, weight=None, values=None, dy=None, impl: str = "auto") -> torch.Tensor:
    """y (T, O), or the places (k,) of the largest gradients."""
    if dy is not None:
        return tilewright.largest_gradients(dy, x, _k(case), impl=impl)
    return tilewright.fused_linear(x, weight, delta=_delta(case, values), impl=impl)


def truth(case: dict, x, weight=None, values=None, dy=None) -> torch.Tensor:
    return ours(case, x, weight, values, dy, impl="reference")


def stock(case: dict, x, weight=None, values=None, dy=None) -> torch.Tensor:
    """A copy of the weight with the values added, a dense product, and in the backward the dense
    gradient of the weight, of which the values' is taken: what PEFT's sparse methods compute."""
    if dy is not None:
        gradient = (dy.T @ x).float().abs().flatten()
        return gradient.sort(descending=True, stable=True).indices[: _k(case)].sort().values
    places = _flat_places(case["O"], case["I"], case["share"], str(x.device))
    changed = weight.flatten().scatter_add(0, places, values.to(weight.dtype))
    return F.linear(x, changed.view_as(weight))


@functools.lru_cache(maxsize=4)
def _flat_places(n_out: int, n_in: int, share: float, device: str) -> torch.Tensor:
    return _places(n_out, n_in, share, device).places()


def dense_top_k(case: dict, x, dy) -> torch.Tensor:
    """The dense gradient, and torch's topk, which leaves it open which of equal ones it takes."""
    return (dy.T @ x).abs().flatten().topk(_k(case)).indices


def frozen(case: dict, x, weight, values) -> torch.Tensor:
    """The layer without its delta."""
    return F.linear(x, weight)


class _Masked(torch.autograd.Function):
    """A layer whose dense weight trains: of its gradient all but some entries are dropped."""

    @staticmethod
    def forward(ctx, x, weight, values, places):
        ctx.save_for_backward(x, weight, places)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight, places = ctx.saved_tensors
        return dy @ weight, None, (dy.T @ x).flatten()[places].float(), None


def masked(case: dict, x, weight, values) -> torch.Tensor:
    """The values are in the weight already: the least that a dense gradient costs."""
    places = _flat_places(case["O"], case["I"], case["share"], str(x.device))
    return _Masked.apply(x, weight, values, places)


def _with_values_inside(case: dict, inputs: dict) -> dict:
    places = _flat_places(case["O"], case["I"], case["share"], str(inputs["x"].device))
    weight = inputs["weight"].flatten().float().index_add(0, places, inputs["values"].float())
    return {**inputs, "weight": weight.to(inputs["weight"].dtype).view_as(inputs["weight"])}


def _in_layer(make, by_places: bool = True):
    """The inputs with the weight in a layer of PEFT's."""

    def prepare(case: dict, inputs: dict) -> dict:
        weight, values = inputs["weight"], inputs["values"]
        places = _flat_places(case["O"], case["I"], case["share"], str(weight.device))
        layer = make(weight, places if by_places else len(values))
        return {"layer": layer, "x": inputs["x"], "values": values}

    return prepare


def _of_peft(run, make, tuner: str, by_places: bool = True) -> Variant:
    return Variant(
        run, _in_layer(make, by_places), applies=_is("train"),
        why_not=functools.partial(peers_peft.why_not, tuner),
    )  # fmt: skip


def _is(step: str):
    return lambda case: case["step"] == step


VARIANTS = {
    "tilewright": Variant(ours),
    "torch scatter": Variant(stock, applies=_is("train")),
    "torch masked gradient": Variant(masked, _with_values_inside, applies=_is("train")),
    "torch frozen": Variant(frozen, applies=_is("train")),
    "peft supertuning": _of_peft(
        peers_peft.by_supertuning, peers_peft.supertuning_layer, "supertuning"
    ),
    "peft shira": _of_peft(peers_peft.by_shira, peers_peft.shira_layer, "shira"),
    # as many parameters, another update: its error says nothing
    "peft lora": _of_peft(peers_peft.by_lora, peers_peft.lora_layer, "lora", by_places=False),
    "torch topk": Variant(dense_top_k, applies=_is("search")),
}
