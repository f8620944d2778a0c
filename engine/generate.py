"""Text generation: batches with left padding over transformers' cache, whole or as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import nn

from tilewright.data import TokenizerLike
from tilewright.files import InputError
from tilewright.pretrained import base_of, config_of, method_of
from tilewright.sampling import Sampler, Sampling

BROKEN = "�"  # what a tokenizer writes for bytes that are not whole characters (yet)


@dataclass(frozen=True)
class Generation:
    """What one prompt gave.

    text    the new text without special tokens and without the stop string; "" without a tokenizer
    tokens  the new token ids, the end token included
    reason  "end" an end token, "stop" a stop string, "length" max_new_tokens or the model's context
    """

    text: str
    tokens: list[int]
    reason: str


@dataclass(frozen=True)
class Piece:
    """A part of a stream: text that will not change any more.

    index   of the prompt
    text    new text, whole characters; may be empty
    token   the token that brought it
    reason  None, and with the prompt's last piece why it ended, as in `Generation`
    """

    index: int
    text: str
    token: int
    reason: str | None = None


Prompts = str | Sequence[str] | Sequence[Sequence[int]]
Samplings = Sampling | Sequence[Sampling] | None


@overload
def generate(
    model: nn.Module, prompts: Prompts, *, tokenizer: TokenizerLike | None = None,
    sampling: Samplings = None, seed: int | Sequence[int] = 0, stream: Literal[False] = False,
    **options,
) -> list[Generation]: ...  # fmt: skip
@overload
def generate(
    model: nn.Module, prompts: Prompts, *, tokenizer: TokenizerLike | None = None,
    sampling: Samplings = None, seed: int | Sequence[int] = 0, stream: Literal[True],
    **options,
) -> Iterator[Piece]: ...  # fmt: skip
def generate(
    model: nn.Module,
    prompts: Prompts,
    *,
    tokenizer: TokenizerLike | None = None,
    sampling: Samplings = None,
    seed: int | Sequence[int] = 0,
    stream: bool = False,
    **options,
) -> list[Generation] | Iterator[Piece]:
    """Continue each prompt with a causal language model, all prompts in one batch.

    model      of transformers or PEFT, accelerated or not; evaluation mode is used meanwhile
    prompts    strings, or lists of token ids; one string is one prompt
    tokenizer  needed for strings and for stop strings
    sampling   a `Sampling` for all prompts or one for each; instead of it its fields can be passed:
    seed       one for all prompts, or one for each
    stream     return an iterator of `Piece`s instead, in the order in which they come
    options    max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop

    Greedy output is, token for token, that of transformers' `model.generate` in float32. The random
    numbers of a request depend on its seed alone; its logits do not depend on the batch either, up
    to the rounding of torch's matrix products, which may vary with the number of rows.
    InputError (a ValueError): an empty prompt, one that fills the model's context, a token outside
    the vocabulary, an option outside its range.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    rules = _rules(sampling, seed, options, len(prompts))
    if tokenizer is None and any(rule.stop for rule in rules):
        raise InputError("generate: stop needs a tokenizer")
    requests = [
        _Request(i, _prompt_ids(i, p, tokenizer), r, tokenizer)
        for i, (p, r) in enumerate(zip(prompts, rules, strict=True))
    ]
    _check_context(model, requests)
    pieces = _pieces(model, requests, _end_ids(model, tokenizer))
    if stream:
        return pieces
    for _ in pieces:
        pass
    return [Generation(r.text, r.tokens, r.reason or "length") for r in requests]


def _rules(sampling, seed, options: dict, n: int) -> list[Sampling]:
    known = [f for f in Sampling.__dataclass_fields__ if f != "seed"]
    for name in options:
        if name not in known:
            raise InputError(f"generate: no option {name!r}. Known: {', '.join(known)}")
    if sampling is not None and options:
        raise InputError("generate: pass sampling or its fields, not both")
    if sampling is not None and not isinstance(sampling, Sampling):
        rules = list(sampling)
        if len(rules) != n:
            raise InputError(f"generate: {len(rules)} samplings for {n} prompts, need one for each")
        return rules
    if isinstance(seed, int):
        rule = sampling if sampling is not None else Sampling(seed=seed, **options)
        return [rule] * n
    seeds = list(seed)
    if len(seeds) != n:
        raise InputError(f"generate: {len(seeds)} seeds for {n} prompts, need one for each")
    rule = sampling if sampling is not None else Sampling(**options)
    return [replace(rule, seed=s) for s in seeds]


def _prompt_ids(index: int, prompt, tokenizer) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError(f"generate: prompt {index} is a string: pass the model's tokenizer")
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = [int(token) for token in prompt]
    if not ids:
        raise InputError(f"generate: prompt {index} is empty, need at least one token")
    return list(ids)


def _check_context(model: nn.Module, requests: list[_Request]) -> None:
    config = config_of(model).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and _has_prefix(model):
        context -= model.active_peft_config.num_virtual_tokens  # type: ignore[union-attr, operator]
    for request in requests:
        n = len(request.prompt)
        if context is not None and n >= context:
            raise InputError(
                f"generate: prompt {request.index} has {n} tokens, need fewer than the model's "
                f"context of {context}"
            )
        if context is not None:
            request.n_most = min(request.n_most, context - n)
        bad = [token for token in request.prompt if not 0 <= token < config.vocab_size]
        if bad:
            raise InputError(
                f"generate: prompt {request.index} holds token {bad[0]}, "
                f"need 0 to {config.vocab_size - 1}"
            )


def _end_ids(model: nn.Module, tokenizer) -> set[int]:
    settings = getattr(model, "generation_config", None)
    end = getattr(settings, "eos_token_id", None)
    if end is None:
        end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        return set()
    return set(end) if isinstance(end, (list, tuple)) else {end}


class _Request:
    """One prompt on its way: its tokens so far, and the text of them that is settled."""

    def __init__(self, index: int, prompt: list[int], rule: Sampling, tokenizer):
        self.index, self.prompt, self.rule, self.tokenizer = index, prompt, rule, tokenizer
        self.n_most = rule.max_new_tokens
        self.tokens: list[int] = []
        self.text = ""  # as far as it was handed out
        self.decoded = ""  # everything whole so far, of which the end may belong to a stop string
        self.window = 0  # tokens before it are decoded for good
        self.reason: str | None = None

    def accept(self, token: int, ends: set[int]) -> Piece:
        """Take the next token; the piece of text that is settled by it."""
        self.tokens.append(token)
        if token in ends:
            self.reason = "end"
        elif len(self.tokens) >= self.n_most:
            self.reason = "length"
        if self.tokenizer is None:
            return Piece(self.index, "", token, self.reason)
        self._decode()
        settled = self._settled()
        new, self.text = settled[len(self.text) :], settled
        return Piece(self.index, new, token, self.reason)

    def _decode(self) -> None:
        # tokens are decoded together from `window` on, because a character may span several; once
        # the text is whole, the window moves up, so that long outputs cost no more than short ones
        context = self.tokens[max(0, self.window - 4) : self.window]
        both = self._string(context + self.tokens[self.window :])
        if both.endswith(BROKEN) and self.reason is None:
            return
        self.decoded += both[len(self._string(context)) :]
        self.window = len(self.tokens)

    def _string(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _settled(self) -> str:
        """The decoded text up to a stop string, or to what may become one."""
        found = [at for s in self.rule.stop if (at := self.decoded.find(s)) >= 0]
        if found:
            self.reason = "stop"
            return self.decoded[: min(found)]
        if self.reason is not None:
            return self.decoded
        held = 0
        for s in self.rule.stop:
            for n in range(min(len(s) - 1, len(self.decoded)), held, -1):
                if self.decoded.endswith(s[:n]):
                    held = n
                    break
        return self.decoded[: len(self.decoded) - held]


def _pieces(model: nn.Module, requests: list[_Request], ends: set[int]) -> Iterator[Piece]:
    """Prefill, then one forward a token for the requests that go on."""
    # these bring transformers in, which takes seconds
    from tilewright.cache import new_cache
    from tilewright.step import Stepper

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        live = list(requests)
        batch, longest = len(live), max((len(r.prompt) for r in live), default=0)
        input_ids = torch.zeros(batch, longest, dtype=torch.long, device=device)
        mask = torch.zeros(batch, longest, dtype=torch.long, device=device)
        for row, request in enumerate(live):
            n = len(request.prompt)
            input_ids[row, longest - n :] = torch.tensor(request.prompt, device=device)
            mask[row, longest - n :] = 1
        sampler = Sampler([r.rule for r in live], [r.prompt for r in live], device)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        inner, cache = model, _prefix_of(model, batch)
        if cache is None:
            cache = new_cache(model.config)
        else:  # PEFT's forward would begin anew at each token
            inner, n_prefix = base_of(model), cache.get_seq_length()
            mask = torch.cat([mask.new_ones(batch, n_prefix), mask], dim=1)
            position_ids = position_ids + n_prefix
        step = Stepper(inner, cache)
        while live:
            tokens = sampler.draw(step(input_ids, mask, position_ids))
            for request, token in zip(live, tokens.tolist(), strict=True):
                yield request.accept(token, ends)
            rows = [row for row, request in enumerate(live) if request.reason is None]
            position_ids = position_ids[:, -1:] + 1
            if len(rows) < len(live):
                live = [live[row] for row in rows]
                if not live:
                    break
                index = torch.tensor(rows, device=device)
                sampler.keep(rows)
                step.settle()
                cache.batch_select_indices(index)
                tokens, mask, position_ids = tokens[index], mask[index], position_ids[index]
            input_ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
    finally:
        model.train(was_training)


@torch.no_grad()
def _prefix_of(model: nn.Module, batch: int):
    """The cache that holds the keys and values of PEFT's prefix tuning, or None without such."""
    return method_of(model, "get_prompt")(batch) if _has_prefix(model) else None


def _has_prefix(model: nn.Module) -> bool:
    config = getattr(model, "active_peft_config", None)
    return getattr(config, "peft_type", None) == "PREFIX_TUNING"
