"""Objectives that learn from rewards: policy gradients of sampled texts, clipped as in PPO and GRPO.

Axes: b texts, g texts of a group, n positions, c canvases (v views of each text), k scored positions (row by row).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.bounds import control_variate_estimates, stratified_masks
from diffusify.diffusion.corruption import Noised, PerBlock, TimeSampler, noised
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.objectives import cross_entropy
from diffusify.diffusion.schedules import NoiseSchedule

NEVER = 2**31 - 1  # the step of a position that was not written


@dataclass(frozen=True)
class SampledTexts:
    """Sampled texts to learn from, one per row.

    `canvas` is as the sampler left it, `scored` its answers up to their end token, `step` the decoding step at which
    each position was written (`NEVER` where none did), `advantage` that of each text. Nothing after the end of an
    answer is ever scored.
    """

    canvas: Canvas
    scored: Bool[Tensor, "b n"]
    step: Int[Tensor, "b n"]
    advantage: Float[Tensor, " b"]

    def __getitem__(self, rows: slice) -> "SampledTexts":
        return SampledTexts(self.canvas[rows], self.scored[rows], self.step[rows], self.advantage[rows])

    def to(self, device: torch.device | str) -> "SampledTexts":
        """The texts on a device."""
        rest = (each.to(device) for each in (self.scored, self.step, self.advantage))
        return SampledTexts(self.canvas.to(device), *rest)


@dataclass(frozen=True)
class PolicyLoss:
    """The sum of a policy's loss. `kl` (nats) and `clipped` are summed over what `count` counts: tokens or texts."""

    total: Float[Tensor, ""]
    kl: Float[Tensor, ""]
    clipped: Float[Tensor, ""]
    count: int


def group_advantages(rewards: Float[Tensor, "b g"]) -> Float[Tensor, "b g"]:
    """The reward of each text of a group minus the mean of the others; NaN rewards are left out and get 0.

    This baseline leaves the gradient of the expected reward unbiased (RLOO). It is GRPO's A = R - mean(R) times
    g / (g - 1). Equal rewards give exactly 0.
    """
    known = ~rewards.isnan()
    values, count = rewards.nan_to_num(0.0), known.sum(1, keepdim=True)
    others = (values.sum(1, keepdim=True) - values) / (count - 1).clamp_min(1)
    highest, lowest = (rewards.nan_to_num(fill) for fill in (-torch.inf, torch.inf))
    differ = highest.amax(1, keepdim=True) > lowest.amin(1, keepdim=True)
    return torch.where(known & differ, values - others, 0.0)


def token_log_probs(logits: LazyLogits, tokens: Int[Tensor, " k"], temperature: float = 1.0) -> Float[Tensor, " k"]:
    """The log-probability of a token at each position, with gradient, under the distribution it was sampled from."""
    return logits.checkpointed_map(lambda chunk, index: -cross_entropy(chunk / temperature, tokens[index]))


@dataclass(frozen=True)
class _ClippedRatios:
    """Ratios of new to old probabilities, clipped by `clip`, and the weight of the KL divergence from the reference."""

    clip: float = 0.2
    kl_weight: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise ValueError(f"clip={self.clip} must be between 0 and 1, the largest change of a ratio; 0.2 is usual")
        if self.kl_weight < 0:
            raise ValueError(
                f"kl_weight={self.kl_weight} must be at least 0, which needs no reference model; 0.01 is usual"
            )

    def scored(self, noised: Noised) -> Bool[Tensor, "c n"]:
        """The positions whose log-probabilities are needed."""
        return noised.targets

    def loss(self, log_ratio: Tensor, advantage: Tensor, kl: Tensor | None) -> PolicyLoss:
        """PPO's clipped surrogate, negated, with the KL divergence; tokens or texts alike."""
        ratio = log_ratio.exp()
        clamped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = torch.minimum(ratio * advantage, clamped * advantage)
        kl = torch.zeros_like(gain) if kl is None else kl
        is_clipped = clamped * advantage < ratio * advantage
        total = (self.kl_weight * kl - gain).sum()
        return PolicyLoss(total, kl.detach().sum(), is_clipped.sum().float(), len(gain))


@dataclass(frozen=True)
class _TokenRatios(_ClippedRatios):
    """One clipped ratio for each token, and the k3 estimate of the KL divergence, per token."""

    def count(self, texts: SampledTexts) -> Float[Tensor, ""]:
        """The loss is a mean over tokens."""
        return texts.scored.sum().float()

    def __call__(
        self,
        log_prob: Float[Tensor, " k"],
        old: Float[Tensor, " k"],
        reference: Float[Tensor, " k"] | None,
        noised: Noised,
        texts: SampledTexts,
    ) -> PolicyLoss:
        """The loss, from the log-probabilities of the scored positions now, when sampled, and before training."""
        row = self.scored(noised).nonzero()[:, 0] // noised.views
        kl = None if reference is None else (reference - log_prob).expm1() - (reference - log_prob)
        return self.loss(log_prob - old, texts.advantage[row], kl)


@dataclass(frozen=True)
class Grpo(_TokenRatios):
    """GRPO on the exact likelihoods of the AR half of a block model, whose lossless decoding samples from just that.

    There is one ratio for each token, clipped by `clip`. `kl_weight` is the weight of the KL divergence from the model
    as it was before. `drafts` is the weight of the diffusion loss on the same texts, which teaches the drafts what the
    AR half has learned; 0 leaves them behind. (GRPO: DeepSeekMath; on diffusion models: JustGRPO.) ValueError for a
    setting out of range.
    """

    reads_ar_half: ClassVar[bool] = True
    drafts: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drafts < 0:
            raise ValueError(f"drafts={self.drafts} must be at least 0, which no longer teaches the drafts")

    def canvases(
        self,
        texts: SampledTexts,
        time: TimeSampler,
        schedule: NoiseSchedule,
        noise: int,
        generator: Generator | None = None,
    ) -> Noised:
        """The answers up to their end, noised for the drafts; the clean copy is what is scored."""
        document = torch.where(texts.canvas.editable & ~texts.scored, 0, texts.canvas.document)
        clean = Canvas.clean(texts.canvas.tokens, document, texts.scored)
        result = noised(clean, time, schedule, noise, generator=generator)
        first = torch.arange(len(result.clean)) % result.views == 0  # all views share the clean copy
        scored = texts.scored.repeat_interleave(result.views, 0) & first[:, None]
        return replace(result, ar_positions=scored, weight=result.weight * (self.drafts > 0))

    def scored(self, noised: Noised) -> Bool[Tensor, "c n"]:
        """The answers' tokens."""
        return noised.ar_positions


@dataclass(frozen=True)
class TraceRl(_TokenRatios):
    """GRPO along the decoding trajectory of a block model, for texts that were decoded by a threshold (TraceRL).

    The tokens of each step are scored given what stood when the step was taken: a view of the text for each step of a
    block, in one pass with its clean copy. ValueError for a setting out of range.
    """

    reads_ar_half: ClassVar[bool] = False

    def canvases(
        self,
        texts: SampledTexts,
        time: TimeSampler,
        schedule: NoiseSchedule,
        noise: int,
        generator: Generator | None = None,
    ) -> Noised:
        """What stood before each step of each block; the tokens that the step wrote are scored."""
        assert isinstance(time, PerBlock), "reinforce refuses TraceRl for models without blocks"
        canvas = texts.canvas
        rank = _steps_before(texts.step, canvas.position_ids // time.size)
        scored_rank = torch.where(texts.scored, rank, -1)
        views = int(scored_rank.max()) + 1
        view, rows = torch.arange(views)[:, None], torch.arange(len(rank)).repeat_interleave(views)
        open = ((rank[:, None] >= view) & canvas.editable[:, None]).flatten(0, 1)
        target = (scored_rank[:, None] == view).flatten(0, 1)
        noisy = replace(canvas[rows], tokens=torch.where(open, noise, canvas.tokens[rows]), open=open)
        return Noised(noisy, canvas.tokens[rows], torch.ones(open.shape), torch.zeros_like(open), target.float(), views)


@dataclass(frozen=True)
class Espo(_ClippedRatios):
    """ESPO, for models that attend to both sides: one ratio for each text, exp((ELBO - old ELBO) / L).

    The ELBO of an answer of L tokens is estimated on `samples` canvases with stratified mask counts and control
    variates. The KL divergence, per token, is the k2 estimate of its difference from the reference's ELBO. ValueError
    for a setting out of range.
    """

    reads_ar_half: ClassVar[bool] = False
    samples: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1 canvas for each text; 2 is usual")

    def canvases(
        self,
        texts: SampledTexts,
        time: TimeSampler,
        schedule: NoiseSchedule,
        noise: int,
        generator: Generator | None = None,
    ) -> Noised:
        """`samples` canvases of each text. What follows the end of an answer is open, as it may be in sampling."""
        behind = texts.canvas.editable & ~texts.scored
        clean = Canvas.clean(texts.canvas.tokens, texts.canvas.document, texts.scored)
        masks = list(stratified_masks(clean, torch.zeros_like(clean.tokens), self.samples, noise, generator))
        target = torch.stack([canvas.open for canvas, _ in masks], 1).flatten(0, 1)
        share = torch.stack([open_share for _, open_share in masks], 1).flatten(0, 1)
        rows = torch.arange(len(behind)).repeat_interleave(self.samples)
        open = target | behind[rows]
        canvas = replace(texts.canvas[rows], tokens=torch.where(open, noise, clean.tokens[rows]), open=open)
        weight = torch.where(target, 1 / share, 0.0)
        return Noised(canvas, clean.tokens[rows], share, torch.zeros_like(open), weight, self.samples)

    def count(self, texts: SampledTexts) -> Float[Tensor, ""]:
        """The loss is a mean over texts."""
        return torch.tensor(float(len(texts.advantage)))

    def __call__(
        self,
        log_prob: Float[Tensor, " k"],
        old: Float[Tensor, " k"],
        reference: Float[Tensor, " k"] | None,
        noised: Noised,
        texts: SampledTexts,
    ) -> PolicyLoss:
        """The loss of texts, from the log-probabilities of the open positions, as those of `Grpo`."""
        length = texts.scored.sum(1)
        elbo, old_elbo = self.elbo(log_prob, noised, texts), self.elbo(old, noised, texts)
        kl = None
        if reference is not None:
            kl = 0.5 * (elbo - self.elbo(reference, noised, texts)).square() / length
        return self.loss((elbo - old_elbo) / length, texts.advantage, kl)

    def elbo(self, log_prob: Float[Tensor, " k"], noised: Noised, texts: SampledTexts) -> Float[Tensor, " b"]:
        """The ELBO of each answer in nats, with gradient."""
        target = self.scored(noised)
        nll = torch.zeros(target.shape, device=log_prob.device).masked_scatter(target, -log_prob)
        nll, target, share = (x.unflatten(0, (-1, noised.views)).transpose(0, 1) for x in (nll, target, noised.t))
        return -control_variate_estimates(nll, target, share, texts.scored).mean(0)


# `canvases` chooses what the sampled texts are scored on: the same for the policy as it was when it sampled, as it is,
# and for the reference model. The positions `scored` are predicted by the AR half if `reads_ar_half` is set, else by
# the denoiser. The sum of losses is divided by the `count` of a step's texts.
PolicyObjective = Grpo | TraceRl | Espo


def _steps_before(step: Int[Tensor, "b n"], block: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The number of different steps of each position's block before its own."""
    same = block[:, :, None] == block[:, None]
    at = torch.arange(step.shape[1])
    earlier_twin = same & (step[:, :, None] == step[:, None]) & (at[None, :] < at[:, None])
    is_first = ~earlier_twin.any(-1)
    return (same & (step[:, None] < step[:, :, None]) & is_first[:, None]).sum(-1)
