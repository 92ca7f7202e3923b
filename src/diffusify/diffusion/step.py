"""What the rules of decoding look at: the text as it stands at a step, and what the network says about it.

Axes: b texts, n positions, k asked positions (row by row), v vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.rng import RowGenerators


@dataclass(frozen=True)
class StepState:
    """Everything a policy may look at. Steps count within the window, row by row."""

    canvas: Canvas
    score: Float[Tensor, "b n"]  # how sure each written token was when it was written
    positions: Bool[
        Tensor, "b n"
    ]  # where there are guesses: the open positions of `window`, or all if a policy rereads
    logits: LazyLogits  # at the asked positions, row by row
    window: Bool[Tensor, "b n"]  # the positions that are worked on together, those already written included
    step: Int[Tensor, " b"]
    steps: Int[Tensor, " b"]
    pick: Callable[[Tensor, Tensor, RowGenerators], tuple[Tensor, Tensor]]
    rng: RowGenerators
    history: tuple["StepState", ...] = ()  # moments before this one, the latest first, as many as the policy remembers

    @cached_property
    def guess(self) -> Guess:
        """What would be written, at all asked positions. A policy that does not look at it spares the work."""
        return self._pick(self.positions)

    def guess_at(self, write: Bool[Tensor, "b n"]) -> Guess:
        """What is written, at these positions at least."""
        return self.guess if "guess" in self.__dict__ else self._pick(write)

    def _pick(self, where: Bool[Tensor, "b n"]) -> Guess:
        tokens, score = self.canvas.tokens.clone(), torch.full_like(self.score, -torch.inf)
        places = where.nonzero()
        done = 0
        for part in self.logits[where[self.positions]].parts():
            row, position = places[done : done + len(part)].unbind(1)
            these = torch.zeros_like(where)
            these[row, position] = True
            picked, sure = self.pick(part, these, self.rng)
            tokens[row, position], score[row, position] = picked, sure.to(score.dtype)
            done += len(part)
        return Guess(tokens, score)

    @property
    def window_size(self) -> Int[Tensor, " b"]:
        return self.window.sum(1)

    def scatter(self, values: Float[Tensor, " k"]) -> Float[Tensor, "b n"]:
        """Values of the asked positions, back in their places; -inf elsewhere."""
        out = torch.full_like(self.score, -torch.inf)
        return out.masked_scatter(self.positions, values.to(out.dtype))


def open_fraction(curve: Literal["linear", "cosine"], state: StepState) -> Float[Tensor, " b"]:
    """The share of positions that a curve leaves open after this step: none after the last."""
    done = (state.step + 1).double() / state.steps
    return (1 - done if curve == "linear" else torch.cos(math.pi / 2 * done)).clamp_min(0)


def kl_divergence(state: StepState, before: StepState) -> Float[Tensor, "b n"]:
    """How far the distribution at each position has come since another moment: KL in nats, inf if it had none."""
    both = state.positions & before.positions
    parts = (each.logits[both[each.positions]].parts() for each in (state, before))
    kl = torch.full(both.shape, torch.inf, device=both.device)
    return kl.masked_scatter(both, torch.cat([_kl(*pair) for pair in zip(*parts, strict=True)]))


def _kl(p_logits: Float[Tensor, "k v"], before: Float[Tensor, "k v"]) -> Float[Tensor, " k"]:
    p, q = p_logits.log_softmax(-1), before.log_softmax(-1)
    return torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum(-1).float()
