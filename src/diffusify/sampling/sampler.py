"""The denoising loop: a generator of canvases.

Axes: b texts, n positions, k asked positions (row by row), v vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess, Move
from diffusify.diffusion.constraints import Constraint
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.picking import Greedy
from diffusify.diffusion.policies import Unmask
from diffusify.diffusion.rng import RowGenerators
from diffusify.diffusion.step import StepState


@runtime_checkable
class DenoiseFn(Protocol):
    """What the loop needs of a model: logits at the asked positions of a canvas, row by row (`Denoiser.predict`)."""

    def __call__(self, canvas: Canvas, *, positions: Tensor) -> LazyLogits: ...


# Changes the model's logits [k, v] at some positions [b, n] of a canvas, before anything is picked there.
LogitsProcessor = Callable[[Tensor, Canvas, Tensor], Tensor]


@dataclass(frozen=True)
class Frame:
    """The canvas after a step, the score each written token had (log-probability), and the forwards so far.

    Of each row, the first `settled` positions will not change any more.
    """

    canvas: Canvas
    score: Float[Tensor, "b n"]
    forwards: int
    settled: Int[Tensor, " b"]


@dataclass(frozen=True)
class Sampler:
    """How open positions are filled: what is picked, what is written at each step, and how many steps there are.

    Any callables of the same form as the ready-made picks and policies will do.
    A policy that `remasks` gets all the steps of a window, one that `rescores` is told of written positions too, and
    one that `history_length` sees so many earlier steps.
    `steps` counts denoising steps for the whole text (None: as many as open positions); `banned` tokens are never
    written; behind a written `end_token_id` a row needs no more work. `repetition_penalty` divides the positive
    logits of tokens that a row has already, and multiplies the negative ones (CTRL). `logits_processor` has the last
    word on the logits.
    """

    pick: Callable[[Tensor, Tensor, RowGenerators], tuple[Tensor, Tensor]] = Greedy()
    policy: Callable[[StepState], Move] = Unmask()
    steps: int | None = None
    banned: tuple[int, ...] = ()
    end_token_id: int | None = None
    repetition_penalty: float = 1.0
    logits_processor: LogitsProcessor | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; leave it unset for one step a token")

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

    def shaped(self, logits: LazyLogits, canvas: Canvas, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        """The model's logits, as the settings change them."""
        if self.repetition_penalty == 1 and not self.banned and self.logits_processor is None and not self.constraint:
            return logits
        places = positions.nonzero()
        allowed = self.constraint.allowed(canvas, positions) if self.constraint else None
        banned = torch.tensor(self.banned, dtype=torch.long, device=positions.device)
        there = canvas.real & ~canvas.open

        def change(part: Float[Tensor, "k v"], index: Int[Tensor, " k"]) -> Float[Tensor, "k v"]:
            row, position = places[index].unbind(1)
            if self.repetition_penalty != 1:
                times = torch.zeros(len(positions), part.shape[-1], dtype=torch.long, device=part.device)
                times.scatter_add_(1, canvas.tokens, there.long())
                weaker = torch.where(part > 0, part / self.repetition_penalty, part * self.repetition_penalty)
                part = torch.where(times[row] > 0, weaker, part)
            if self.banned:
                part = part.index_fill(-1, banned, -torch.inf)
            if self.logits_processor is not None:
                where = torch.zeros_like(positions)
                where[row, position] = True
                part = self.logits_processor(part, canvas, where)
            return part if allowed is None else part.masked_fill(~allowed(index, part.shape[-1]), -torch.inf)

        return logits.then(change)


@torch.inference_mode()
def denoise(
    denoiser: DenoiseFn,
    canvas: Canvas,
    samplers: Sequence[Sampler],
    window_index: Int[Tensor, "b n"] | None = None,
    *,
    noise: int,
    rng: RowGenerators | None = None,
) -> Iterator[Frame]:
    """Yield the canvas after every step, each row sampled in its own way.

    `window_index` numbers the positions that are worked on together, lowest first (blocks); None is all at once. Every row
    goes at its own pace and has its own `rng` (seeds 0, 1, ... if unset), so that its text does not depend on its
    neighbours. The model is not asked again what it has answered already.
    """
    b, device = len(canvas.tokens), canvas.tokens.device
    rng = rng or RowGenerators.seeded(list(range(b)), device)
    window_index = torch.zeros_like(canvas.tokens) if window_index is None else window_index
    nowhere = torch.iinfo(window_index.dtype).max
    groups = _groups(samplers, rng, device)
    remasks, rescores = (
        torch.tensor([getattr(sampler.policy, name, False) for sampler in samplers], device=device)
        for name in ("remasks", "rescores")
    )
    erases = remasks | rescores
    ends = torch.tensor([-1 if s.end_token_id is None else s.end_token_id for s in samplers], device=device)
    stated = torch.tensor([s.steps or 0 for s in samplers], device=device)
    room = canvas.open.sum(1)
    score = torch.zeros(canvas.tokens.shape, device=device)
    current = torch.full_like(room, -1)
    step, steps, forwards = current, torch.zeros_like(room), 0
    nothing = LazyLogits.of(score.new_zeros(0, 1))
    answered, logits = (canvas.tokens, torch.zeros_like(canvas.open)), nothing
    while True:
        todo = canvas.open & ~finished(canvas, ends)[:, None]
        front = window_index.masked_fill(~todo, nowhere).amin(1)
        # A revised window gets all its steps: what is written may still change.
        front = torch.where(remasks & (step + 1 < steps), current, front)
        if (front == nowhere).all():
            return
        window = canvas.editable & (window_index == front[:, None])
        positions = window & (canvas.open | rescores[:, None])
        size = window.sum(1)
        step = torch.where(front == current, step + 1, 0)
        share = torch.where(stated > 0, (stated * size / room.clamp_min(1)).round().long(), size).clamp_min(1)
        steps = torch.where(front == nowhere, 0, share)
        current = front
        if not (torch.equal(positions, answered[1]) and torch.equal(canvas.tokens, answered[0])):
            logits = nothing
            if positions.any():
                logits = denoiser(canvas, positions=positions)
                forwards += 1
            answered = (canvas.tokens, positions)
        guess = Guess(canvas.tokens.clone(), torch.full_like(score, -torch.inf))
        move = Move(torch.zeros_like(positions), torch.zeros_like(positions))
        for group in groups:
            rows = group.rows
            state = group.look(logits, canvas[rows], score[rows], positions, window[rows], step[rows], steps[rows])
            decided = group.sampler.policy(state)
            picked = state.guess_at(decided.write)
            constraint = group.sampler.constraint
            write = constraint.agreed(state.canvas, decided.write, picked) if constraint else decided.write
            guess.tokens[rows], guess.score[rows] = picked.tokens, picked.score
            move.write[rows], move.erase[rows] = write, decided.erase
        score = torch.where(move.write, guess.score, score).masked_fill(move.erase, 0.0)
        canvas = canvas.apply(move, guess, noise)
        unsettled = canvas.open | (canvas.editable & erases[:, None] & (window_index >= front[:, None]))
        yield Frame(canvas, score, forwards, settled=(unsettled.long().cumsum(1) == 0).sum(1))


class _Group:
    """Rows that are sampled alike, and what they looked like before."""

    def __init__(self, sampler: Sampler, rows: list[int], rng: RowGenerators, device: torch.device) -> None:
        self.sampler, self.rng = sampler, rng.of(rows)
        self.rows = torch.tensor(rows, device=device)
        self.history: tuple[StepState, ...] = ()

    def look(
        self,
        logits: LazyLogits,
        canvas: Canvas,
        score: Float[Tensor, "g n"],
        positions: Bool[Tensor, "b n"],
        window: Bool[Tensor, "g n"],
        step: Int[Tensor, " g"],
        steps: Int[Tensor, " g"],
    ) -> StepState:
        """What the policy is to decide on; of the logits, asked for the whole batch, these rows' own."""
        if len(self.rows) < len(positions):
            logits = logits[torch.isin(positions.nonzero()[:, 0], self.rows)]
        positions = positions[self.rows]
        if len(logits):
            logits = self.sampler.shaped(logits, canvas, positions)
        state = StepState(
            canvas, score, positions, logits, window, step, steps, self.sampler.pick, self.rng, self.history
        )
        self.history = (replace(state, history=()), *self.history)[: getattr(self.sampler.policy, "history_length", 0)]
        return state


def _groups(samplers: Sequence[Sampler], rng: RowGenerators, device: torch.device) -> list[_Group]:
    """Rows whose samplers are equal go together, in order."""
    kinds = [sampler for i, sampler in enumerate(samplers) if sampler not in samplers[:i]]
    return [_Group(kind, [i for i, other in enumerate(samplers) if other == kind], rng, device) for kind in kinds]


def finished(canvas: Canvas, ends: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Rows whose text is settled up to an end token that they wrote themselves; -1 is none."""
    settled = canvas.open.long().cumsum(1) == 0
    return (settled & canvas.editable & (canvas.tokens == ends[:, None])).any(1)
