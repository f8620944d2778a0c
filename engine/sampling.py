"""From logits to the next token of each request, by its own rule and its own random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tilewright.files import InputError
from tilewright.ops import sample_tokens


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen; the default is greedy.

    max_new_tokens      tokens at most, cut to what the model's context leaves
    temperature         divides the logits; 0 is greedy: the largest logit
    top_k               keep the k largest; 0 keeps all
    top_p               keep the fewest largest whose probabilities reach p; 1 keeps all
    min_p               drop what is less probable than p times the largest; 0 keeps all
    repetition_penalty  divides positive and multiplies negative logits of tokens that occurred in
                        the prompt or the output; 1 is none
    seed                of this request; its draws do not depend on the rest of the batch
    stop                strings that end the output and are not part of it

    The filters act in this order, each on what the one before has left, as in transformers.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(isinstance(s, str) and s for s in self.stop):
            raise InputError(f"stop is {self.stop!r}, need strings of at least one character")
        for name, smallest in (("max_new_tokens", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise InputError(f"{name} is {value!r}, need a whole number of at least {smallest}")
        needs = {
            "temperature": (0 <= self.temperature < math.inf, "a number of at least 0"),
            "top_p": (0 < self.top_p <= 1, "0 < top_p <= 1"),
            "min_p": (0 <= self.min_p <= 1, "0 <= min_p <= 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a positive number"),
        }
        for name, (is_right, need) in needs.items():
            if not is_right:
                raise InputError(f"{name} is {getattr(self, name)!r}, need {need}")


class Sampler:
    """The rules, steps and seen tokens of the B requests of a batch.

    rules    one `Sampling` a request
    prompts  each request's token ids
    """

    def __init__(self, rules: list[Sampling], prompts: list[list[int]], device: torch.device):
        self.rules = rules
        self.step = 0  # of all requests: they begin together
        self.seen: torch.Tensor | None = None  # (B, N) prompt and output, filled up with -1
        if any(rule.repetition_penalty != 1 for rule in rules):
            longest = max(len(prompt) for prompt in prompts)
            padded = [[*prompt, *[-1] * (longest - len(prompt))] for prompt in prompts]
            self.seen = torch.tensor(padded, device=device)

    def keep(self, rows: list[int]) -> None:
        """Go on with these requests only."""
        self.rules = [self.rules[row] for row in rows]
        if self.seen is not None:
            self.seen = self.seen[torch.tensor(rows, device=self.seen.device)]

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each request, (B,) int64, from logits (B, V)."""
        if self.seen is None and all(rule.temperature == 0 for rule in self.rules):
            return logits.argmax(-1)
        rules = self.rules
        tokens = sample_tokens(
            logits,
            temperature=[rule.temperature for rule in rules],
            top_k=[min(rule.top_k, logits.shape[-1]) for rule in rules],
            top_p=[rule.top_p for rule in rules],
            min_p=[rule.min_p for rule in rules],
            repetition_penalty=[rule.repetition_penalty for rule in rules],
            prompt=self.seen,
            seed=[rule.seed % (1 << 63) for rule in rules],
            step=self.step,
        )
        self.step += 1
        if self.seen is not None:
            self.seen = torch.cat([self.seen, tokens[:, None]], dim=1)
        return tokens
