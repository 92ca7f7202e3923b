"""Likelihoods of texts under a denoiser: the NELBO, and exact log-probabilities along a decoding order.

The NELBO (negative evidence lower bound) is an upper bound on the negative log-likelihood.

Axes: b texts, n positions, s samples, k open positions (row by row), v vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.objectives import cross_entropy
from diffusify.diffusion.precision import widest_float

# (noisy canvas, clean tokens) -> logits [k, v] at the canvas's open positions, row by row
Predictor = Callable[[Canvas, Tensor], Tensor]


@dataclass(frozen=True)
class Bound:
    """An estimate of the NELBO in nats per position: `nll` sums to the bound of each text.

    `masked` pairs the unweighted cross-entropy at every position that was open in some sample with the noise level
    there: the open share of its unit.
    """

    nll: Float[Tensor, "b n"]
    masked: Float[Tensor, "k 2"]


def stratified_masks(
    clean: Canvas,
    unit: Int[Tensor, "b n"],
    samples: int,
    noise: int,
    generator: Generator | None = None,
    *,
    same_noise: bool = False,
) -> Iterator[tuple[Canvas, Float[Tensor, "b n"]]]:
    """Noisy canvases for estimating the NELBO, and the open share of each position's unit.

    In a unit (a document, or a block) of L editable positions exactly l are open, with l uniform in 1..L and
    stratified over the samples. The weight L / l gives the continuous-time bound of every schedule, with much less
    variance than independent masking at a random time (LLaDA). `same_noise` uses the same random numbers for every row
    (common random numbers), which lowers the variance of differences between similar rows.
    """
    b, n = clean.tokens.shape
    row = torch.arange(b, device=unit.device)[:, None]
    key = ((row * (unit.max() + 1) + unit) * 2 + clean.editable).flatten()
    key = key.unique(return_inverse=True)[1]  # units of the whole batch, from 0; what is not editable is separate
    size = torch.bincount(key)
    units = int(unit.max()) + 1
    phase = torch.rand(1 if same_noise else b, units, generator=generator).to(key.device).expand(b, -1)
    phase = torch.zeros_like(size, dtype=phase.dtype).scatter(0, key, phase.gather(1, unit).flatten())
    for sample in range(samples):
        count = ((phase + sample / samples).frac() * size).long() + 1
        uniform = torch.rand(1 if same_noise else b, n, generator=generator, dtype=torch.float64)
        order = (key.cpu() + uniform.expand(b, -1).flatten()).argsort().to(key.device)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(b * n, device=key.device) - (size.cumsum(0) - size)[key[order]]
        open = (rank < count[key]).view(b, n) & clean.editable
        share = (count / size)[key].view(b, n)
        yield replace(clean, tokens=torch.where(open, noise, clean.tokens), open=open), share


def control_variate_estimates(
    nll: Float[Tensor, "s b n"],
    open: Bool[Tensor, "s b n"],
    share: Float[Tensor, "s b n"],
    editable: Bool[Tensor, "b n"],
) -> Float[Tensor, "s b"]:
    """The NELBO of each text in nats, estimated from each of s samples of `stratified_masks` with control variates.

    The control variate of a token is its mean cross-entropy in the other samples, or that of all tokens where none of
    them opened it (leave-one-out). The estimate stays unbiased, and depends less on which tokens a sample opens.
    """
    nll = nll.masked_fill(~open, 0.0)
    other_sum, other_count = nll.sum(0) - nll, open.sum(0) - open.long()
    text_mean = other_sum.sum(-1, keepdim=True) / other_count.sum(-1, keepdim=True).clamp_min(1)
    expected = torch.where(other_count > 0, other_sum / other_count.clamp_min(1), text_mean)
    return (torch.where(open, (nll - expected) / share, 0.0) + expected * editable).sum(-1)


@torch.no_grad()
def estimate_bound(
    predict: Predictor,
    clean: Canvas,
    unit: Int[Tensor, "b n"],
    *,
    noise: int,
    samples: int = 4,
    generator: Generator | None = None,
) -> Bound:
    """A Monte Carlo estimate of the NELBO, the bound on -log p(text), in nats."""
    total = torch.zeros(clean.tokens.shape, device=clean.tokens.device)
    masked = []
    for canvas, share in stratified_masks(clean, unit, samples, noise, generator):
        nll = cross_entropy(predict(canvas, clean.tokens), clean.tokens[canvas.open])
        total += torch.zeros_like(total).masked_scatter(canvas.open, nll) / share / samples
        masked.append(torch.stack([nll, share[canvas.open]], 1))
    return Bound(total, torch.cat(masked))


@torch.no_grad()
def log_probability(predict: Predictor, clean: Canvas, order: Int[Tensor, "b n"], *, noise: int) -> Float[Tensor, " b"]:
    """The exact log-probability of the editable tokens when they are decoded one by one, lowest `order` first.

    `order` gives each editable position a distinct rank in its row. The number of forward passes is that of the
    longest row's editable tokens.
    """
    ranks = order.masked_fill(~clean.editable, torch.iinfo(order.dtype).max).argsort(1).argsort(1)
    total = torch.zeros(len(order), dtype=widest_float(order.device), device=order.device)
    for step in range(int(clean.editable.sum(1).max())):
        open = (ranks >= step) & clean.editable
        canvas = replace(clean, tokens=torch.where(open, noise, clean.tokens), open=open)
        logits = predict(canvas, clean.tokens).to(total.dtype)
        log_probs = logits.log_softmax(-1).gather(-1, clean.tokens[open][:, None])[:, 0]
        current = (ranks == step)[open]
        rows = open.nonzero()[:, 0]
        total.index_add_(0, rows[current], log_probs[current])
    return total
