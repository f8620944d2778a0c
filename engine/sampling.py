"""From logits to the next token of each request, by its own rule and its own random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tilewright.files import InputError


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
    """The rules, generators and seen tokens of the B requests of a batch.

    rules    one `Sampling` a request
    prompts  each request's token ids
    """

    def __init__(
        self, rules: list[Sampling], prompts: list[list[int]], vocab_size: int, device: torch.device
    ):
        self.rules = rules
        # one generator a request, on the CPU: the same numbers on every device and in any batch
        self.generators = [torch.Generator().manual_seed(rule.seed) for rule in rules]
        self.seen: torch.Tensor | None = None  # (B, V) bool
        if any(rule.repetition_penalty != 1 for rule in rules):
            self.seen = torch.zeros(len(rules), vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt, device=device)] = True

    def keep(self, rows: list[int]) -> None:
        """Go on with these requests only."""
        self.rules = [self.rules[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        if self.seen is not None:
            self.seen = self.seen[torch.tensor(rows, device=self.seen.device)]

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each request, (B,) int64, from logits (B, V)."""
        logits = self._penalized(logits)
        tokens = logits.argmax(-1)
        drawn = [row for row, rule in enumerate(self.rules) if rule.temperature > 0]
        if drawn:
            kept = filtered(logits[drawn], [self.rules[row] for row in drawn])
            # inverse of the distribution function at one uniform number a request, in float64
            cumulative = kept.softmax(-1).cumsum(-1)
            uniform = torch.tensor(
                [
                    torch.rand((), generator=self.generators[row], dtype=torch.float64).item()
                    for row in drawn
                ],
                dtype=torch.float64,
                device=logits.device,
            )
            target = (uniform * cumulative[:, -1])[:, None]
            tokens[drawn] = torch.searchsorted(cumulative, target, right=True)[:, 0]
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        if self.seen is None:
            return logits
        penalty = logits.new_tensor([rule.repetition_penalty for rule in self.rules])[:, None]
        changed = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(self.seen, changed, logits)


def filtered(logits: torch.Tensor, rules: list[Sampling]) -> torch.Tensor:
    """Logits / temperature in float64, -inf where a rule drops the token; (B, V) -> (B, V)."""

    def column(name: str) -> torch.Tensor:
        values = [getattr(rule, name) for rule in rules]
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scores = logits.double() / column("temperature")
    if not any(r.top_k or r.top_p < 1 or r.min_p for r in rules):
        return scores
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    vocab_size = ordered.shape[-1]

    # ties with the k-th largest are kept, as in transformers
    top_k = column("top_k").long()
    last = torch.where(top_k == 0, vocab_size, top_k).clamp(max=vocab_size) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last), -math.inf)

    # keep a token while the larger ones have not reached top_p together
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    top_p = column("top_p")
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -math.inf)

    probability = ordered.softmax(-1)
    is_rare = probability < column("min_p") * probability[:, :1]
    ordered = ordered.masked_fill(is_rare, -math.inf)
    return torch.full_like(scores, -math.inf).scatter(1, order, ordered)
