"""What an error is worth.

Axes: b texts, n positions, k open positions (row by row), j positions of the AR co-loss, v vocabulary.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Noised
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class Elbo:
    """-alpha'(t) / (1 - alpha(t)), which makes the loss a bound on the negative log-likelihood; 1/t when linear."""

    def __call__(self, t: Float[Tensor, "..."], schedule: NoiseSchedule) -> Float[Tensor, "..."]:
        return schedule.rate(t)


@dataclass(frozen=True)
class RdmWeight:
    """T - (Tt - 1) for T = `steps` discrete times: more weight to little noise (RDM, Diffusion-LLM)."""

    former_name: ClassVar[str] = "Rdm"
    steps: int = 50

    def __call__(self, t: Float[Tensor, "..."], schedule: NoiseSchedule) -> Float[Tensor, "..."]:
        return self.steps * (1 - t) + 1


@dataclass(frozen=True)
class Flat:
    """1 at every time (MaskGIT, plain masked language modelling)."""

    def __call__(self, t: Float[Tensor, "..."], schedule: NoiseSchedule) -> Float[Tensor, "..."]:
        return torch.ones_like(t)


Weight = Elbo | RdmWeight | Flat


class _CrossEntropy(torch.autograd.Function):
    """Float32 arithmetic in chunks of rows: a vocabulary-wide float32 copy of all logits never exists."""

    CHUNK = 128

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        parts = logits.split(_CrossEntropy.CHUNK)
        norm = torch.cat([part.float().logsumexp(-1) for part in parts])
        wanted = logits.gather(-1, targets[:, None])[:, 0].float()
        if smoothing:
            possible = torch.cat([part.isfinite().sum(-1) for part in parts])
            total = torch.cat([part.float().masked_fill(part.isinf(), 0.0).sum(-1) for part in parts])
            wanted = (1 - smoothing) * wanted + smoothing * total / possible
        ctx.save_for_backward(logits, targets, norm)
        ctx.smoothing = smoothing
        return norm - wanted

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, norm = ctx.saved_tensors
        out = torch.empty_like(logits)
        pieces = (x.split(_CrossEntropy.CHUNK) for x in (logits, targets, norm, grad, out))
        for part, target, total, worth, into in zip(*pieces, strict=True):
            chance = (part.float() - total[:, None]).exp_()
            if ctx.smoothing:
                possible = part.isfinite()
                chance -= possible * (ctx.smoothing / possible.sum(-1, keepdim=True))
            chance.scatter_add_(-1, target[:, None], chance.new_full((len(target), 1), ctx.smoothing - 1))
            into.copy_(chance.mul_(worth[:, None]))
        return out, None, None


class _Divergence(torch.autograd.Function):
    """The cross-entropy with another network's distribution, in chunks; its gradient is that of the KL divergence."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor) -> Tensor:
        pairs = zip(logits.split(_CrossEntropy.CHUNK), teacher.split(_CrossEntropy.CHUNK), strict=True)
        parts = [_told(part, told) for part, told in pairs]
        ctx.save_for_backward(logits, teacher)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, teacher = ctx.saved_tensors
        out = torch.empty_like(logits)
        pieces = (x.split(_CrossEntropy.CHUNK) for x in (logits, teacher, grad, out))
        for part, told, worth, into in zip(*pieces, strict=True):
            difference = part.float().softmax(-1) - told.float().softmax(-1)
            into.copy_(difference.mul_(worth[:, None]))
        return out, None


def _told(logits: Tensor, teacher: Tensor) -> Tensor:
    z = logits.float()
    return z.logsumexp(-1) - (teacher.float().softmax(-1) * z.masked_fill(z.isinf(), 0.0)).sum(-1)


def divergence(logits: Float[Tensor, "k v"], teacher: Float[Tensor, "k v"]) -> Float[Tensor, " k"]:
    """The cross-entropy (nats, float32) of the teacher's distribution with ours; only ours gets a gradient.

    It is KL(teacher | ours) but for the teacher's own entropy. Logits may be bfloat16 and hold -inf in the same places.
    """
    return _Divergence.apply(logits, teacher)  # pyright: ignore[reportReturnType]


def cross_entropy(
    logits: Float[Tensor, "k v"], targets: Int[Tensor, " k"], label_smoothing: float = 0.0
) -> Float[Tensor, " k"]:
    """The negative log-probability (nats, float32) of each target; logits may be bfloat16 and hold -inf.

    `label_smoothing` gives that share of the target to all tokens alike, save those that cannot be (-inf).
    """
    return _CrossEntropy.apply(logits, targets, label_smoothing)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Loss:
    """A sum and the count it is to be divided by, once, over the whole global batch.

    `nll` (nats, per open position) and `ar_nll` are there to be reported.
    """

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]
    nll: Float[Tensor, " k"]
    ar_nll: Float[Tensor, " j"]


@dataclass(frozen=True)
class Objective:
    """Weighted cross-entropy at the open positions, per editable token, per open token (DiffuLLaMA) or per text (RDM).

    `ar_weight` adds the next-token loss of the clean text beside the noisy one, estimated on `ar_share` of its tokens.
    `distill` is the share of the loss at open positions that takes a left-to-right model's next-token distribution for
    the truth, rather than the next token (forward KL): that of the network's `own` left-to-right half as it is by then,
    or that of the `base` as it was when the run began.
    `label_smoothing` is for training from scratch (RDM: 0.1). `length_weight` is what the length head's loss counts
    for beside it, where there is one.
    """

    weight: Weight = Elbo()
    per: Literal["editable", "open", "text"] = "editable"
    ar_weight: float = 0.0
    ar_share: float = 0.25
    distill: float = 0.0
    teacher: Literal["own", "base"] = "own"
    label_smoothing: float = 0.0
    length_weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 1); 0.0 is none, 0.1 is usual")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill={self.distill} must be in [0, 1]; 0.0 is none, 1.0 is nothing else")
        if self.ar_weight < 0 or not 0 < self.ar_share <= 1:
            raise ValueError(
                f"ar_weight={self.ar_weight} must be at least 0 and ar_share={self.ar_share} in (0, 1]; "
                "ar_weight=0.0 turns the AR co-loss off"
            )

    def count(self, canvas: Canvas) -> Float[Tensor, ""]:
        """What the loss of these canvases is divided by."""
        if self.per == "open":
            return canvas.open.sum().float()
        if self.per == "editable":
            return canvas.editable.sum().float()
        return (canvas.sizes > 0).sum().float()

    def ar_targets(self, noised: Noised) -> Bool[Tensor, "b n"]:
        """Where the clean text's next-token logits are wanted."""
        return noised.ar_positions | noised.canvas.open if self.taught_by("own") else noised.ar_positions

    def taught_by(self, teacher: Literal["own", "base"]) -> bool:
        """Whether this teacher is asked about open positions."""
        return self.distill > 0 and self.teacher == teacher

    def __call__(
        self,
        logits: LazyLogits,
        ar_logits: LazyLogits,
        noised: Noised,
        schedule: NoiseSchedule,
        taught: LazyLogits | None = None,
    ) -> Loss:
        """The loss of logits at the open positions, and of the clean text's where `ar_targets` says.

        `taught` are those of another teacher than the network itself, about the open positions.
        """
        canvas, open = noised.canvas, noised.canvas.open
        share = torch.ones_like(noised.t)
        if self.per == "text":
            share = share / canvas.sizes.gather(1, canvas.document).clamp_min(1)
        targets, worth = noised.clean[open], (self.weight(noised.t, schedule) * share)[open]
        asked = self.ar_targets(noised)
        own = torch.where(open[asked])[0]  # which of the clean text's answers are about open positions

        def about(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            error = cross_entropy(logits, targets[index], self.label_smoothing)
            nll = cross_entropy(logits.detach(), targets[index]) if self.label_smoothing else error.detach()
            if self.distill:
                told = ar_logits.raw(own[index]) if taught is None else taught.raw(index)
                error = (1 - self.distill) * error + self.distill * divergence(logits, told)
            return (error * worth[index]).sum(), nll

        total, nll = logits.total(about)
        next_tokens = noised.clean[noised.ar_positions]
        next_worth = (
            share[noised.ar_positions] * noised.views * self.ar_weight / self.ar_share
        )  # one clean text for all views

        def further(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            error = cross_entropy(logits, next_tokens[index])
            return (error * next_worth[index]).sum(), error.detach()

        ar_total, ar_nll = ar_logits[noised.ar_positions[asked]].total(further)
        return Loss(total + ar_total, self.count(canvas), nll, ar_nll)
