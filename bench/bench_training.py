"""A whole training step of a Llama of 100 million parameters: forward, backward, optimizer.

All of it trains, or half (`HalfPlan`), or LoRA on every linear layer, or 1 % of the entries of
each. Ours is `accelerate` with `tilewright.AdamW`; stock is transformers and PEFT with torch's
fused AdamW, and the same with torch.compile over the model. Sparse values are PEFT's Super-Tuning
there.
Weights are random and the tied embedding is the head; weights, activations, adapters and gradients
have the dtype of the case, sparse values are float32, and so are the moments of our AdamW, where
torch's have the dtype of the weights.

A call is one more step of the same model. Checked in a small shape are the gradients of the first;
truth is transformers in float64, whose norms, rotary angles and loss are float32.
What a step takes in memory: `python -m tilewright.bench.training_memory`.

Axes: T tokens, in one sequence.
"""

from __future__ import annotations

import functools

import torch

from tilewright import pretrained
from tilewright.bench import training_model
from tilewright.bench.decoder_model import Shape
from tilewright.bench.training_model import COMPILED, EAGER, OURS, RANK, STOCK, Training
from tilewright.bench.variant import Variant

GRADIENTS = ()  # of inputs: there are none, and mode "fwd+bwd" is the step
LARGE = Shape(vocab=32000, hidden=768, layers=12, heads=12, kv_heads=4, intermediate=2048)
QUICK = Shape(vocab=4096, hidden=256, layers=4, heads=4, kv_heads=2, intermediate=704)
SMALL = Shape(vocab=1024, hidden=128, layers=2, heads=4, kv_heads=2, intermediate=352)

RUN = dict(shape=LARGE, T=2048, dtypes=("bf16",), modes=("fwd+bwd",))
CASES = {
    "lora-2k": dict(method="lora", **RUN),
    "full-2k": dict(method="full", **RUN),
    "half-2k": dict(method="half", **RUN),
    "sparse-2k": dict(method="sparse", share=0.01, **RUN),
}


def why_not() -> str | None:
    try:
        pretrained.import_peft()
    except pretrained.InputError as error:
        return str(error)
    return None


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict:
    """tokens (1, T), and the dtype of the weights."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, case["shape"].vocab, (1, case["T"]), generator=generator)
    return dict(tokens=tokens.to(device), dtype=dtype)


def small(case: dict) -> dict:
    """With `gives_gradients` a call gives the first step's gradients in place of its loss."""
    return {**case, "shape": SMALL, "T": 128, "gives_gradients": True}


def quick(case: dict) -> dict:
    return {**case, "shape": QUICK, "T": 512}


def counts(case: dict) -> dict[str, int]:
    return {"tokens": case["T"]}


# --- what a step needs ---


@functools.cache
def half_drawn(shape: Shape) -> dict[str, int]:
    """The numbers of the matrices that train in the half, by name."""
    plan = training_model.half_plan(training_model.hosted_without_values(shape))
    drawn = plan.draw(0)
    return {u.name: u.numel() for u in plan.units if u in drawn and u.category != "norm"}


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: each matrix for each token in the forward, again for the gradient of its input,
    and again for its own where it trains; of attention two products forward and four backward, for
    each pair of tokens. Where the embedding stands still, the first q, k and v need no gradient
    of their input. Bytes: the weights in both directions; of what trains the gradient written and
    read, the weight and two float32 moments read and written."""
    shape, method, n = case["shape"], case["method"], case["T"]
    sizes = shape.layer_matrices
    head, matrices = shape.vocab * shape.hidden, shape.layer_weights
    first = sum(n_out * n_in for name, (n_out, n_in) in sizes.items() if name[-6:] in _QKV)
    pairs = shape.layers * shape.heads * shape.head_width * n * (n + 1) // 2
    to_inputs = matrices + head
    beside, to_weights, trained, wide = 0, 0, 0, itemsize
    if method == "lora":
        ranks = {name: RANK * (n_out + n_in) for name, (n_out, n_in) in sizes.items()}
        trained = shape.layers * sum(ranks.values())
        ends = sum(RANK * sizes[name][1] for name in sizes if name[-6:] in _QKV)
        beside = 3 * trained - ends
        to_inputs -= first
    elif method == "sparse":
        counted = {name: int(case["share"] * o * i) for name, (o, i) in sizes.items()}
        trained, wide = shape.layers * sum(counted.values()), 4
        beside = 3 * trained - sum(c for name, c in counted.items() if name[-6:] in _QKV)
        to_inputs -= first
    else:
        norms = (2 * shape.layers + 1) * shape.hidden
        to_weights = head + (matrices if method == "full" else sum(half_drawn(shape).values()))
        trained = to_weights + norms
    operations = 2.0 * n * (matrices + head + to_inputs + to_weights + beside) + 12.0 * pairs
    return operations, 2.0 * itemsize * (matrices + head) + trained * (4 * wide + 16)


_QKV = ("q_proj", "k_proj", "v_proj")


# --- variants ---


def in_training(how: str, case: dict, inputs: dict) -> dict:
    return dict(training=training_model.training(case, how, inputs["dtype"], inputs["tokens"]))


def step(case: dict, training: Training) -> torch.Tensor:
    """The loss of one more step, or all gradients in a row, in the order of their names."""
    if not case.get("gives_gradients"):
        return training()
    with torch.enable_grad():
        training.gradients()
    return torch.cat([training.gradient(name).flatten() for name in sorted(training.trained)])


def truth(case: dict, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return step(case, **in_training(EAGER, case, dict(tokens=tokens, dtype=torch.float64)))


def stock(case: dict, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return step(case, **in_training(STOCK, case, dict(tokens=tokens, dtype=dtype)))


VARIANTS = {
    "tilewright": Variant(step, prepare=functools.partial(in_training, OURS)),
    "transformers": Variant(step, prepare=functools.partial(in_training, STOCK)),
    "transformers compiled": Variant(
        step, prepare=functools.partial(in_training, COMPILED), compiles=True
    ),
}
