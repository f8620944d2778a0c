"""Real text into rows of tokens: reading, tokenizers, and packing that keeps documents apart."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tilewright.files import InputError

IGNORED = -100  # label of a position that no loss is taken from; transformers' own value
END, PAD = "<|end|>", "<|pad|>"


class TokenizerLike(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def pad_token_id(self) -> int | None: ...
    def __len__(self) -> int: ...
    def __call__(self, text: str, /, **options: Any) -> Mapping[str, Any]: ...
    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = ..., **options: Any
    ) -> str | list[str]: ...
    def save_pretrained(self, folder: Path, /) -> object: ...


def read_documents(path: str | os.PathLike) -> list[str]:
    """The documents of a text file, a .jsonl file, or every file below a folder, in name order.

    A text file is one document; each line of a .jsonl file is an object whose "text" is one.
    Hidden files are left out. InputError: nothing there, not UTF-8 text, or no text at all.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(
            p for p in path.rglob("*")
            if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
        )  # fmt: skip
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"data {path} does not exist, need a text file, a .jsonl file or a folder")
    documents = [text for file in files for text in _read_file(file) if text.strip()]
    if not documents:
        raise InputError(f"data {path} is empty, need text")
    return documents


def _read_file(path: Path) -> Iterator[str]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"data file {path} is not text: byte 0x{raw[error.start]:02x} at offset {error.start} "
            "is not UTF-8; convert it or leave it out"
        ) from None
    if "\0" in text:
        raise InputError(
            f"data file {path} is not text: a zero byte at offset {raw.index(0)}; leave it out"
        )
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"data file {path}, line {number}, is not JSON: {error.msg}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(f'data file {path}, line {number}, has no string under "text"')
        yield record["text"]


def byte_tokenizer(context: int | None = None) -> TokenizerLike:
    """A tokenizer whose token b is the byte b; 256 ends a document, 257 fills rows.

    It is a byte-level BPE without merges, so that plain transformers loads what is saved of it.
    context   the longest text that the model takes, for the saved settings
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # the byte-level alphabet writes a printable Latin-1 byte as itself, and the other bytes, in
    # order, as the characters from 256 on
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    vocabulary = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _for_transformers(tokenizer, context)


def train_tokenizer(
    documents: Sequence[str], vocab_size: int, context: int | None = None
) -> TokenizerLike:
    """A byte-level BPE of `vocab_size` tokens, trained on the documents, always the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(documents, trainer)
    return _for_transformers(tokenizer, context)


def _for_transformers(tokenizer, context: int | None) -> TokenizerLike:
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([END, PAD])
    limit = {} if context is None else {"model_max_length": context}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD,
        clean_up_tokenization_spaces=False, **limit,
    )  # fmt: skip


def encode(tokenizer: TokenizerLike, documents: Sequence[str]) -> list[np.ndarray]:
    """Each document's tokens, (length,) int64, as the tokenizer makes them, and an end token."""
    end = tokenizer.eos_token_id
    encoded = []
    for document in documents:
        ids = tokenizer(document, verbose=False)["input_ids"]
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        encoded.append(np.asarray(ids, dtype=np.int64))
    return encoded


@dataclass(frozen=True)
class PackedRows:
    """Documents packed into N rows of L tokens, each document apart from its neighbours.

    input_ids     (N, L) int64
    position_ids  (N, L) int64, restarting at 0 with every document, and with the filling at the end
    labels        (N, L) int64: the token itself, which position i - 1 predicts; IGNORED at a
                  document's first token and in the filling
    n_pieces      documents, counting the pieces of cut ones
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    n_pieces: int

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def n_valid(self) -> int:
        """Tokens that a loss is taken from."""
        return int((self.labels != IGNORED).sum())

    def batch(self, rows: Sequence[int], device: torch.device | str = "cpu") -> dict:
        """The named rows as keyword arguments of a causal language model's forward."""
        index = torch.as_tensor(rows)
        return {
            "input_ids": self.input_ids[index].to(device),
            "position_ids": self.position_ids[index].to(device),
            "labels": self.labels[index].to(device),
        }

    def fingerprint(self) -> str:
        """A digest of every token and border."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.position_ids, self.labels):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


def pack(
    documents: Sequence[np.ndarray | Sequence[int]], length: int, pad: int, apart: bool = False
) -> PackedRows:
    """Lay documents into rows of `length` tokens by best fit, longest first.

    A document longer than a row is cut into pieces of `length`; nothing else is cut and no token
    is lost or repeated. Rows are cut to the fullest one. pad fills the rest of a row.

    apart   each piece gets a row of its own, where several in one would see each other

    The rule: Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830, section 2.
    """
    pieces = []
    for document in documents:
        document = np.asarray(document, dtype=np.int64)
        pieces += [document[i : i + length] for i in range(0, len(document), length)]
    if not pieces:
        raise InputError("data holds no tokens")
    order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i]))

    rows: list[list[np.ndarray]] = []
    rows_with_room: dict[int, list[int]] = {}  # tokens left: rows
    rooms: list[int] = []  # the keys of rows_with_room, ascending
    for i in order:
        size = len(pieces[i])
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, length
        else:
            room = rooms[at]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[at]
        rows[row].append(pieces[i])
        if room > size and not apart:
            if room - size not in rows_with_room:
                rows_with_room[room - size] = []
                bisect.insort(rooms, room - size)
            rows_with_room[room - size].append(row)

    width = max(sum(map(len, filled)) for filled in rows)
    input_ids = np.full((len(rows), width), pad, dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    for n, filled in enumerate(rows):
        start = 0
        for piece in filled:
            end = start + len(piece)
            input_ids[n, start:end] = piece
            position_ids[n, start:end] = np.arange(len(piece))
            labels[n, start + 1 : end] = piece[1:]
            start = end
        position_ids[n, start:] = np.arange(width - start)
    return PackedRows(
        torch.from_numpy(input_ids), torch.from_numpy(position_ids), torch.from_numpy(labels),
        n_pieces=len(pieces),
    )  # fmt: skip


def cu_seqlens(position_ids: torch.Tensor) -> torch.Tensor:
    """Borders of the documents in the flattened rows, from positions that restart at 0.

    position_ids (B, L) -> (N + 1,) int32: starts of the N documents in order, and B L.
    """
    starts = torch.nonzero(position_ids.flatten() == 0).flatten()
    end = torch.tensor([position_ids.numel()], device=position_ids.device)
    return torch.cat([starts, end]).to(torch.int32)


class RowOrder:
    """Which rows a step takes: every row once in a pass, each pass in its own order.

    It is a function of (seed, step), so the position in the data needs no state of its own.
    """

    def __init__(self, n_rows: int, rows: int, accumulate: int, seed: int):
        self.n_rows, self.rows, self.accumulate, self.seed = n_rows, rows, accumulate, seed
        self._pass: tuple[int, list[int]] = (-1, [])

    def steps_for(self, epochs: float) -> int:
        """Steps that `epochs` passes take."""
        per_step = self.rows * self.accumulate
        return max(1, -(-round(epochs * self.n_rows) // per_step))

    def micro_batches(self, step: int) -> list[list[int]]:
        """The row numbers of each micro-batch of step 0, 1, ..."""
        first = step * self.rows * self.accumulate
        taken = [self._row(first + i) for i in range(self.rows * self.accumulate)]
        return [taken[i : i + self.rows] for i in range(0, len(taken), self.rows)]

    def _row(self, n: int) -> int:
        epoch, at = divmod(n, self.n_rows)
        if self._pass[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._pass = (epoch, torch.randperm(self.n_rows, generator=generator).tolist())
        return self._pass[1][at]
