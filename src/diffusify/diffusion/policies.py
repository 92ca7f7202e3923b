"""What to write, and what to take back.

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
from diffusify.diffusion.step import StepState, kl_divergence, open_fraction


@dataclass(frozen=True)
class Unmask:
    """Write the best-ranked guesses, as many as the quota says; never take one back."""

    rank: Ranking = field(default_factory=Confidence)
    quota: Quota = field(default_factory=Evenly)

    def __call__(self, state: StepState) -> Move:
        write = select_top(self.rank(state), state.positions, self.quota(state))
        return Move(write, erase=torch.zeros_like(write))


@dataclass(frozen=True)
class Ancestral:
    """Write each guess with the reverse process's own chance at this step (MDLM, DiffuLLaMA); all at the last."""

    schedule: NoiseSchedule = field(default_factory=Linear)

    def __call__(self, state: StepState, remasked: Float[Tensor, " b"] | float = 0.0) -> Move:
        """`remasked` is the chance that a written token is taken back in this step; the others make up for it."""
        before, after = _survival(self.schedule, state)
        chance = (after - (1 - remasked) * before) / (1 - before)
        write = state.positions & (
            (state.rng.uniform(state.positions) < chance[:, None]) | (state.step + 1 >= state.steps)[:, None]
        )
        return Move(write, erase=torch.zeros_like(write))


@dataclass(frozen=True)
class Rdm:
    """Judge every position anew at every step and keep the surest (RDM, Diffusion-LLM).

    A `curve` says how many positions stay noise; a written token that falls among the least sure is taken back. When
    `conditional`, only if the network still gives that token, and is less sure of it than when it was written.
    `noise` adds so much Gumbel noise to the scores at first, and less along the curve (stochastic routing).
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
        share = open_fraction(self.curve, state)
        if self.noise:
            gumbel = -torch.log(-torch.log(state.rng.uniform(state.positions)))
            rank = rank + self.noise * share[:, None] * gumbel
        low = select_top(-rank, state.positions, (state.window_size * share + 1e-9).floor().long())
        falls = low & ~open
        if self.conditional:
            falls = falls & (state.guess.tokens == state.canvas.tokens) & (state.guess.score < state.score)
        return Move(write=state.positions & open & ~low, erase=falls)


@dataclass(frozen=True)
class ReMdm:
    """Any policy that writes, and written tokens taken back with a chance that keeps the noise level (ReMDM).

    `strategy`: the chance `eta` itself as far as it may be (cap), that share of the most it may be (rescale), or the most it
    may be shared out among the tokens by their doubt when they were written (confidence). Worth it where there are many
    more steps than tokens.
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
        before, after = _survival(self.schedule, state)
        most = ((1 - after) / before.clamp_min(1e-9)).clamp_max(1.0)
        written = state.window & ~state.canvas.open
        chance = (most.clamp_max(self.eta) if self.strategy == "cap" else self.eta * most)[:, None].expand(
            written.shape
        )
        if self.strategy == "confidence":
            doubt = torch.where(written, -state.score.exp(), -torch.inf).softmax(1).nan_to_num()
            chance = doubt * most[:, None]
        erase = written & (state.rng.uniform(written) < chance)
        if not state.positions.any():
            return Move(torch.zeros_like(erase), erase)
        if isinstance(self.policy, Ancestral):
            mean = (chance * written).sum(1) / written.sum(1).clamp_min(1)
            return Move(self.policy(state, mean).write, erase)
        return Move(self.policy(state).write, erase)


@dataclass(frozen=True)
class Klass:
    """Write what is likely and has settled; where nothing has, the surest guesses, evenly (KLASS).

    A guess has settled when the distribution at its position has moved by less than `kl_threshold` nats (KL from the step
    before) in each of the last `history_length` steps. With a probability above `threshold` it is then written.
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
        settled = state.positions & (state.guess.score > math.log(self.threshold))
        chain = (state, *state.history)
        for after, before in pairwise(chain):
            settled = settled & (kl_divergence(after, before) < self.kl_threshold)
        if len(chain) <= self.history_length:
            settled = torch.zeros_like(settled)
        usual = select_top(state.guess.score, state.positions, Evenly()(state))
        write = torch.where(settled.any(1, keepdim=True), settled, usual)
        return Move(write, erase=torch.zeros_like(write))


@dataclass(frozen=True)
class Wino:
    """Write boldly, read again what was written, and take back what no longer convinces (WINO).

    Guesses with a probability above `threshold` are written, up to `share` of what is open. A token written earlier in the
    window is taken back if, from all the rest of the text, it has a probability below `threshold_back`: the least likely first,
    and always fewer than the last step wrote, so that the end is reached. Needs a model that sees both ways.
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
        most = (self.share * open.sum(1)).long().clamp_min(5)
        bold = (open & (state.guess.score > math.log(self.threshold))).sum(1)
        write = select_top(state.guess.score, open, torch.minimum(bold, most).clamp_min(1))
        written = state.positions & ~state.canvas.open
        before = state.history[0].canvas if state.history else state.canvas
        fresh = (before.open & written).sum(1)  # written by the last step
        chance = state.scatter(state.logits.log_prob(state.canvas.tokens[state.positions]))
        doubted = written & (chance < math.log(self.threshold_back))
        return Move(write, erase=select_top(-chance, doubted, (fresh - 1).clamp_min(0)))


def _survival(schedule: NoiseSchedule, state: StepState) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """The shares of text before and after this step."""
    steps = state.steps.clamp_min(1)
    return schedule.alpha(1 - state.step / steps), schedule.alpha(1 - (state.step + 1) / steps)


Policy = Unmask | Ancestral | Rdm | ReMdm | Klass | Wino
