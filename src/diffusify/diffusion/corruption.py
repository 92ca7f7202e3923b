"""How a clean text becomes a training canvas: draw a time, open positions, fill them with noise.

Axes: b texts, n positions, d draws of the time for each text.
"""

from dataclasses import dataclass, replace

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

    `least` keeps 1/t weights bounded. `grid` draws from {1/grid, ..., 1} instead (discrete-time diffusion).
    `draws` times share one text's luck: 2 is the coupled pair of reparameterized discrete diffusion (RDM).
    """

    least: float = 1e-3
    grid: int | None = None
    draws: int = 1

    def __call__(self, clean: Canvas, generator: Generator | None = None) -> Float[Tensor, "d b n"]:
        text = _numbered(clean.positions == 0)
        u = stratified(self.draws * (int(text.max()) + 1), generator).view(self.draws, -1)
        t = self.least + (1 - self.least) * u if self.grid is None else ((u * self.grid).floor() + 1) / self.grid
        return t[:, text]


@dataclass(frozen=True)
class PerBlock:
    """One time for each block of `size` tokens, stratified over all blocks; blocks restart with documents (BD3-LM)."""

    size: int
    least: float = 1e-3

    def __call__(self, clean: Canvas, generator: Generator | None = None) -> Float[Tensor, "d b n"]:
        block = _numbered(clean.positions % self.size == 0)
        t = self.least + (1 - self.least) * stratified(int(block.max()) + 1, generator)
        return t[block][None]


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

    `ar` marks the positions whose next-token answer is also asked of the clean text (the AR co-loss).
    """

    canvas: Canvas
    clean: Int[Tensor, "b n"]
    t: Float[Tensor, "b n"]
    ar: Bool[Tensor, "b n"]

    def __getitem__(self, rows: slice) -> "Noised":
        return Noised(self.canvas[rows], self.clean[rows], self.t[rows], self.ar[rows])

    def to(self, device: torch.device | str) -> "Noised":
        return Noised(self.canvas.to(device), self.clean.to(device), self.t.to(device), self.ar.to(device))


def corrupt(
    clean: Canvas,
    t: Float[Tensor, "b n"],
    luck: Float[Tensor, "b n"],
    schedule: NoiseSchedule,
    noise: Int[Tensor, "b n"] | int,
) -> Canvas:
    """Open each editable position with chance 1 - alpha(t).

    `luck` is uniform in [0, 1). The same luck at a later time only opens more.
    """
    open = (luck < 1 - schedule.alpha(t)) & clean.editable
    return replace(clean, tokens=torch.where(open, noise, clean.tokens), open=open)


def noised(
    clean: Canvas,
    time: TimeSampler,
    schedule: NoiseSchedule,
    noise: int,
    *,
    ar_share: float = 0.0,
    generator: Generator | None = None,
) -> Noised:
    """Training canvases for a batch of clean texts, `draws` for each text: all first draws, then all second ones.

    `ar_share` of the editable positions are marked for the AR co-loss. Everything random is drawn on the CPU.
    """
    times, luck = time(clean, generator), torch.rand(clean.tokens.shape, generator=generator)
    ar = (torch.rand(clean.tokens.shape, generator=generator) < ar_share) & clean.editable
    canvases = [corrupt(clean, t, luck, schedule, noise) for t in times]
    every = Canvas(
        tokens=torch.cat([c.tokens for c in canvases]),
        open=torch.cat([c.open for c in canvases]),
        editable=clean.editable.repeat(len(times), 1),
        document=clean.document.repeat(len(times), 1),
    )
    return Noised(every, clean.tokens.repeat(len(times), 1), times.flatten(0, 1), ar.repeat(len(times), 1))
