"""Sampling a token a row: one reading of the logits, B rows of V tokens."""

from __future__ import annotations

import torch

import tilewright
from tilewright.bench.variant import Variant

GRADIENTS = ()
USUAL = dict(temperature=0.8, top_k=50, top_p=0.95)
NUCLEUS = dict(temperature=0.8, top_p=0.95)
FORWARD = dict(dtypes=("float32", "bf16"), modes=("fwd",))


def _cases() -> dict[str, dict]:
    rules = {"nucleus": NUCLEUS, "k50": USUAL, "plain": dict(temperature=0.8)}
    cases = {}
    for name, rule in rules.items():
        for width, label in ((32_000, "32k"), (128_256, "128k")):
            for rows in (1, 8, 64):
                if name == "nucleus" or rows == 8:
                    cases[f"{name}-{label}-{rows}"] = dict(B=rows, V=width, rule=rule, **FORWARD)
    return cases


CASES = _cases()


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (case["B"], case["V"])
    return {"logits": (3 * torch.randn(shape, generator=generator, device=device)).to(dtype)}


def small(case: dict) -> dict:
    return {**case, "B": 4, "V": 1000, "is_check": True}


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: an exponential, about ten, for each logit. Bytes: the logits, read once."""
    n = float(case["B"] * case["V"])
    return 10 * n, itemsize * n


def _kept(case: dict, scores: torch.Tensor) -> torch.Tensor:
    """transformers' own filters."""
    from transformers.generation import logits_process as stock

    rule = case["rule"]
    scores = stock.TemperatureLogitsWarper(rule["temperature"])(None, scores)
    if "top_k" in rule:
        scores = stock.TopKLogitsWarper(rule["top_k"])(None, scores)
    return stock.TopPLogitsWarper(rule["top_p"])(None, scores) if "top_p" in rule else scores


def _transformers(case: dict, logits: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(_kept(case, logits.float()).softmax(-1), 1)[:, 0]


def _chain(case: dict, logits: torch.Tensor) -> torch.Tensor:
    """Plain torch: one sort, both filters on the ordered probabilities."""
    rule = case["rule"]
    scores = logits.float() / rule["temperature"]
    if "top_k" not in rule and "top_p" not in rule:
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]
    if "top_k" in rule:
        ordered, order = scores.topk(rule["top_k"])
    else:
        ordered, order = scores.sort(descending=True)
    probability = ordered.softmax(-1)
    if "top_p" in rule:
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= rule["top_p"], 0.0)
    return order.gather(1, torch.multinomial(probability, 1))[:, 0]


def _ours(case: dict, logits: torch.Tensor) -> torch.Tensor:
    return tilewright.sample_tokens(logits, **case["rule"], seed=0)


def _is_kept(case: dict, logits: torch.Tensor) -> torch.Tensor:
    """Draws of different generators are compared by what is the same of all: that each lies among
    the kept tokens."""
    return _kept(case, logits.double()) > -torch.inf


def _checked(draw):
    """The draw, and in the small case of the check its lying in the kept set."""

    def run(case: dict, logits: torch.Tensor) -> torch.Tensor:
        tokens = draw(case, logits)
        if not case.get("is_check"):
            return tokens
        return _is_kept(case, logits).gather(1, tokens[:, None])[:, 0].float()

    return run


def stock(case: dict, logits: torch.Tensor) -> torch.Tensor:
    return _checked(_transformers)(case, logits)


def truth(case: dict, logits: torch.Tensor) -> torch.Tensor:
    return torch.ones(case["B"], dtype=torch.float64, device=logits.device)


VARIANTS = {
    "tilewright": Variant(_checked(_ours)),
    "transformers": Variant(_checked(_transformers)),
    "torch chain": Variant(_checked(_chain)),
}
