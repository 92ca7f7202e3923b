"""The state of a decoding step that policies decide on: the canvas, and the model's logits and guesses for it.

Axes: b texts, n positions, k selected positions (row by row), v vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess
from diffusify.diffusion.length_tokens import Columns
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.precision import widest_float
from diffusify.diffusion.rng import RowGenerators


@dataclass(frozen=True)
class StepState:
    """The inputs of a policy. Steps are counted within the current window, row by row."""

    canvas: Canvas
    score: Float[Tensor, "b n"]  # the log-probability of each written token when it was written
    positions: Bool[Tensor, "b n"]  # with logits: the open ones of `window`, or all if the policy rescores tokens
    logits: LazyLogits  # at `positions`, row by row
    window: Bool[Tensor, "b n"]  # the positions that are decoded together, including those already written
    step: Int[Tensor, " b"]
    steps: Int[Tensor, " b"]
    pick: Callable[[Tensor, Tensor, RowGenerators], tuple[Tensor, Tensor]]
    rng: RowGenerators
    history: tuple["StepState", ...] = ()  # earlier steps, the latest first, up to the policy's `history_length`

    @property
    def guess(self) -> Guess:
        """The proposed tokens at all `positions`, computed on first use, since some policies do not need them."""
        if (
            "guess" not in self.__dict__
        ):  # in Python 3.11 a cached_property holds a lock, also while a loop is suspended
            self.__dict__["guess"] = self._pick(self.positions)
        return self.__dict__["guess"]

    def guess_at(self, write: Bool[Tensor, "b n"]) -> Guess:
        """The proposed tokens at `write`, and at all `positions` if they have been computed already."""
        return self.guess if "guess" in self.__dict__ else self._pick(write)

    def _pick(self, positions: Bool[Tensor, "b n"]) -> Guess:
        tokens, score = self.canvas.tokens.clone(), torch.full_like(self.score, -torch.inf)
        places = positions.nonzero()
        done = 0
        for chunk in self.logits[positions[self.positions]].chunks():
            row, position = places[done : done + len(chunk)].unbind(1)
            chunk_positions = torch.zeros_like(positions)
            chunk_positions[row, position] = True
            picked, log_prob = self.pick(chunk, chunk_positions, self.rng)
            tokens[row, position], score[row, position] = picked, log_prob.to(score.dtype)
            done += len(chunk)
        return Guess(tokens, score)

    def moved(self, columns: Columns) -> "StepState":
        """The state with positions in other columns; positions that are new or gone have no logits."""
        kept = columns.counts(self.positions.shape[1]) == 1
        return replace(
            self,
            canvas=columns.take_canvas(self.canvas),
            score=columns.take(self.score),
            positions=columns.take(self.positions & kept, False),
            logits=self.logits[kept[self.positions]],
            window=columns.take(self.window, False),
        )

    @property
    def window_size(self) -> Int[Tensor, " b"]:
        """The number of positions in each row's window."""
        return self.window.sum(1)

    def scatter(self, values: Float[Tensor, " k"]) -> Float[Tensor, "b n"]:
        """Values at `positions` as a [b, n] tensor, with -inf elsewhere."""
        out = torch.full_like(self.score, -torch.inf)
        return out.masked_scatter(self.positions, values.to(out.dtype))


def open_fraction(curve: Literal["linear", "cosine"], state: StepState) -> Float[Tensor, " b"]:
    """The share of positions that a curve leaves open after this step; 0 after the last step."""
    progress = (state.step + 1).to(widest_float(state.step.device)) / state.steps
    return (1 - progress if curve == "linear" else torch.cos(math.pi / 2 * progress)).clamp_min(0)


def open_count(curve: Literal["linear", "cosine"], state: StepState) -> Int[Tensor, " b"]:
    """The number of the window's positions that a curve leaves open after this step, rounded down."""
    share = open_fraction(curve, state)
    return (state.window_size * (share + 4 * torch.finfo(share.dtype).eps)).floor().long()


def kl_divergence(state: StepState, before: StepState) -> Float[Tensor, "b n"]:
    """KL(state | before) in nats at each position; inf where one of the two has no logits."""
    both = state.positions & before.positions
    chunks = (each.logits[both[each.positions]].chunks() for each in (state, before))
    kl = torch.full(both.shape, torch.inf, device=both.device)
    return kl.masked_scatter(both, torch.cat([_kl(*pair) for pair in zip(*chunks, strict=True)]))


def _kl(p_logits: Float[Tensor, "k v"], q_logits: Float[Tensor, "k v"]) -> Float[Tensor, " k"]:
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum(-1).float()
