"""One way to compute what a benchmark times: ours, or a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


def _as_they_are(case: dict, inputs: dict) -> dict:
    return inputs


def _everywhere(case: dict) -> bool:
    return True


def _nothing_missing() -> None:
    return None


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Variant:
    """How one contender computes a case. Only `run` is timed.

    run       (case, **inputs) -> the output
    prepare   (case, inputs) -> the inputs in this variant's own best layout, by the same names
    restore   brings the output, or the gradient of a prepared input, back to the common layout
    applies   whether the case is one for this variant at all
    why_not   () -> what is missing here for it to run and how to get it, or None
    computes  options of the case that this variant computes differently, such as another mask; it
              is judged by its own meaning
    compiles  whether the first call compiles for many seconds: left out by --quick, and not
              compiled again for the check
    """

    run: Callable[..., torch.Tensor]
    prepare: Callable[[dict, dict], dict] = _as_they_are
    restore: Callable[[torch.Tensor], torch.Tensor] = _same
    applies: Callable[[dict], bool] = _everywhere
    why_not: Callable[[], str | None] = _nothing_missing
    computes: dict = field(default_factory=dict)
    compiles: bool = False


def call(variant: Variant, case: dict, inputs: dict, gradients: tuple[str, ...]):
    """A function without arguments that does the timed work: forward, and with `gradients` also
    the backward to those inputs. It returns the output and the gradients, in the variant's layout.
    """
    # detached copies: a variant's leaves are its own
    prepared = {
        name: t.detach().requires_grad_(name in gradients) if isinstance(t, torch.Tensor) else t
        for name, t in variant.prepare(case, inputs).items()
    }
    if not gradients:

        def forward():
            with torch.no_grad():
                return (variant.run(case, **prepared),)

        return forward

    leaves = [prepared[name] for name in gradients]
    upstream: list[torch.Tensor] = []

    def forward_and_backward():
        with torch.enable_grad():
            out = variant.run(case, **prepared)
            if not upstream:  # the same for every variant, in this one's layout; drawn once
                upstream.append(_upstream_like(variant.restore(out.detach()), variant))
            found = torch.autograd.grad(out, leaves, upstream[0], allow_unused=True)
            pairs = zip(found, leaves, strict=True)
            return (out, *(torch.zeros_like(leaf) if g is None else g for g, leaf in pairs))

    return forward_and_backward


def _upstream_like(out: torch.Tensor, variant: Variant) -> torch.Tensor:
    generator = torch.Generator(out.device).manual_seed(1)
    drawn = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32)
    # restore is its own inverse where a layout differs: an exchange of two axes
    return variant.restore(drawn.to(out.dtype))
