"""How a clean text becomes a training canvas: draw a time, open positions, fill them with noise.

Axes: b texts, n positions, d draws of the time for each text.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.schedules import NoiseSchedule


def stratified(count: int, generator: Generator | None = None) -> Float[Tensor, " count"]:
    """Uniform draws in [0, 1), one in each of `count` equal cells, in random order.

    Each draw is uniform by itself; together they cover the interval evenly (low discrepancy, as in VDM and MDLM),
    which lowers the variance of a loss averaged over them.
    """
    cells = torch.randperm(count, generator=generator)
    return (cells + torch.rand(1, generator=generator)) / count


def _numbered(starts: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The stretches of a batch counted from 0, given where they start: position 0 of every row is a start."""
    return starts.cpu().flatten().cumsum(0).view(starts.shape) - 1


@dataclass(frozen=True)
class PerText:
    """One time for each text (document), stratified over the batch.

    `min_t` keeps 1/t weights bounded. `grid` draws from {1/grid, ..., 1} instead (discrete-time diffusion).
    `draws` times share one text's luck: 2 is the coupled pair of reparameterized discrete diffusion (RDM).
    """

    former_fields: ClassVar[dict[str, str]] = {"least": "min_t"}
    min_t: float = 1e-3
    grid: int | None = None
    draws: int = 1

    def __call__(self, clean: Canvas, generator: Generator | None = None) -> Float[Tensor, "d b n"]:
        text = _numbered(clean.position_ids == 0)
        u = stratified(self.draws * (int(text.max()) + 1), generator).view(self.draws, -1)
        t = self.min_t + (1 - self.min_t) * u if self.grid is None else ((u * self.grid).floor() + 1) / self.grid
        return t[:, text]


@dataclass(frozen=True)
class PerBlock:
    """One time for each block of `size` tokens, stratified over all blocks; blocks restart with documents (BD3-LM).

    With `complement` a second canvas opens exactly what the first one does not, at the time 1 - t (Fast-dLLM v2): every
    token is learnt from once. It is for the linear schedule. `tilt` opens the tokens at a block's end rather than those
    at its start, the less noise the more so: odds double every `tilt` of a block (Efficient-DLM: 0.1). The loss is no
    bound then.
    """

    size: int
    former_fields: ClassVar[dict[str, str]] = {"least": "min_t"}
    min_t: float = 1e-3
    complement: bool = False
    tilt: float | None = None

    def __post_init__(self) -> None:
        if self.tilt is not None and self.tilt <= 0:
            raise ValueError(f"tilt={self.tilt} must be above 0; 0.1 is usual, and None is no tilt")

    def __call__(self, clean: Canvas, generator: Generator | None = None) -> Float[Tensor, "d b n"]:
        block = _numbered(clean.position_ids % self.size == 0)
        u = stratified(int(block.max()) + 1, generator)
        t = self.min_t + (1 - (1 + self.complement) * self.min_t) * u
        return torch.stack([t, 1 - t] if self.complement else [t])[:, block]

    def rng(
        self, clean: Canvas, t: Float[Tensor, "b n"], rng: Float[Tensor, "b n"], generator: Generator | None = None
    ) -> Float[Tensor, "b n"]:
        """The luck of each position at its time, tilted: ranks in a block, by Gumbel's trick, then spread evenly."""
        if self.tilt is None:
            return rng
        place, block = clean.position_ids % self.size, _numbered(clean.position_ids % self.size == 0)
        odds = math.log(2) / (self.tilt * self.size) * (1 - t) * place
        gumbel = -(-rng.clamp(1e-9, 1 - 1e-7).log()).log()
        order = (odds + gumbel).flatten().argsort(descending=True)
        order = order[block.flatten()[order].argsort(stable=True)]  # blocks in order, the likeliest of each first
        sizes = block.flatten().bincount()
        starts = sizes.cumsum(0) - sizes
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order)) - starts[block.flatten()[order]]
        spread = torch.rand(len(sizes), generator=generator)[block]
        return (rank.view(block.shape) + spread) / sizes[block]


@dataclass(frozen=True)
class Fixed:
    """The same time for every text: plain masked language modelling, which opens a share of 0.15."""

    t: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.t <= 1:
            raise ValueError(f"t={self.t} must be in (0, 1]; 0.15 is what masked language models are trained at")

    def __call__(self, clean: Canvas, generator: Generator | None = None) -> Float[Tensor, "d b n"]:
        return torch.full((1, *clean.tokens.shape), self.t)


# How training time is drawn: (clean, generator) -> Float[d b n] on the CPU.
TimeSampler = PerText | PerBlock | Fixed


@dataclass(frozen=True)
class Noised:
    """A training canvas, the text it came from, and the time each position was noised at.

    `ar_positions` marks the positions whose next-token answer is also asked of the clean text (the AR co-loss). Each text has
    `views` canvases, one below the other.
    """

    canvas: Canvas
    clean: Int[Tensor, "b n"]
    t: Float[Tensor, "b n"]
    ar_positions: Bool[Tensor, "b n"]
    views: int = 1

    @property
    def text(self) -> Int[Tensor, "texts n"]:
        """The clean texts, each once."""
        return self.clean[:: self.views]

    def __getitem__(self, rows: slice) -> "Noised":
        return Noised(self.canvas[rows], self.clean[rows], self.t[rows], self.ar_positions[rows], self.views)

    def to(self, device: torch.device | str) -> "Noised":
        clean, t, ar_positions = (part.to(device) for part in (self.clean, self.t, self.ar_positions))
        return Noised(self.canvas.to(device), clean, t, ar_positions, self.views)


@dataclass(frozen=True)
class Share:
    """What one of several processes has of a step: the documents of all the step's rows, and which rows are its own."""

    document: Int[Tensor, "all n"]
    rows: Int[Tensor, " b"]


def corrupt(
    clean: Canvas,
    t: Float[Tensor, "b n"],
    rng: Float[Tensor, "b n"],
    schedule: NoiseSchedule,
    noise: Int[Tensor, "b n"] | int,
) -> Canvas:
    """Open each editable position with chance 1 - alpha(t).

    `rng` is uniform in [0, 1). The same luck at a later time only opens more.
    """
    open = (rng < 1 - schedule.alpha(t)) & clean.editable
    return replace(clean, tokens=torch.where(open, noise, clean.tokens), open=open)


def noised(
    clean: Canvas,
    time: TimeSampler,
    schedule: NoiseSchedule,
    noise: int,
    *,
    ar_share: float = 0.0,
    generator: Generator | None = None,
    share: Share | None = None,
) -> Noised:
    """Training canvases for a batch of clean texts: all draws of a text one below the other.

    `ar_share` of the editable positions are marked for the AR co-loss. Everything random is drawn on the CPU. Where
    the batch is a `share` of a step, all of the step's noise is drawn: a row's noise does not depend on who has it.
    """
    step = clean if share is None else Canvas.clean(share.document, share.document)
    times, rng = time(step, generator), torch.rand(step.tokens.shape, generator=generator)
    told = torch.rand(step.tokens.shape, generator=generator) < ar_share
    if isinstance(time, PerBlock):
        rng = time.rng(step, times[0], rng, generator)
    if share is not None:
        times, rng, told = times[:, share.rows], rng[share.rows], told[share.rows]
    ar_positions = told & clean.editable
    lucks = [rng, 1 - rng] if isinstance(time, PerBlock) and time.complement else [rng] * len(times)
    canvases = [corrupt(clean, t, u, schedule, noise) for t, u in zip(times, lucks, strict=True)]
    views = len(canvases)
    every = Canvas(
        tokens=torch.stack([c.tokens for c in canvases], 1).flatten(0, 1),
        open=torch.stack([c.open for c in canvases], 1).flatten(0, 1),
        editable=clean.editable.repeat_interleave(views, 0),
        document=clean.document.repeat_interleave(views, 0),
    )
    marked = torch.zeros(len(ar_positions), views, *ar_positions.shape[1:], dtype=torch.bool)
    marked[:, 0] = ar_positions  # the clean text is the same beside every canvas
    clean_again = clean.tokens.repeat_interleave(views, 0)
    return Noised(every, clean_again, times.transpose(0, 1).flatten(0, 1), marked.flatten(0, 1), views)
