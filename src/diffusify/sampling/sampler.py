"""The denoising loop, a generator of canvases.

Axes: b texts, g texts of a group with equal samplers, n positions, k requested positions (row by row), v vocabulary,
e end tokens, w windows.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess, Move
from diffusify.diffusion.constraints import Constraint
from diffusify.diffusion.length_tokens import Columns, SpanLengths
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.picking import Greedy
from diffusify.diffusion.policies import Unmask
from diffusify.diffusion.rng import DrawnNumbers, RowGenerators
from diffusify.diffusion.step import StepState


@runtime_checkable
class DenoiseFn(Protocol):
    """A model as the denoising loop calls it: logits at `positions` of a canvas, row by row (`Denoiser.predict`)."""

    def __call__(self, canvas: Canvas, *, positions: Tensor) -> LazyLogits: ...


# (logits [k, v], canvas, positions [b, n]) -> logits [k, v], applied before tokens are picked at these positions.
LogitsProcessor = Callable[[Tensor, Canvas, Tensor], Tensor]

# (written [b, n] in the rows of this sampler, logits at these positions, row by row), called in every step.
Observer = Callable[[Tensor, LazyLogits], None]


@dataclass(frozen=True)
class Frame:
    """The state of a generation after one step.

    `score` holds the log-probability of each written token at the time when it was written, and `forwards` counts the
    forward passes so far. The first `settled` positions of each row will not change any more. If masked spans have
    changed their length in the step, `columns` says where the canvas's positions were before.
    """

    canvas: Canvas
    score: Float[Tensor, "b n"]
    forwards: int
    settled: Int[Tensor, " b"]
    columns: Columns | None = None


@dataclass(frozen=True)
class Sampler:
    """The decoding strategy of one text.

    - `pick` chooses a token for each position, and `policy` which positions are written or remasked in a step. Both can
      be your own callables. A policy's class attributes are optional: `remasks = True` gives it all steps of a window,
      `rescores = True` includes written positions in its input, and `history_length` is the number of earlier steps
      that it receives.
    - `steps` is the total number of denoising steps. Defaults to the number of open positions.
    - `banned` token ids are never written. After a written `end_token_id` (one id or several) nothing is decoded. A
      policy that remasks or rescores may remove the end again, so it first decodes the text before it.
    - `repetition_penalty` divides the positive logits of tokens that are already in the text, and multiplies the
      negative ones (CTRL). `logits_processor` is applied after it and the ban.
    - `constraint` restricts the tokens to those of allowed texts.
    - `observer` receives the logits of the tokens that a step writes.

    Raises ValueError if `steps` is below 1.
    """

    pick: Callable[[Tensor, Tensor, RowGenerators | DrawnNumbers], tuple[Tensor, Tensor]] = Greedy()
    policy: Callable[[StepState], Move] = Unmask()
    steps: int | None = None
    banned: tuple[int, ...] = ()
    end_token_id: int | tuple[int, ...] | None = None
    repetition_penalty: float = 1.0
    logits_processor: LogitsProcessor | None = None
    constraint: Constraint | None = None
    observer: Observer | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; leave it unset for one step per token")

    def __call__(
        self,
        denoiser: DenoiseFn,
        canvas: Canvas,
        window_index: Int[Tensor, "b n"] | None = None,
        *,
        noise: int,
        rng: RowGenerators | None = None,
    ) -> Iterator[Frame]:
        """Yield the canvas after every step; see `denoise`."""
        return denoise(denoiser, canvas, [self] * len(canvas.tokens), window_index, noise=noise, rng=rng)

    @property
    def reads_text(self) -> bool:
        """Whether `process_logits` depends on the text so far."""
        return self.repetition_penalty != 1 or self.logits_processor is not None or self.constraint is not None

    def process_logits(self, logits: LazyLogits, canvas: Canvas, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        """The model's logits after penalty, bans, processor and constraint."""
        if not self.banned and not self.reads_text:
            return logits
        indices = positions.nonzero()
        allowed = self.constraint.allowed_tokens(canvas, positions) if self.constraint else None
        banned = torch.tensor(self.banned, dtype=torch.long, device=positions.device)
        known = canvas.real & ~canvas.open

        def process(chunk: Float[Tensor, "k v"], index: Int[Tensor, " k"]) -> Float[Tensor, "k v"]:
            row, position = indices[index].unbind(1)
            if self.repetition_penalty != 1:
                counts = torch.zeros(len(positions), chunk.shape[-1], dtype=torch.long, device=chunk.device)
                counts.scatter_add_(1, canvas.tokens, known.long())
                penalized = torch.where(chunk > 0, chunk / self.repetition_penalty, chunk * self.repetition_penalty)
                chunk = torch.where(counts[row] > 0, penalized, chunk)
            if self.banned:
                chunk = chunk.index_fill(-1, banned, -torch.inf)
            if self.logits_processor is not None:
                chunk_positions = torch.zeros_like(positions)
                chunk_positions[row, position] = True
                chunk = self.logits_processor(chunk, canvas, chunk_positions)
            return chunk if allowed is None else chunk.masked_fill(~allowed(index, chunk.shape[-1]), -torch.inf)

        return logits.transform(process)


@torch.inference_mode()
def denoise(
    denoiser: DenoiseFn,
    canvas: Canvas,
    samplers: Sequence[Sampler],
    window_index: Int[Tensor, "b n"] | None = None,
    *,
    noise: int,
    rng: RowGenerators | None = None,
    lengths: SpanLengths | None = None,
) -> Generator[Frame, Canvas | None, None]:
    """Yield the canvas after every step, with one sampler for each row. A canvas that is sent replaces it.

    `window_index` numbers the windows (blocks) that are decoded one after the other, lowest first; by default there is
    one window. Every row advances independently and has its own random generator in `rng` (seeds 0, 1, ... by default),
    so its text does not depend on the other rows. A step that would repeat the last forward pass reuses its logits.

    `lengths` says which masked spans the model may lengthen or shorten. A new position has the window of the position
    that it comes from. Where the number of steps is that of the tokens, it grows with them.
    """
    b, device = len(canvas.tokens), canvas.tokens.device
    rng = rng or RowGenerators.from_seeds(list(range(b)))
    window_index = torch.zeros_like(canvas.tokens) if window_index is None else window_index
    no_window = torch.iinfo(window_index.dtype).max
    groups = [_RowGroup(sampler, rows, rng, device) for sampler, rows in equal_samplers(samplers)]
    remasks, rescores = (
        torch.tensor([getattr(sampler.policy, name, False) for sampler in samplers], device=device)
        for name in ("remasks", "rescores")
    )
    erases = remasks | rescores
    ends = end_tokens([sampler.end_token_id for sampler in samplers], device)
    window_steps = _window_steps(canvas, window_index, [sampler.steps for sampler in samplers])
    step_per_token = torch.tensor([sampler.steps is None for sampler in samplers], device=device)
    score = torch.zeros(canvas.tokens.shape, device=device)
    current = torch.full_like(ends[:, 0], -1)
    step, steps, forwards = current, torch.zeros_like(current), 0
    no_logits = LazyLogits.from_tensor(score.new_zeros(0, 1))
    last_input, logits = (canvas.tokens, torch.zeros_like(canvas.open)), no_logits
    while True:
        behind = after_end(canvas, ends)
        unfinished = (canvas.open & ~behind).any(1)
        dropped = behind & ~erases[:, None]  # a policy that removes tokens may remove the end, too
        todo = canvas.open & ~dropped & unfinished[:, None]
        active = window_index.masked_fill(~todo, no_window).amin(1)
        # A policy that remasks gets all steps of its window, since written tokens can still change.
        active = torch.where(remasks & (step + 1 < steps), current, active)
        if (active == no_window).all():
            return
        window = canvas.editable & (window_index == active[:, None]) & ~dropped
        positions = window & (canvas.open | rescores[:, None])
        step = torch.where(active == current, step + 1, 0)
        steps = window_steps.gather(1, active.clamp_max(window_steps.shape[1] - 1)[:, None])[:, 0]
        steps = torch.where(active == no_window, 0, steps)
        current = active
        if not (torch.equal(positions, last_input[1]) and torch.equal(canvas.tokens, last_input[0])):
            logits = no_logits
            if positions.any():
                logits = denoiser(canvas, positions=positions)
                forwards += getattr(denoiser, "passes", 1)
            last_input = (canvas.tokens, positions)
        allowed = logits if lengths is None else lengths.restrict(logits, canvas, positions)
        guess = Guess(canvas.tokens.clone(), torch.full_like(score, -torch.inf))
        move = Move(torch.zeros_like(positions), torch.zeros_like(positions))
        for group in groups:
            rows = group.rows
            state = group.next_state(
                allowed, canvas[rows], score[rows], positions, window[rows], step[rows], steps[rows]
            )
            group_move = group.sampler.policy(state)
            group_guess = state.guess_at(group_move.write)
            constraint, write = group.sampler.constraint, group_move.write
            if constraint:
                write = constraint.consistent_writes(state.canvas, write, group_guess)
            if lengths is not None:
                write = lengths[rows].consistent_writes(write, group_guess)
            if group.sampler.observer is not None and len(state.logits):
                written = torch.zeros_like(positions).index_copy(0, rows, write)
                group.sampler.observer(written, state.logits[write[state.positions]])
            guess.tokens[rows], guess.score[rows] = group_guess.tokens, group_guess.score
            move.write[rows], move.erase[rows] = write, group_move.erase
        score = torch.where(move.write, guess.score, score).masked_fill(move.erase, 0.0)
        canvas, columns = canvas.apply(move, guess, noise), None
        if lengths is not None:
            canvas, lengths, columns = lengths.resize(canvas, move.write, noise)
        if columns is not None:
            expanded = (columns.copy > 0) & canvas.open
            window_index, score = columns.take(window_index), columns.take(score).masked_fill(canvas.open, 0.0)
            added = torch.zeros_like(window_steps).scatter_add(1, window_index, 2 * expanded.long())
            window_steps = window_steps + added * step_per_token[:, None]  # one step for each of the two positions
            for group in groups:
                group.move(columns)
        unsettled = canvas.open | (canvas.editable & erases[:, None] & (window_index >= active[:, None]))
        canvas = (yield Frame(canvas, score, forwards, (unsettled.long().cumsum(1) == 0).sum(1), columns)) or canvas


class _RowGroup:
    """The rows of a batch with equal samplers, and their earlier steps."""

    def __init__(self, sampler: Sampler, rows: list[int], rng: RowGenerators, device: torch.device) -> None:
        self.sampler, self.rng = sampler, rng.for_rows(rows)
        self.rows = torch.tensor(rows, device=device)
        self.history: tuple[StepState, ...] = ()

    def move(self, columns: Columns) -> None:
        """Give the positions of earlier steps their new columns."""
        self.history = tuple(state.moved(columns[self.rows]) for state in self.history)

    def next_state(
        self,
        logits: LazyLogits,
        canvas: Canvas,
        score: Float[Tensor, "g n"],
        positions: Bool[Tensor, "b n"],
        window: Bool[Tensor, "g n"],
        step: Int[Tensor, " g"],
        steps: Int[Tensor, " g"],
    ) -> StepState:
        """The policy's input for these rows. `logits` and `positions` are those of the whole batch."""
        if len(self.rows) < len(positions):
            logits = logits[torch.isin(positions.nonzero()[:, 0], self.rows)]
        positions = positions[self.rows]
        if len(logits):
            logits = self.sampler.process_logits(logits, canvas, positions)
        state = StepState(
            canvas, score, positions, logits, window, step, steps, self.sampler.pick, self.rng, self.history
        )
        self.history = (replace(state, history=()), *self.history)[: getattr(self.sampler.policy, "history_length", 0)]
        return state


def equal_samplers(samplers: Sequence[Sampler]) -> list[tuple[Sampler, list[int]]]:
    """Each different sampler with its rows, in order of their first row."""
    unique = [sampler for i, sampler in enumerate(samplers) if sampler not in samplers[:i]]
    return [(each, [i for i, other in enumerate(samplers) if other == each]) for each in unique]


def _window_steps(canvas: Canvas, window_index: Int[Tensor, "b n"], totals: Sequence[int | None]) -> Int[Tensor, "b w"]:
    """The number of steps for each window of each row: its share of the row's total, or one for each position."""
    sizes = canvas.open.new_zeros(len(totals), int(window_index.max()) + 1, dtype=torch.long)
    sizes.scatter_add_(1, window_index, canvas.editable.long())
    rows = zip(totals, sizes.tolist(), strict=True)
    return torch.tensor([row if total is None else _shares(total, row) for total, row in rows], device=sizes.device)


def _shares(total: int, sizes: list[int]) -> list[int]:
    """A total divided in proportion to sizes, with at least 1 for each size above 0."""
    shares, size_left, parts_left = [], sum(sizes), sum(size > 0 for size in sizes)
    for size in sizes:
        parts_left -= size > 0
        share = min(round(total * size / max(1, size_left)), total - parts_left)
        shares.append(max(1, share) if size else 0)
        total, size_left = total - shares[-1], size_left - size
    return shares


def end_tokens(end_token_ids: Sequence[int | tuple[int, ...] | None], device: torch.device | str) -> Int[Tensor, "b e"]:
    """The end tokens of each row, filled up with -1."""
    rows = [() if ids is None else (ids,) if isinstance(ids, int) else ids for ids in end_token_ids]
    width = max(1, *map(len, rows))
    return torch.tensor([[*ids, *[-1] * (width - len(ids))] for ids in rows], device=device)


def generated_ends(canvas: Canvas, ends: Int[Tensor, "b e"]) -> Bool[Tensor, "b n"]:
    """Mask of the generated end tokens."""
    return canvas.written & (canvas.tokens[..., None] == ends[:, None]).any(-1)


def after_end(canvas: Canvas, ends: Int[Tensor, "b e"]) -> Bool[Tensor, "b n"]:
    """Mask of the positions after the first generated end token of each row, which are no part of its text."""
    is_end = generated_ends(canvas, ends).long()
    return is_end.cumsum(1) > is_end
