"""`tilewright quantize`: a model folder into a quantized one, with a report of what that cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tilewright import pretrained
from tilewright.config import DTYPES, pick_device, quant_config
from tilewright.data import PackedRows, encode, pack, read_documents
from tilewright.files import InputError
from tilewright.progress import Progress
from tilewright.quality import Quality, compare_models
from tilewright.quantized import n_bytes, quantized_layers


@dataclass(frozen=True)
class QuantizedFolder:
    """What `quantize_folder` did.

    format                 with its options
    layers                 packed ones, of
    weights                numbers in them
    bits_per_weight        of those, scales and padding included
    bytes_before           of the model in memory, and
    bytes_after            the same with packed layers
    file_bytes             of the folder's weight files
    text                   what the quality was measured on
    """

    format: str
    layers: int
    weights: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    file_bytes: int
    text: str
    quality: Quality

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        q = self.quality
        rows = {
            "format": self.format,
            "packed layers": f"{self.layers}, {self.weights:,} weights",
            "bits a weight": f"{self.bits_per_weight:.3f}",
            "bytes before": f"{self.bytes_before:,}",
            "bytes after": f"{self.bytes_after:,}  ({self.bytes_before / self.bytes_after:.2f} x)",
            "weight files": f"{self.file_bytes:,} bytes",
            "measured on": f"{q.n_tokens:,} tokens of {self.text}",
            "KL divergence": f"{q.kl:.5f} nats a token, {q.kl_largest:.3f} at most",
            "same top token": f"{q.same_top:.2%}",
            "perplexity": f"{q.perplexity_before:.4f} -> {q.perplexity_after:.4f}  "
            f"({q.perplexity_after / q.perplexity_before - 1:+.3%})",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def quantize_folder(
    source: str | os.PathLike,
    format: str,
    out: str | os.PathLike,
    *,
    text: str | os.PathLike | None = None,
    skip: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "auto",
    context: int = 512,
    tokens: int = 16384,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
    **options,
) -> QuantizedFolder:
    """Quantize the model in a folder, write the result to another, and measure the difference.

    source    a model folder
    format    "nf4", "fp4", "int4", "int8", "fp8" or "mxfp4"; its options by name, group_size=64
    out       folder for the quantized model, which loads as any other once tilewright is imported
    text      a file or folder of text to compare both models on; None: the standard library's
    skip      names, or their ends, of layers to leave dense, besides output embeddings
    dtype     what both models compute in, and of what is not packed: "float32" or "bfloat16"
    context   tokens of one row of that text; at most the model's own limit is used
    tokens    of the text to measure on, at most

    Dense weights are packed one after the other as they are read; then the dense model is loaded
    for the comparison.
    InputError: something given cannot be used. WriteError: the disk.
    """
    config = quant_config(format, modules_to_not_convert=list(skip) or None, **options)
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, need {' or '.join(DTYPES)}")
    for name, value, least in (("context", context, 2), ("tokens", tokens, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}, need a whole number of at least {least}")
    place = pick_device(device)
    folder = Path(out)
    _expect_usable(Path(source), folder, overwrite)
    documents, about = _documents(text)
    loaded = pretrained.load(
        source, dtype=DTYPES[dtype], needs_weights=True, quantization=config,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    rows = _rows(documents, loaded, context, tokens)
    _save(loaded, folder)

    dense = pretrained.load(
        source, dtype=DTYPES[dtype], needs_weights=True, trust_remote_code=trust_remote_code
    ).model
    bar = Progress(len(rows), "compare") if progress else None
    try:
        quality = compare_models(dense.to(place), loaded.model.to(place), rows, progress=bar)
    finally:
        if bar is not None:
            bar.close()
    layers = [layer for _, layer in quantized_layers(loaded.model)]
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    named = ", ".join(f"{name} {value}" for name, value in asdict(config.record).items())
    return QuantizedFolder(
        format=f"{format} ({named})" if named else format,
        layers=len(layers),
        weights=weights,
        bits_per_weight=8 * sum(layer.packed.nbytes for layer in layers) / weights,
        bytes_before=n_bytes(dense),
        bytes_after=n_bytes(loaded.model),
        file_bytes=sum(p.stat().st_size for p in folder.glob("*.safetensors")),
        text=about,
        quality=quality,
    )


def _save(loaded: pretrained.Loaded, folder: Path) -> None:
    """Write the model; what an earlier one has left of its weights goes when all is in place."""
    earlier = {p: p.stat().st_ino for p in folder.glob("model*.safetensors*")}
    pretrained.save(loaded.model, loaded.tokenizer, folder)
    for path, number in earlier.items():
        if path.stat().st_ino == number:
            path.unlink()


def _expect_usable(source: Path, folder: Path, overwrite: bool) -> None:
    if (source / "adapter_config.json").exists():
        raise InputError(
            f"model {source} is a PEFT adapter, need a whole model; merge it first, "
            "with tilewright.merge"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out {folder} is a file, need a folder")
    if folder.exists() and source.exists() and folder.samefile(source):
        raise InputError(f"out {folder} is the model's own folder, need another one")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"out {folder} is not empty; pass --overwrite to replace the model in it, "
            "or name another folder"
        )


def _documents(text: str | os.PathLike | None) -> tuple[list[str], str]:
    if text is not None:
        return read_documents(text), str(text)
    from tilewright.demo import collect_text

    _, held_out, folder = collect_text(1, 300_000)
    return held_out, f"Python's standard library in {folder}"


def _rows(documents: list[str], loaded: pretrained.Loaded, context: int, tokens: int) -> PackedRows:
    config = pretrained.config_of(loaded.model)
    limit = getattr(config, "max_position_embeddings", None) or context
    length = min(context, limit, tokens)
    assert loaded.tokenizer is not None
    pieces = []
    left = tokens
    for document in documents:
        (ids,) = encode(loaded.tokenizer, [document[: 16 * left]])
        pieces.append(ids[:left])
        left -= len(pieces[-1])
        if left <= 0:
            break
    rows = pack(pieces, length, getattr(loaded.tokenizer, "pad_token_id", None) or 0)
    vocab_size = config.get_text_config().vocab_size
    largest = int(rows.input_ids.max())
    if largest >= vocab_size:
        raise InputError(
            f"text holds token {largest}, need 0 to {vocab_size - 1} as in the model: "
            "the tokenizer is not the model's"
        )
    if rows.n_valid == 0:
        raise InputError("text is too short: no token has a predecessor in its document")
    return rows
