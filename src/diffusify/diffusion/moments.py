"""What the rules of decoding look at: the text as it stands at a step, and what the network says about it.

Axes: b texts, n positions, k asked positions (row by row), v vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess
from diffusify.diffusion.luck import Luck


@dataclass(frozen=True)
class Moment:
    """Everything a policy may look at. Steps count within the window, row by row."""

    canvas: Canvas
    guess: Guess
    score: Float[Tensor, "b n"]  # how sure each written token was when it was written
    asked: Bool[Tensor, "b n"]  # where there are guesses: the open positions of `here`, or all if a policy rereads
    logits: Float[Tensor, "k v"]  # at the asked positions
    here: Bool[Tensor, "b n"]  # the positions that are worked on together, those already written included
    step: Int[Tensor, " b"]
    steps: Int[Tensor, " b"]
    luck: Luck
    earlier: tuple["Moment", ...] = ()  # moments before this one, the latest first, as many as the policy remembers

    @property
    def size(self) -> Int[Tensor, " b"]:
        return self.here.sum(1)

    def spread(self, values: Float[Tensor, " k"]) -> Float[Tensor, "b n"]:
        """Values of the asked positions, back in their places; -inf elsewhere."""
        out = values.new_full(self.asked.shape, -torch.inf)
        return out.masked_scatter(self.asked, values)


def open_share(curve: Literal["linear", "cosine"], now: Moment) -> Float[Tensor, " b"]:
    """The share of positions that a curve leaves open after this step: none after the last."""
    done = (now.step + 1).double() / now.steps
    return (1 - done if curve == "linear" else torch.cos(math.pi / 2 * done)).clamp_min(0)


def moved(now: Moment, before: Moment) -> Float[Tensor, "b n"]:
    """How far the distribution at each position has come since another moment: KL in nats, inf if it had none."""
    both = now.asked & before.asked
    p, q = (moment.logits[both[moment.asked]].log_softmax(-1) for moment in (now, before))
    kl = torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum(-1)
    return kl.new_full(both.shape, torch.inf).masked_scatter(both, kl)
