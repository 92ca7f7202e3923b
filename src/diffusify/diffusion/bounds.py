"""What a denoiser says of a text: a bound on its negative log-likelihood, and exact values along an order.

Axes: b texts, n positions, d draws, k asked positions, v vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.objectives import cross_entropy

# (noisy canvas, clean tokens) -> logits [k, v] at the canvas's open positions, row by row
Answer = Callable[[Canvas, Tensor], Tensor]


@dataclass(frozen=True)
class Bound:
    """An estimate of the bound in nats, position by position: `nll` sums to the bound of each text.

    `masked` pairs the plain cross-entropy at every position that was open in some draw with the share of its unit
    that was open then: the noise level.
    """

    nll: Float[Tensor, "b n"]
    masked: Float[Tensor, "k 2"]


def mask_counts(
    clean: Canvas,
    unit: Int[Tensor, "b n"],
    draws: int,
    noise: int,
    generator: Generator | None = None,
    *,
    alike: bool = False,
) -> Iterator[tuple[Canvas, Float[Tensor, "b n"]]]:
    """Noisy canvases for a bound, and each position's share of open neighbours.

    A unit (a text, or a block) of L editable positions has exactly l of them opened, l uniform in 1..L and stratified
    over the draws. Weighing by L / l gives the continuous-time bound of every schedule, with much less variance than
    independent masking at a random time (LLaDA). Rows that are `alike` share their luck: what they have in common is
    opened alike, so that they differ by little else than their texts (common random numbers).
    """
    b, n = clean.tokens.shape
    row = torch.arange(b, device=unit.device)[:, None]
    key = ((row * (unit.max() + 1) + unit) * 2 + clean.editable).flatten()
    key = key.unique(return_inverse=True)[1]  # units of the whole batch, from 0; what is not editable stands apart
    size = torch.bincount(key)
    units = int(unit.max()) + 1
    phase = torch.rand(1 if alike else b, units, generator=generator).to(key.device).expand(b, -1)
    phase = torch.zeros_like(size, dtype=phase.dtype).scatter(0, key, phase.gather(1, unit).flatten())
    for draw in range(draws):
        count = ((phase + draw / draws).frac() * size).long() + 1
        rng = torch.rand(1 if alike else b, n, generator=generator, dtype=torch.float64).to(key.device)
        order = (key + rng.expand(b, -1).flatten()).argsort()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(b * n, device=key.device) - (size.cumsum(0) - size)[key[order]]
        open = (rank < count[key]).view(b, n) & clean.editable
        share = (count / size)[key].view(b, n)
        yield replace(clean, tokens=torch.where(open, noise, clean.tokens), open=open), share


def draws_compared(
    nll: Float[Tensor, "d b n"],
    open: Bool[Tensor, "d b n"],
    share: Float[Tensor, "d b n"],
    editable: Bool[Tensor, "b n"],
) -> Float[Tensor, "d b"]:
    """What each of d draws of `mask_counts` says of the bound of each text, in nats.

    What a draw finds of a token is set against what the other draws found of it, or of all tokens where they did not
    open it (leave-one-out control variates): the mean stays what it is, and it no longer matters much which tokens a
    draw happened to open.
    """
    nll = nll.masked_fill(~open, 0.0)
    others, times = nll.sum(0) - nll, open.sum(0) - open.long()
    usual = others.sum(-1, keepdim=True) / times.sum(-1, keepdim=True).clamp_min(1)
    known = torch.where(times > 0, others / times.clamp_min(1), usual)
    return (torch.where(open, (nll - known) / share, 0.0) + known * editable).sum(-1)


@torch.no_grad()
def bound(
    answer: Answer,
    clean: Canvas,
    unit: Int[Tensor, "b n"],
    *,
    noise: int,
    draws: int = 4,
    generator: Generator | None = None,
) -> Bound:
    """Monte Carlo estimate of the bound on -log p(text), in nats."""
    total = torch.zeros(clean.tokens.shape, device=clean.tokens.device)
    masked = []
    for canvas, share in mask_counts(clean, unit, draws, noise, generator):
        nll = cross_entropy(answer(canvas, clean.tokens), clean.tokens[canvas.open])
        total += torch.zeros_like(total).masked_scatter(canvas.open, nll) / share / draws
        masked.append(torch.stack([nll, share[canvas.open]], 1))
    return Bound(total, torch.cat(masked))


@torch.no_grad()
def log_probability(answer: Answer, clean: Canvas, order: Int[Tensor, "b n"], *, noise: int) -> Float[Tensor, " b"]:
    """The exact log-probability of the editable tokens when they are written one by one, lowest `order` first.

    `order` gives each editable position its own rank in its row. As many forwards as the longest row has tokens.
    """
    ranks = order.masked_fill(~clean.editable, torch.iinfo(order.dtype).max).argsort(1).argsort(1)
    total = torch.zeros(len(order), dtype=torch.float64, device=order.device)
    for step in range(int(clean.editable.sum(1).max())):
        open = (ranks >= step) & clean.editable
        canvas = replace(clean, tokens=torch.where(open, noise, clean.tokens), open=open)
        logits = answer(canvas, clean.tokens).double()
        logp = logits.log_softmax(-1).gather(-1, clean.tokens[open][:, None])[:, 0]
        now = (ranks == step)[open]
        rows = open.nonzero()[:, 0]
        total.index_add_(0, rows[now], logp[now])
    return total
