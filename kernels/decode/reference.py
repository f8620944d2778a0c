"""The meaning of the decode room's operators, in torch and float64."""

import math

import torch

_MASK = 0xFFFFFFFF


def philox(seeds: torch.Tensor, steps: torch.Tensor) -> list[torch.Tensor]:
    """Philox4x32-10 with the seed as key and (step, 0, 0) as counter: four words of 32 bits."""
    k0, k1 = seeds & _MASK, seeds >> 32 & _MASK
    c0, c1 = steps & _MASK, steps >> 32 & _MASK
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        wide0, wide2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64: the bits are right
        c0, c1 = (wide2 >> 32 & _MASK) ^ c1 ^ k0, wide2 & _MASK
        c2, c3 = (wide0 >> 32 & _MASK) ^ c3 ^ k1, wide0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return [c0, c1, c2, c3]


def uniform(seeds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """(B,) float64 in [0, 1), of 53 bits."""
    high, low, _, _ = philox(seeds, steps)
    return ((high >> 5).double() * 2.0**26 + (low >> 6).double()) * 2.0**-53


def occurrences(ids: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """(B, V): how often each token is among the ids (B, N); negative ids count for nothing."""
    counts = torch.zeros_like(like)
    if ids is None:
        return counts
    return counts.scatter_add_(1, ids.clamp(min=0), (ids >= 0).to(counts.dtype))


def penalized(logits, prompt, output, repetition, presence, frequency) -> torch.Tensor:
    """x / r or x r for what occurred, by x's sign; minus presence and frequency of the output."""
    x = logits.double()
    count = occurrences(output, x)
    has_occurred = occurrences(prompt, x) + count > 0
    repeated = torch.where(x < 0, x * repetition, x / repetition)
    x = torch.where(has_occurred, repeated, x)
    return torch.where(count > 0, x - frequency * count - presence, x)


def kept(scores, top_k, top_p, min_p) -> torch.Tensor:
    """(B, V) bool: what top_k, then top_p, then min_p leave; (B, 1) each."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    size = ordered.shape[-1]
    last = torch.where(top_k == 0, size, top_k).clamp(max=size) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last), -math.inf)

    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), -math.inf)

    probability = ordered.softmax(-1)
    is_rare = probability < min_p * probability[:, :1]
    is_kept = ~is_rare & (ordered > -math.inf)
    return torch.zeros_like(is_kept).scatter(1, order, is_kept)


def sample_tokens(logits, reals, wholes, prompt, output):
    """(B,) int64 and (B,) float64: the tokens, and their log-probabilities before the filters."""
    columns = reals.double()[:, :, None].unbind(1)
    temperature, top_p, min_p, repetition, presence, frequency = columns
    top_k, seeds, steps = wholes.unbind(1)
    x = penalized(logits, prompt, output, repetition, presence, frequency)
    is_greedy = temperature == 0
    scores = x / torch.where(is_greedy, 1.0, temperature)

    left = scores.masked_fill(~kept(scores, top_k[:, None], top_p, min_p), -math.inf)
    cumulative = left.softmax(-1).cumsum(-1)
    target = uniform(seeds, steps)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)
    tokens = torch.where(is_greedy, x.argmax(-1, keepdim=True), drawn)
    return tokens[:, 0], scores.log_softmax(-1).gather(1, tokens)[:, 0]


def divergence(z: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """(B,): KL(softmax(z + delta) || softmax(z))."""
    log_p, log_q = (z.double() + delta).log_softmax(-1), z.double().log_softmax(-1)
    ratio = torch.where(log_p > -math.inf, log_p - log_q, 0.0)  # what z masks weighs nothing
    return (log_p.exp() * ratio).sum(-1).clamp(min=0)


def strength(z, delta, wanted, most) -> torch.Tensor:
    """(B,): the a in [0, most] with divergence(z, a delta) = wanted, or `most` if it lies above.

    By halving: the divergence grows with a."""
    low, high = torch.zeros_like(wanted), most.clone()
    reaches = divergence(z, most[:, None] * delta) > wanted
    for _ in range(60):
        middle = (low + high) / 2
        value = divergence(z, middle[:, None] * delta)
        low, high = (
            torch.where(value > wanted, low, middle),
            torch.where(value < wanted, high, middle),
        )
    return torch.where(wanted > 0, torch.where(reaches, (low + high) / 2, most), 0.0)


def strengths(large, tuned, base, rule: str, a_max: float, points: int) -> torch.Tensor:
    """(B, T): how strong each expert is, by a rule of `fuse_logits`."""
    deltas = [t.double() - base.double() for t in tuned]
    wanted = torch.stack([divergence(base, delta) for delta in deltas], 1)
    wanted = torch.where(wanted > 1e-12, wanted, 0.0)  # below is rounding
    if rule == "grid":
        ticks = torch.linspace(0, a_max, points, dtype=torch.float64, device=large.device)
        grid = torch.cartesian_prod(*[ticks] * len(deltas)).view(-1, len(deltas))
        misses = []
        for point in grid:
            value = divergence(large, sum(a * d for a, d in zip(point, deltas, strict=True)))
            misses.append(((value[:, None] - wanted) ** 2).sum(-1))
        return grid[torch.stack(misses).argmin(0)]
    most = torch.full_like(wanted[:, 0], a_max)
    a = torch.stack([strength(large, d, wanted[:, t], most) for t, d in enumerate(deltas)], 1)
    if len(deltas) == 1:
        return a
    largest = a.amax(1)
    fused = torch.stack([a[:, t, None] * d for t, d in enumerate(deltas)]).sum(0)
    mean = torch.where(largest > 0, wanted.mean(1), 0.0)
    most = a_max / torch.where(largest > 0, largest, 1.0)
    return a * strength(large, fused, mean, most)[:, None]
