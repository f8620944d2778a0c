"""A Llama of 1.1 billion parameters end to end at batch 1: reading a prompt, and token by token.

Weights are random. The matrices are packed in 4 bits in the format of the case, the output
embedding in 8, and all variants have the values that these decode to: transformers dense, in the
dtype of the case; llama.cpp from a GGUF file of the same codes (int4 alone, which is its Q4_0).

A call either reads T tokens at once into an empty cache (prefill) or T tokens one after the other
behind P that are in the cache (decode). The tokens are given, so that all variants see the same;
the output is the logits after the last token, or after each of the T.

Truth is stock transformers in float64, whose norms and rotary angles are float32.

Axes: P tokens in the cache before the call, T tokens of the call.
"""

from __future__ import annotations

import functools

import torch

from tilewright.bench import decoder_model, peers_llama_cpp
from tilewright.bench.decoder_model import HostedSession, Shape
from tilewright.bench.variant import Variant

GRADIENTS = ()
LARGE = Shape(vocab=32000, hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632)
QUICK = Shape(vocab=4096, hidden=512, layers=4, heads=8, kv_heads=2, intermediate=1408)
SMALL = Shape(vocab=512, hidden=256, layers=2, heads=4, kv_heads=2, intermediate=704)

RUN = dict(shape=LARGE, dtypes=("bf16",), modes=("fwd",))
CASES = {
    f"{name}-{format}": dict(format=format, **tokens, **RUN)
    for format in ("int4", "nf4")
    for name, tokens in (
        ("decode", dict(P=128, T=16)),
        ("prefill-128", dict(P=0, T=128)),
        ("prefill-512", dict(P=0, T=512)),
    )
}


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict:
    """tokens (P + T,) and the dtype of the activations."""
    generator = torch.Generator().manual_seed(0)
    n = case["P"] + case["T"]
    tokens = torch.randint(0, case["shape"].vocab, (n,), generator=generator)
    return dict(tokens=tokens.to(device), dtype=dtype)


def small(case: dict) -> dict:
    return {**case, "shape": SMALL, "P": min(case["P"], 24), "T": min(case["T"], 40)}


def quick(case: dict) -> dict:
    return {**case, "shape": QUICK}


def counts(case: dict) -> dict[str, int]:
    return {"tokens": case["T"]}


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: each matrix for each token, the head for each row of logits, and two products of
    the heads' width for each pair of tokens. Bytes: packed weights, and keys and values in the
    activations' dtype, once in a prefill and once a token in decoding."""
    shape, before, n_tokens = case["shape"], case["P"], case["T"]
    lengths = [before + i + 1 for i in range(n_tokens)]
    n_reads = n_tokens if before else 1  # passes over the weights, and rows of logits
    head = shape.vocab * shape.hidden
    pairs = shape.layers * shape.heads * shape.head_width * sum(lengths)
    operations = 2.0 * (shape.layer_weights * n_tokens + head * n_reads + 2 * pairs)
    width = 2 * shape.layers * shape.kv_heads * shape.head_width * itemsize  # of a cached token
    cached = width * (sum(lengths) if before else n_tokens)
    return operations, n_reads * (shape.layer_weights * 4.5 / 8 + head) + cached


def hosted(attention: str, case: dict, inputs: dict) -> dict:
    """The model, with P tokens in its cache."""
    tokens, dtype = inputs["tokens"], inputs["dtype"]
    model = decoder_model.hosted(
        case["shape"], case["format"], attention, dtype, str(tokens.device)
    )
    return dict(session=HostedSession(model, tokens, case["P"], attention == "tilewright"))


def in_llama_cpp(case: dict, inputs: dict) -> dict:
    threads = torch.get_num_threads()
    session = peers_llama_cpp.Session(
        case["shape"], case["format"], inputs["tokens"], case["P"], threads
    )
    return dict(session=session)


def logits(case: dict, session) -> torch.Tensor:
    """(1, V) after a prefill, (T, V) in decoding."""
    return session()


def truth(case: dict, tokens, dtype) -> torch.Tensor:
    return logits(case, **hosted("eager", case, dict(tokens=tokens, dtype=torch.float64)))


def stock(case: dict, tokens, dtype) -> torch.Tensor:
    return logits(case, **hosted("sdpa", case, dict(tokens=tokens, dtype=dtype)))


def _is_int4(case: dict) -> bool:
    return case["format"] == "int4"


VARIANTS = {
    "tilewright": Variant(logits, prepare=functools.partial(hosted, "tilewright")),
    "transformers": Variant(logits, prepare=functools.partial(hosted, "sdpa")),
    "llama.cpp Q4_0": Variant(
        logits, prepare=in_llama_cpp, applies=_is_int4, why_not=peers_llama_cpp.why_not
    ),
}
