"""A peer for whole models: llama.cpp, through the C interface of llama-cpp-python.

A model of `decoder_model` is written as a GGUF file of the architecture "llama" without a
vocabulary, its 4-bit codes as Q4_0 and the head's as Q8_0: the same weights, up to scales that are
float16 in the file.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewright.bench import decoder_model, peers_ggml
from tilewright.bench.decoder_model import MAX_TOKENS, Shape

NEEDED = {  # module: package
    "llama_cpp": "llama-cpp-python", "diskcache": "diskcache", "jinja2": "jinja2", "gguf": "gguf",
}  # fmt: skip
NAMES = {  # of a block: ours -> the file's
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
MOSTLY_Q4_0 = 2  # of llama.h: LLAMA_FTYPE_MOSTLY_Q4_0
NO_VOCABULARY = "none"
READ = 0  # of llama.h: LLAMA_LOAD_MODE_NONE, so that the file may go afterwards


def why_not() -> str | None:
    missing = [p for module, p in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"{', '.join(missing)} not installed; `pip install --no-deps {' '.join(missing)}`"
    return peers_ggml.why_not()


def name_in_file(name: str) -> str:
    """The name of a module's weight in the file."""
    if name in OUTSIDE:
        return f"{OUTSIDE[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def interleaved(rows: torch.Tensor, head_width: int) -> torch.Tensor:
    """(O, ...) rows of q or k in llama.cpp's order, which turns neighbours and not halves."""
    heads = rows.view(-1, 2, head_width // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def write_gguf(path: Path, shape: Shape, format: str) -> None:
    """The model of this shape and format, "int4", as a file."""
    import gguf

    config = decoder_model.config_of(shape)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(MAX_TOKENS)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(MOSTLY_Q4_0)
    writer.add_tokenizer_model(NO_VOCABULARY)
    for name, packed in decoder_model.packed_weights(shape, format).items():
        kind, blocks = peers_ggml.blocks_of(packed)
        if name.endswith(("q_proj", "k_proj")):
            blocks = interleaved(blocks, shape.head_width)
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name_in_file(name), blocks.numpy(), raw_dtype=type_)
    for name, plain in decoder_model.plain_weights(shape).items():
        if plain.dim() == 1:
            writer.add_tensor(name_in_file(name), plain.float().numpy())
        else:
            writer.add_tensor(
                name_in_file(name), plain.view(torch.uint8).numpy(),
                raw_dtype=gguf.GGMLQuantizationType.BF16,
            )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A model that llama.cpp has loaded; freed with the object."""

    def __init__(self, shape: Shape, format: str):
        from llama_cpp import llama_cpp as api

        api.llama_log_set(peers_ggml.silent, None)
        api.llama_backend_init()
        options = api.llama_model_default_params()
        options.load_mode = READ
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, shape, format)
            self.handle = api.llama_model_load_from_file(str(path).encode(), options)
        if self.handle is None:
            raise RuntimeError("llama.cpp could not load the model")
        weakref.finalize(self, api.llama_model_free, self.handle)


@functools.lru_cache(maxsize=2)
def loaded(shape: Shape, format: str) -> Model:
    return Model(shape, format)


class Session:
    """Prefill or decode by llama.cpp; a call can be repeated.

    tokens    (P + T,); P are in the cache before a call
    before    P; with 0 a call reads all T tokens at once, else one after the other
    threads   of either
    """

    def __init__(self, shape: Shape, format: str, tokens: torch.Tensor, before: int, threads: int):
        from llama_cpp import llama_cpp as api

        self._api: Any = api
        self._model = loaded(shape, format)
        self.vocab, self.before, self.n = shape.vocab, before, len(tokens)
        self._tokens = (api.llama_token * self.n)(*tokens.tolist())
        settings = api.llama_context_default_params()
        settings.n_ctx = MAX_TOKENS
        settings.n_batch = settings.n_ubatch = MAX_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model.handle, settings)
        if self._context is None:
            raise RuntimeError("llama.cpp could not make a context")
        weakref.finalize(self, api.llama_free, self._context)
        self._memory = api.llama_get_memory(self._context)
        if before:
            peers_ggml.apart_for_once(lambda: self._read(0, before))

    def _read(self, start: int, end: int) -> torch.Tensor:
        """(V,) logits after the last of these tokens."""
        api = self._api
        first = ctypes.addressof(self._tokens) + start * ctypes.sizeof(api.llama_token)
        tokens = ctypes.cast(first, ctypes.POINTER(api.llama_token))
        status = api.llama_decode(self._context, api.llama_batch_get_one(tokens, end - start))
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}")
        logits = api.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self.vocab,)).copy())

    def __call__(self) -> torch.Tensor:
        """Logits after the last token (1, V), or after each (T, V) where P > 0."""
        return peers_ggml.apart_for_once(self._logits)

    def _logits(self) -> torch.Tensor:
        if self.before:
            rows = [self._read(i, i + 1) for i in range(self.before, self.n)]
        else:
            rows = [self._read(0, self.n)]
        if not self._api.llama_memory_seq_rm(self._memory, 0, self.before, -1):
            raise RuntimeError("llama.cpp could not take tokens out of its cache")
        return torch.stack(rows)
