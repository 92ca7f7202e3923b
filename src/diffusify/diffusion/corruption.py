"""Corruption of clean texts into training canvases: sample a time, open positions, fill them with noise.

Axes: b texts, n positions, d draws of the time for each text.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from diffusify.canvas import Canvas, last_starts
from diffusify.diffusion.length_tokens import Columns
from diffusify.diffusion.schedules import NoiseSchedule


def stratified(count: int, generator: Generator | None = None) -> Float[Tensor, " count"]:
    """Uniform samples in [0, 1), one in each of `count` equal cells, in random order.

    Each sample is uniform by itself. Together they cover the interval evenly (low discrepancy, as in VDM and MDLM),
    which lowers the variance of a loss averaged over them.
    """
    cells = torch.randperm(count, generator=generator)
    samples = (cells + torch.rand(1, generator=generator)) / count
    return samples.clamp_max(1 - 2**-24)  # float32 may round up to 1


def _segment_ids(starts: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The segments of a batch numbered from 0, given where they start; position 0 of every row must be a start."""
    return starts.cpu().flatten().cumsum(0).view(starts.shape) - 1


@dataclass(frozen=True)
class PerText:
    """One time per text (document), stratified over the batch.

    `min_t` bounds 1/t weights. `grid` samples from {1/grid, ..., 1} instead (discrete-time diffusion). `draws` is the
    number of times sampled for each text; they share its random numbers, so the canvas of a later time opens all that
    an earlier one does. 2 is the coupled pair of reparameterized discrete diffusion (RDM). With `spans`, half of the
    texts open whole spans of that many tokens on average, as masked spans are filled in use; each token is still open
    as often. Raises ValueError if `spans` is below 1.
    """

    former_fields: ClassVar[dict[str, str]] = {"least": "min_t"}
    min_t: float = 1e-3
    grid: int | None = None
    draws: int = 1
    spans: float | None = None

    def __post_init__(self) -> None:
        if self.spans is not None and self.spans < 1:
            raise ValueError(f"spans={self.spans} is a mean length, at least 1 token; 8 is usual, and None disables it")

    def __call__(self, clean: Canvas, generator: Generator | None = None) -> Float[Tensor, "d b n"]:
        text = _segment_ids(clean.position_ids == 0)
        u = stratified(self.draws * (int(text.max()) + 1), generator).view(self.draws, -1)
        t = self.min_t + (1 - self.min_t) * u if self.grid is None else ((u * self.grid).floor() + 1) / self.grid
        return t[:, text]

    def join_uniform(
        self, clean: Canvas, uniform: Float[Tensor, "b n"], generator: Generator | None = None
    ) -> Float[Tensor, "b n"]:
        """The uniform numbers of `corrupt`, equal within spans of geometric length in half of the texts."""
        if self.spans is None:
            return uniform
        new_text = clean.position_ids == 0
        text = _segment_ids(new_text)
        in_spans = torch.rand(int(text.max()) + 1, generator=generator)[text] < 0.5
        starts = new_text | ~in_spans | (torch.rand(uniform.shape, generator=generator) < 1 / self.spans)
        return uniform.gather(1, last_starts(starts))


@dataclass(frozen=True)
class PerBlock:
    """One time per block of `size` tokens, stratified over all blocks; blocks restart with documents (BD3-LM).

    `complement` adds a second canvas that opens exactly what the first one does not, at the time 1 - t, so that every
    token is predicted once (Fast-dLLM v2); it requires the linear schedule. `tilt` opens tokens at the end of a block
    more often than those at its start, the more so the less noise there is: the odds double every `tilt` of a block
    (Efficient-DLM: 0.1). The loss is then no longer a bound. Blocks `of_spans` are those of `Canvas.block_starts`.
    Raises ValueError if `tilt` is not above 0.
    """

    size: int
    former_fields: ClassVar[dict[str, str]] = {"least": "min_t"}
    min_t: float = 1e-3
    complement: bool = False
    tilt: float | None = None
    of_spans: bool = False

    def __post_init__(self) -> None:
        if self.tilt is not None and self.tilt <= 0:
            raise ValueError(f"tilt={self.tilt} must be above 0; 0.1 is usual, and None disables the tilt")

    def __call__(self, clean: Canvas, generator: Generator | None = None) -> Float[Tensor, "d b n"]:
        block = _segment_ids(clean.position_ids % self.size == 0)
        u = stratified(int(block.max()) + 1, generator)
        t = self.min_t + (1 - (1 + self.complement) * self.min_t) * u
        return torch.stack([t, 1 - t] if self.complement else [t])[:, block]

    def tilt_uniform(
        self, clean: Canvas, t: Float[Tensor, "b n"], uniform: Float[Tensor, "b n"], generator: Generator | None = None
    ) -> Float[Tensor, "b n"]:
        """The uniform numbers of `corrupt`, tilted: Gumbel ranks within each block, spread evenly over [0, 1).

        Blocks of spans, which are not those of the text, are not tilted.
        """
        if self.tilt is None or self.of_spans:
            return uniform
        index, block = clean.position_ids % self.size, _segment_ids(clean.position_ids % self.size == 0)
        odds = math.log(2) / (self.tilt * self.size) * (1 - t) * index
        gumbel = -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()
        order = (odds + gumbel).flatten().argsort(descending=True)
        order = order[block.flatten()[order].argsort(stable=True)]  # block by block, the most likely to open first
        sizes = block.flatten().bincount()
        starts = sizes.cumsum(0) - sizes
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order)) - starts[block.flatten()[order]]
        offset = torch.rand(len(sizes), generator=generator)[block]
        return (rank.view(block.shape) + offset) / sizes[block]


@dataclass(frozen=True)
class Fixed:
    """The same time for every text; the default opens 15% of the tokens, as in masked language modelling (BERT).

    Raises ValueError if `t` is not in (0, 1].
    """

    t: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.t <= 1:
            raise ValueError(f"t={self.t} must be in (0, 1]; 0.15 is what masked language models are trained at")

    def __call__(self, clean: Canvas, generator: Generator | None = None) -> Float[Tensor, "d b n"]:
        return torch.full((1, *clean.tokens.shape), self.t)


# (clean, generator) -> Float[d b n] on the CPU: the training time of each position.
TimeSampler = PerText | PerBlock | Fixed


@dataclass(frozen=True)
class Noised:
    """A batch of training canvases, the texts they came from, and the time at which each position was noised.

    `ar_positions` marks the positions whose next-token prediction is also trained on the clean text (the AR co-loss).
    `weight` is that of each position's loss, 0 where no prediction is trained. Each text has `views` canvases in
    consecutive rows. If masked spans were resized (`LengthNoise`), `resized_from` has the clean canvases before, and
    where each position was in them.
    """

    canvas: Canvas
    clean: Int[Tensor, "b n"]
    t: Float[Tensor, "b n"]
    ar_positions: Bool[Tensor, "b n"]
    weight: Float[Tensor, "b n"]
    views: int = 1
    resized_from: tuple[Canvas, Columns] | None = None

    @property
    def targets(self) -> Bool[Tensor, "b n"]:
        """The open positions whose predictions are trained."""
        return self.weight > 0

    @property
    def text(self) -> Int[Tensor, "texts n"]:
        """The clean texts, each once."""
        return self.clean[:: self.views]

    def __getitem__(self, rows: slice) -> "Noised":
        clean, t, ar_positions, weight = (x[rows] for x in (self.clean, self.t, self.ar_positions, self.weight))
        source = None if self.resized_from is None else (self.resized_from[0][rows], self.resized_from[1][rows])
        return Noised(self.canvas[rows], clean, t, ar_positions, weight, self.views, source)

    def to(self, device: torch.device | str) -> "Noised":
        """The batch on a device."""
        clean, t, ar_positions, weight = (x.to(device) for x in (self.clean, self.t, self.ar_positions, self.weight))
        source = None
        if self.resized_from is not None:
            source = self.resized_from[0].to(device), self.resized_from[1].to(device)
        return Noised(self.canvas.to(device), clean, t, ar_positions, weight, self.views, source)


@dataclass(frozen=True)
class RowShard:
    """One process's shard of an optimizer step: the documents of all rows of the step, and the indices of its own."""

    document: Int[Tensor, "all n"]
    rows: Int[Tensor, " b"]


def corrupt(
    clean: Canvas,
    t: Float[Tensor, "b n"],
    uniform: Float[Tensor, "b n"],
    schedule: NoiseSchedule,
    noise: Int[Tensor, "b n"] | int,
) -> Canvas:
    """The canvas in which each editable position is open with probability 1 - alpha(t).

    `uniform` is uniform in [0, 1). With the same numbers, a later time opens a superset of the positions.
    """
    open = (uniform < 1 - schedule.alpha(t)) & clean.editable
    return replace(clean, tokens=torch.where(open, noise, clean.tokens), open=open)


def noised(
    clean: Canvas,
    time: TimeSampler,
    schedule: NoiseSchedule,
    noise: int,
    *,
    ar_share: float = 0.0,
    generator: Generator | None = None,
    shard: RowShard | None = None,
) -> Noised:
    """Training canvases for a batch of clean texts; the canvases of one text are in consecutive rows.

    `ar_share` is the share of editable positions that are marked for the AR co-loss. All random numbers are generated
    on the CPU. If the batch is a `shard` of a step, noise is generated for the whole step, so that the noise of a row
    does not depend on the process that has it.
    """
    step = clean if shard is None else Canvas.clean(shard.document, shard.document)
    times, uniform = time(step, generator), torch.rand(step.tokens.shape, generator=generator)
    ar_selected = torch.rand(step.tokens.shape, generator=generator) < ar_share
    if isinstance(time, PerBlock):
        uniform = time.tilt_uniform(step, times[0], uniform, generator)
    elif isinstance(time, PerText):
        uniform = time.join_uniform(step, uniform, generator)
    if shard is not None:
        times, uniform, ar_selected = times[:, shard.rows], uniform[shard.rows], ar_selected[shard.rows]
    complement = isinstance(time, PerBlock) and time.complement
    if isinstance(time, PerBlock) and time.of_spans:  # which only the rows themselves know, not the step
        starts = clean.block_starts(time.size, of_spans=True)
        times = times.gather(2, last_starts(starts).expand_as(times))
    uniforms = [uniform, 1 - uniform] if complement else [uniform] * len(times)
    canvases = [corrupt(clean, t, u, schedule, noise) for t, u in zip(times, uniforms, strict=True)]
    views = len(canvases)
    all_views = Canvas(
        tokens=torch.stack([c.tokens for c in canvases], 1).flatten(0, 1),
        open=torch.stack([c.open for c in canvases], 1).flatten(0, 1),
        editable=clean.editable.repeat_interleave(views, 0),
        document=clean.document.repeat_interleave(views, 0),
    )
    ar_positions = torch.zeros(len(clean.tokens), views, *clean.tokens.shape[1:], dtype=torch.bool)
    ar_positions[:, 0] = ar_selected & clean.editable  # once per text, since all views share its clean copy
    repeated = clean.tokens.repeat_interleave(views, 0)
    t = times.transpose(0, 1).flatten(0, 1)
    return Noised(all_views, repeated, t, ar_positions.flatten(0, 1), all_views.open.float(), views)
