"""Training objectives: weighted cross-entropy at open positions, the AR co-loss and distillation.

Axes: b texts, n positions, k open positions (row by row), j positions of the AR co-loss, v vocabulary.
"""

from collections.abc import Iterator
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
    """The weight -alpha'(t) / (1 - alpha(t)), which makes the loss the NELBO; 1/t for the linear schedule."""

    def __call__(self, t: Float[Tensor, "..."], schedule: NoiseSchedule) -> Float[Tensor, "..."]:
        return schedule.rate(t)


@dataclass(frozen=True)
class RdmWeight:
    """The weight T - (Tt - 1) for T = `steps` discrete times, which is higher at low noise (RDM, Diffusion-LLM)."""

    former_name: ClassVar[str] = "Rdm"
    steps: int = 50

    def __call__(self, t: Float[Tensor, "..."], schedule: NoiseSchedule) -> Float[Tensor, "..."]:
        return self.steps * (1 - t) + 1


@dataclass(frozen=True)
class Flat:
    """The weight 1 at every time (MaskGIT, BERT)."""

    def __call__(self, t: Float[Tensor, "..."], schedule: NoiseSchedule) -> Float[Tensor, "..."]:
        return torch.ones_like(t)


Weight = Elbo | RdmWeight | Flat

CANDIDATES = 64  # for each draft, of which a draft head chooses
_CACHED_VALUES = 2**18  # float32 values of a CPU's cache
_ROWS_ELSEWHERE = 128


def _row_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of the rows of logits and of what belongs to them, whose float32 copies fit into a processor's cache."""
    logits = tensors[0]
    rows = max(1, _CACHED_VALUES // logits.shape[-1]) if logits.device.type == "cpu" else _ROWS_ELSEWHERE
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy in float32, in chunks of rows, so that a float32 copy of all logits never exists."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        log_norm = torch.cat([chunk.float().logsumexp(-1) for (chunk,) in _row_chunks(logits)])
        target_logit = logits.gather(-1, targets[:, None])[:, 0].float()
        if smoothing:
            possible = torch.cat([chunk.isfinite().sum(-1) for (chunk,) in _row_chunks(logits)])
            total = torch.cat([chunk.float().masked_fill(chunk.isinf(), 0).sum(-1) for (chunk,) in _row_chunks(logits)])
            target_logit = (1 - smoothing) * target_logit + smoothing * total / possible
        ctx.save_for_backward(logits, targets, log_norm)
        ctx.smoothing = smoothing
        return log_norm - target_logit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, log_norm = ctx.saved_tensors
        logits_grad = torch.empty_like(logits)
        for chunk, target, norm, upstream, out in _row_chunks(logits, targets, log_norm, grad, logits_grad):
            probs = (chunk.float() - norm[:, None]).exp_()
            if ctx.smoothing:
                possible = chunk.isfinite()
                probs -= possible * (ctx.smoothing / possible.sum(-1, keepdim=True))
            probs.scatter_add_(-1, target[:, None], probs.new_full((len(target), 1), ctx.smoothing - 1))
            out.copy_(probs.mul_(upstream[:, None]))
        return logits_grad, None, None


class _Divergence(torch.autograd.Function):
    """Cross-entropy with a teacher's distribution, in part replaced by the total variation distance, in chunks.

    The gradient is computed together with the loss, since both need the same probabilities.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, total_variation: float) -> Tensor:
        losses, logits_grad = [], torch.empty_like(logits)
        for chunk, teacher_chunk, out in _row_chunks(logits, teacher, logits_grad):
            z, teacher_probs = chunk.float(), teacher_chunk.float().softmax(-1)
            z = z.clamp_min(torch.finfo(z.dtype).min)  # -inf times a probability of 0 is not a number
            log_norm = z.logsumexp(-1)
            loss = log_norm - (teacher_probs * z).sum(-1)
            probs = z.sub_(log_norm[:, None]).exp_()
            difference = probs - teacher_probs
            if total_variation:
                sign = difference.sign()
                loss = loss.lerp(0.5 * (difference * sign).sum(-1), total_variation)
                distance_grad = 0.5 * probs * (sign - (probs * sign).sum(-1, keepdim=True))
                difference.lerp_(distance_grad, total_variation)
            losses.append(loss)
            out.copy_(difference)
        ctx.save_for_backward(logits_grad)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (logits_grad,) = ctx.saved_tensors
        scaled = torch.empty_like(logits_grad)
        for chunk, upstream, out in _row_chunks(logits_grad, grad, scaled):
            torch.mul(chunk, upstream[:, None], out=out)
        return scaled, None, None


def divergence(
    logits: Float[Tensor, "k v"], teacher: Float[Tensor, "k v"], total_variation: float = 0.0
) -> Float[Tensor, " k"]:
    """The cross-entropy (nats, float32) of the logits with a teacher's distribution; only `logits` gets a gradient.

    It is KL(teacher | logits) plus the entropy of the teacher. A share `total_variation` of it is replaced by the total
    variation distance, which is the probability that a draft is rejected. Logits may be bfloat16 and -inf in the same
    places.
    """
    return _Divergence.apply(logits, teacher, total_variation)  # pyright: ignore[reportReturnType]


def cross_entropy(
    logits: Float[Tensor, "k v"], targets: Int[Tensor, " k"], label_smoothing: float = 0.0
) -> Float[Tensor, " k"]:
    """The negative log-probability (nats, float32) of each target; logits may be bfloat16 and contain -inf.

    `label_smoothing` spreads that share of the target evenly over all tokens whose logits are finite.
    """
    return _CrossEntropy.apply(logits, targets, label_smoothing)  # pyright: ignore[reportReturnType]


def _entropy_of_right_ones(logits: Float[Tensor, "k v"], targets: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    """The entropy (nats) of the predictions whose likeliest token is the target, 0 for others."""
    log_probs = logits.float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs.isinf(), 0.0)).sum(-1)
    return torch.where(logits.argmax(-1) == targets, entropy, 0.0)


def _candidates(
    logits: Float[Tensor, "k v"], truth: Float[Tensor, "k v"] | Int[Tensor, " k"]
) -> tuple[Int[Tensor, "k c"], Float[Tensor, "k c"]]:
    """The likeliest tokens at each position, and their true probabilities: a teacher's, or 1 for the text's token."""
    tokens = logits.topk(min(CANDIDATES, logits.shape[-1]), -1).indices
    if truth.ndim == 1:
        return tokens, (tokens == truth[:, None]).float()
    log_norm = torch.cat([chunk.float().logsumexp(-1) for (chunk,) in _row_chunks(truth)])
    return tokens, (truth.gather(-1, tokens).float() - log_norm[:, None]).exp()


@dataclass(frozen=True)
class Loss:
    """The sum of a loss, and the count to divide it by once the whole global batch is summed.

    `nll` (nats, per open position) and `ar_nll` are unweighted and without gradient, for metrics.
    """

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]
    nll: Float[Tensor, " k"]
    ar_nll: Float[Tensor, " j"]


@dataclass(frozen=True)
class Objective:
    """Weighted cross-entropy at open positions, per editable token, per open token (DiffuLLaMA) or per text (RDM).

    `ar_weight` adds the next-token loss of the clean copy of the text, estimated on `ar_share` of its tokens.
    `distill` is the share of the loss at open positions that uses an AR teacher's next-token distribution as the
    target instead of the token itself (forward KL). The teacher is the network's `own` AR half as it is trained, or the
    `base` model as it was before training. A share `total_variation` of that target's loss is the total variation
    distance, which is the rate at which speculative decoding rejects drafts. `entropy` adds so many times the entropy
    of predictions that are already right (whose likeliest token is the target's), which makes them confident enough for
    threshold decoding (dParallel: 1.0). `label_smoothing` is for training from scratch (RDM: 0.1). `length_weight` is
    the weight of the length head's loss, for models that have one.

    Raises ValueError if a share is out of its range or `ar_weight` is negative.
    """

    weight: Weight = Elbo()
    per: Literal["editable", "open", "text"] = "editable"
    ar_weight: float = 0.0
    ar_share: float = 0.25
    distill: float = 0.0
    teacher: Literal["own", "base"] = "own"
    total_variation: float = 0.0
    entropy: float = 0.0
    label_smoothing: float = 0.0
    length_weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must be in [0, 1); 0.0 disables it, and 0.1 is usual"
            )
        if not 0 <= self.distill <= 1:
            raise ValueError(
                f"distill={self.distill} must be in [0, 1]; 0.0 disables distillation, and 1.0 uses only the teacher"
            )
        if not 0 <= self.total_variation <= 1 or (self.total_variation and not self.distill):
            raise ValueError(
                f"total_variation={self.total_variation} must be in [0, 1], and is a share of the loss to a teacher, "
                f"so it needs distill above 0, not {self.distill}; 0.9 is usual"
            )
        if self.entropy < 0:
            raise ValueError(f"entropy={self.entropy} must be at least 0, which disables it; 1.0 is usual")
        if self.ar_weight < 0 or not 0 < self.ar_share <= 1:
            raise ValueError(
                f"ar_weight={self.ar_weight} must be at least 0 and ar_share={self.ar_share} in (0, 1]; "
                "ar_weight=0.0 disables the AR co-loss"
            )

    def count(self, canvas: Canvas) -> Float[Tensor, ""]:
        """The number that the loss of these canvases is divided by, as chosen with `per`."""
        if self.per == "open":
            return canvas.open.sum().float()
        if self.per == "editable":
            return canvas.editable.sum().float()
        return (canvas.sizes > 0).sum().float()

    def ar_targets(self, noised: Noised) -> Bool[Tensor, "b n"]:
        """The positions whose next-token logits on the clean text are needed, for the co-loss or the teacher."""
        return noised.ar_positions | noised.targets if self.distills_from("own") else noised.ar_positions

    def distills_from(self, teacher: Literal["own", "base"]) -> bool:
        """Whether the loss at open positions uses this teacher."""
        return self.distill > 0 and self.teacher == teacher

    def __call__(
        self,
        logits: LazyLogits,
        ar_logits: LazyLogits,
        noised: Noised,
        schedule: NoiseSchedule,
        teacher_logits: LazyLogits | None = None,
    ) -> Loss:
        """The loss, from the logits at `noised.targets` and the clean text's next-token logits at `ar_targets`.

        `teacher_logits` are those of the `base` teacher at the targets; the `own` teacher is in `ar_logits`. Where the
        logits know what follows each token before (a draft head), the loss of these predictions is added.
        """
        canvas, trained = noised.canvas, noised.targets
        share = torch.ones_like(noised.t)
        if self.per == "text":
            share = share / canvas.sizes.gather(1, canvas.document).clamp_min(1)
        targets, weight = noised.clean[trained], (self.weight(noised.t, schedule) * share * noised.weight)[trained]
        ar_targets = self.ar_targets(noised)
        teacher_index = torch.where(trained[ar_targets])[0]  # the entries of ar_logits at the targets
        logits_after = logits.after_previous
        candidates: list[tuple[Tensor, Tensor]] = []  # of the draft head, and their probabilities

        def diffusion_loss(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            learns_text = self.distill < 1
            loss = cross_entropy(logits if learns_text else logits.detach(), targets[index], self.label_smoothing)
            nll = cross_entropy(logits.detach(), targets[index]) if self.label_smoothing else loss.detach()
            teacher = None
            if self.distill:
                teacher = ar_logits.raw(teacher_index[index]) if teacher_logits is None else teacher_logits.raw(index)
                loss = (1 - self.distill) * loss + self.distill * divergence(logits, teacher, self.total_variation)
            if self.entropy:
                right = targets[index] if teacher is None else teacher.argmax(-1)
                loss = loss + self.entropy * _entropy_of_right_ones(logits, right)
            if logits_after is not None:
                candidates.append(_candidates(logits.detach(), targets[index] if teacher is None else teacher))
            return (loss * weight[index]).sum(), nll

        total, nll = logits.chunked_loss(diffusion_loss)
        if logits_after is not None:
            tokens, probs = (torch.cat(values) for values in zip(*candidates, strict=True))
            scores = logits_after(tokens)[:, 0].float()
            scores = scores.clamp_min(torch.finfo(scores.dtype).min)  # -inf times a probability of 0 is not a number
            total = total - ((probs * scores.log_softmax(-1)).sum(-1) * weight).sum()
        ar_tokens = noised.clean[noised.ar_positions]
        # times `views`, since the clean text counts once for all of them
        ar_weight = share[noised.ar_positions] * noised.views * self.ar_weight / self.ar_share

        def ar_loss(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            loss = cross_entropy(logits, ar_tokens[index])
            return (loss * ar_weight[index]).sum(), loss.detach()

        ar_total, ar_nll = ar_logits[noised.ar_positions[ar_targets]].chunked_loss(ar_loss)
        return Loss(total + ar_total, self.count(canvas), nll, ar_nll)
