"""Policies: which tokens to write in a decoding step, and which to remask.

Axes: b texts, n positions.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffusify.canvas import Move
from diffusify.diffusion.quotas import Evenly, Quota
from diffusify.diffusion.ranking import Confidence, Ranking, select_top
from diffusify.diffusion.schedules import Linear, NoiseSchedule
from diffusify.diffusion.step import StepState, kl_divergence, open_count, open_fraction


@dataclass(frozen=True)
class Unmask:
    """Write the best-ranked guesses, as many as the quota says; never remask."""

    rank: Ranking = field(default_factory=Confidence)
    quota: Quota = field(default_factory=Evenly)

    def __call__(self, state: StepState) -> Move:
        write = select_top(self.rank(state), state.positions, self.quota(state))
        return Move(write, erase=torch.zeros_like(write))


@dataclass(frozen=True)
class Ancestral:
    """Ancestral sampling: write each guess with the reverse process's probability (MDLM, DiffuLLaMA).

    The last step writes all guesses.
    """

    schedule: NoiseSchedule = field(default_factory=Linear)

    def __call__(self, state: StepState, remasked: Float[Tensor, " b"] | float = 0.0) -> Move:
        """`remasked` is the probability that a written token is remasked in this step; more is written to offset it."""
        before, after = _clean_shares(self.schedule, state)
        prob = (after - (1 - remasked) * before) / (1 - before)
        write = state.positions & (
            (state.rng.uniform(state.positions) < prob[:, None]) | (state.step + 1 >= state.steps)[:, None]
        )
        return Move(write, erase=torch.zeros_like(write))


@dataclass(frozen=True)
class Rdm:
    """Rescore every position at every step and keep the most confident (RDM, Diffusion-LLM).

    `curve` sets how many positions stay noise; a written token among the least confident is remasked. If `conditional`,
    this happens only if the network still predicts the token, with a lower probability than when it was written.
    `noise` scales the Gumbel noise added to the scores, which decreases along the curve (stochastic routing).
    Raises ValueError if `noise` is negative.
    """

    former_name: ClassVar[str] = "Reparam"
    remasks: ClassVar[bool] = True
    rescores: ClassVar[bool] = True
    curve: Literal["linear", "cosine"] = "cosine"
    conditional: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.noise < 0:
            raise ValueError(f"noise={self.noise} must be at least 0; 0.0 is deterministic routing")

    def __call__(self, state: StepState) -> Move:
        open, rank = state.canvas.open, state.guess.score
        if self.noise:
            gumbel = -torch.log(-torch.log(state.rng.uniform(state.positions)))
            rank = rank + self.noise * open_fraction(self.curve, state)[:, None] * gumbel
        low = select_top(-rank, state.positions, open_count(self.curve, state))
        erase = low & ~open
        if self.conditional:
            erase = erase & (state.guess.tokens == state.canvas.tokens) & (state.guess.score < state.score)
        return Move(write=state.positions & open & ~low, erase=erase)


@dataclass(frozen=True)
class ReMdm:
    """Remasking on top of a policy: written tokens are remasked at random, at an unchanged noise level (ReMDM).

    The remasking probability is `eta`, at most the largest possible one (strategy "cap"), `eta` times that
    ("rescale"), or that spread over the tokens by their uncertainty when written ("confidence"). It helps where there
    are many more steps than tokens. Raises ValueError if `eta` is not in [0, 1].
    """

    former_name: ClassVar[str] = "Remask"
    former_fields: ClassVar[dict[str, str]] = {"how": "strategy"}
    remasks: ClassVar[bool] = True
    policy: Unmask | Ancestral = field(default_factory=Ancestral)
    strategy: Literal["cap", "rescale", "confidence"] = "rescale"
    eta: float = 0.02
    schedule: NoiseSchedule = field(default_factory=Linear)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must be in [0, 1]; 0.02 is usual")

    def __call__(self, state: StepState) -> Move:
        before, after = _clean_shares(self.schedule, state)
        largest = ((1 - after) / before.clamp_min(1e-9)).clamp_max(1.0)
        written = state.window & ~state.canvas.open
        prob = largest.clamp_max(self.eta) if self.strategy == "cap" else self.eta * largest
        prob = prob[:, None].expand(written.shape)
        if self.strategy == "confidence":
            uncertainty = torch.where(written, -state.score.exp(), -torch.inf).softmax(1).nan_to_num()
            prob = uncertainty * largest[:, None]
        erase = written & (state.rng.uniform(written) < prob)
        if not state.positions.any():
            return Move(torch.zeros_like(erase), erase)
        if isinstance(self.policy, Ancestral):
            mean = (prob * written).sum(1) / written.sum(1).clamp_min(1)
            return Move(self.policy(state, mean).write, erase)
        return Move(self.policy(state).write, erase)


@dataclass(frozen=True)
class Klass:
    """Write confident guesses with a stable distribution; where there is none, as `Evenly` does (KLASS).

    A distribution is stable if its KL divergence from the previous step was below `kl_threshold` nats in each of the
    last `history_length` steps. Guesses there are written if their probability is above `threshold`. Raises ValueError
    for a setting out of range.
    """

    former_name: ClassVar[str] = "Stable"
    former_fields: ClassVar[dict[str, str]] = {
        "least": "threshold",
        "drift": "kl_threshold",
        "rounds": "history_length",
    }
    threshold: float = 0.6
    kl_threshold: float = 0.01
    history_length: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be a probability in (0, 1]; 0.6 is usual")
        if self.kl_threshold <= 0:
            raise ValueError(f"kl_threshold={self.kl_threshold} must be above 0 nats; 0.01 is usual")
        if self.history_length < 1:
            raise ValueError(f"history_length={self.history_length} must be at least 1; 2 is usual")

    def __call__(self, state: StepState) -> Move:
        stable = state.positions & (state.guess.score > math.log(self.threshold))
        states = (state, *state.history)
        for after, before in pairwise(states):
            stable = stable & (kl_divergence(after, before) < self.kl_threshold)
        if len(states) <= self.history_length:
            stable = torch.zeros_like(stable)
        fallback = select_top(state.guess.score, state.positions, Evenly()(state))
        write = torch.where(stable.any(1, keepdim=True), stable, fallback)
        return Move(write, erase=torch.zeros_like(write))


@dataclass(frozen=True)
class Wino:
    """Write many tokens per step, verify those already written, and remask the unlikely ones (WINO).

    Guesses with a probability above `threshold` are written, up to `share` of the open positions or 5. A token written
    earlier in the window is remasked if its probability given the rest of the text is below `threshold_back`: the least
    likely first, and fewer than the last step wrote, so that decoding ends. It requires a bidirectional model. Raises
    ValueError if a setting is not in (0, 1].
    """

    rescores: ClassVar[bool] = True
    needs_shadow: ClassVar[bool] = True
    history_length: ClassVar[int] = 1
    former_name: ClassVar[str] = "Revoke"
    former_fields: ClassVar[dict[str, str]] = {"least": "threshold", "keep": "threshold_back"}
    threshold: float = 0.6
    threshold_back: float = 0.9
    share: float = 0.7

    def __post_init__(self) -> None:
        for name, value in (
            ("threshold", self.threshold),
            ("threshold_back", self.threshold_back),
            ("share", self.share),
        ):
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be in (0, 1]; {getattr(Wino, name)} is usual")

    def __call__(self, state: StepState) -> Move:
        open = state.positions & state.canvas.open
        limit = (self.share * open.sum(1)).long().clamp_min(5)
        confident = (open & (state.guess.score > math.log(self.threshold))).sum(1)
        write = select_top(state.guess.score, open, torch.minimum(confident, limit).clamp_min(1))
        written = state.positions & ~state.canvas.open
        before = state.history[0].canvas if state.history else state.canvas
        just_written = (before.open & written).sum(1)
        log_prob = state.scatter(state.logits.log_prob(state.canvas.tokens[state.positions]))
        unlikely = written & (log_prob < math.log(self.threshold_back))
        return Move(write, erase=select_top(-log_prob, unlikely, (just_written - 1).clamp_min(0)))


def _clean_shares(schedule: NoiseSchedule, state: StepState) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """The shares of clean text that the schedule sets before and after this step."""
    steps = state.steps.clamp_min(1)
    return schedule.alpha(1 - state.step / steps), schedule.alpha(1 - (state.step + 1) / steps)


Policy = Unmask | Ancestral | Rdm | ReMdm | Klass | Wino
