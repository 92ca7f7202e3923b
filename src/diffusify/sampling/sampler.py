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
from diffusify.diffusion.luck import Luck
from diffusify.diffusion.moments import Moment
from diffusify.diffusion.picking import Greedy
from diffusify.diffusion.policies import Unmask


@runtime_checkable
class Denoises(Protocol):
    """What the loop needs of a model: logits at the asked positions of a canvas, row by row (`Denoiser.answers`)."""

    def __call__(self, canvas: Canvas, *, ask: Tensor) -> LazyLogits: ...


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
    A policy that `revises` gets all the steps of a window, one that `rereads` is told of written positions too, and
    one that `remembers` sees so many earlier moments.
    `steps` counts denoising steps for the whole text (None: as many as open positions); `banned` tokens are never
    written; behind a written `end_token_id` a row needs no more work. `repetition_penalty` divides the positive
    logits of tokens that a row has already, and multiplies the negative ones (CTRL). `logits_processor` has the last
    word on the logits.
    """

    pick: Callable[[Tensor, Tensor, Luck], tuple[Tensor, Tensor]] = Greedy()
    policy: Callable[[Moment], Move] = Unmask()
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
        denoiser: Denoises,
        canvas: Canvas,
        window: Int[Tensor, "b n"] | None = None,
        *,
        noise: int,
        luck: Luck | None = None,
    ) -> Iterator[Frame]:
        """Yield the canvas after every step; see `denoise`."""
        return denoise(denoiser, canvas, [self] * len(canvas.tokens), window, noise=noise, luck=luck)

    def shaped(self, logits: LazyLogits, canvas: Canvas, asked: Bool[Tensor, "b n"]) -> LazyLogits:
        """The model's logits, as the settings change them."""
        if self.repetition_penalty == 1 and not self.banned and self.logits_processor is None and not self.constraint:
            return logits
        places = asked.nonzero()
        allowed = self.constraint.allowed(canvas, asked) if self.constraint else None
        banned = torch.tensor(self.banned, dtype=torch.long, device=asked.device)
        there = canvas.real & ~canvas.open

        def change(part: Float[Tensor, "k v"], index: Int[Tensor, " k"]) -> Float[Tensor, "k v"]:
            row, position = places[index].unbind(1)
            if self.repetition_penalty != 1:
                times = torch.zeros(len(asked), part.shape[-1], dtype=torch.long, device=part.device)
                times.scatter_add_(1, canvas.tokens, there.long())
                weaker = torch.where(part > 0, part / self.repetition_penalty, part * self.repetition_penalty)
                part = torch.where(times[row] > 0, weaker, part)
            if self.banned:
                part = part.index_fill(-1, banned, -torch.inf)
            if self.logits_processor is not None:
                where = torch.zeros_like(asked)
                where[row, position] = True
                part = self.logits_processor(part, canvas, where)
            return part if allowed is None else part.masked_fill(~allowed(index, part.shape[-1]), -torch.inf)

        return logits.then(change)


@torch.inference_mode()
def denoise(
    denoiser: Denoises,
    canvas: Canvas,
    samplers: Sequence[Sampler],
    window: Int[Tensor, "b n"] | None = None,
    *,
    noise: int,
    luck: Luck | None = None,
) -> Iterator[Frame]:
    """Yield the canvas after every step, each row sampled in its own way.

    `window` numbers the positions that are worked on together, lowest first (blocks); None is all at once. Every row
    goes at its own pace and has its own `luck` (seeds 0, 1, ... if unset), so that its text does not depend on its
    neighbours. The model is not asked again what it has answered already.
    """
    b, device = len(canvas.tokens), canvas.tokens.device
    luck = luck or Luck.seeded(list(range(b)), device)
    window = torch.zeros_like(canvas.tokens) if window is None else window
    nowhere = torch.iinfo(window.dtype).max
    groups = _groups(samplers, luck, device)
    revises, rereads = (
        torch.tensor([getattr(sampler.policy, name, False) for sampler in samplers], device=device)
        for name in ("revises", "rereads")
    )
    erases = revises | rereads
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
        front = window.masked_fill(~todo, nowhere).amin(1)
        # A revised window gets all its steps: what is written may still change.
        front = torch.where(revises & (step + 1 < steps), current, front)
        if (front == nowhere).all():
            return
        here = canvas.editable & (window == front[:, None])
        asked = here & (canvas.open | rereads[:, None])
        size = here.sum(1)
        step = torch.where(front == current, step + 1, 0)
        share = torch.where(stated > 0, (stated * size / room.clamp_min(1)).round().long(), size).clamp_min(1)
        steps = torch.where(front == nowhere, 0, share)
        current = front
        if not (torch.equal(asked, answered[1]) and torch.equal(canvas.tokens, answered[0])):
            logits = nothing
            if asked.any():
                logits = denoiser(canvas, ask=asked)
                forwards += 1
            answered = (canvas.tokens, asked)
        guess = Guess(canvas.tokens.clone(), torch.full_like(score, -torch.inf))
        move = Move(torch.zeros_like(asked), torch.zeros_like(asked))
        for group in groups:
            rows = group.rows
            now = group.look(logits, canvas[rows], score[rows], asked, here[rows], step[rows], steps[rows])
            decided = group.sampler.policy(now)
            picked = now.picked(decided.write)
            constraint = group.sampler.constraint
            write = constraint.agreed(now.canvas, decided.write, picked) if constraint else decided.write
            guess.tokens[rows], guess.score[rows] = picked.tokens, picked.score
            move.write[rows], move.erase[rows] = write, decided.erase
        score = torch.where(move.write, guess.score, score).masked_fill(move.erase, 0.0)
        canvas = canvas.play(move, guess, noise)
        unsettled = canvas.open | (canvas.editable & erases[:, None] & (window >= front[:, None]))
        yield Frame(canvas, score, forwards, settled=(unsettled.long().cumsum(1) == 0).sum(1))


class _Group:
    """Rows that are sampled alike, and what they looked like before."""

    def __init__(self, sampler: Sampler, rows: list[int], luck: Luck, device: torch.device) -> None:
        self.sampler, self.luck = sampler, luck.of(rows)
        self.rows = torch.tensor(rows, device=device)
        self.earlier: tuple[Moment, ...] = ()

    def look(
        self,
        logits: LazyLogits,
        canvas: Canvas,
        score: Float[Tensor, "g n"],
        asked: Bool[Tensor, "b n"],
        here: Bool[Tensor, "g n"],
        step: Int[Tensor, " g"],
        steps: Int[Tensor, " g"],
    ) -> Moment:
        """What the policy is to decide on; of the logits, asked for the whole batch, these rows' own."""
        if len(self.rows) < len(asked):
            logits = logits[torch.isin(asked.nonzero()[:, 0], self.rows)]
        asked = asked[self.rows]
        if len(logits):
            logits = self.sampler.shaped(logits, canvas, asked)
        now = Moment(canvas, score, asked, logits, here, step, steps, self.sampler.pick, self.luck, self.earlier)
        self.earlier = (replace(now, earlier=()), *self.earlier)[: getattr(self.sampler.policy, "remembers", 0)]
        return now


def _groups(samplers: Sequence[Sampler], luck: Luck, device: torch.device) -> list[_Group]:
    """Rows whose samplers are equal go together, in order."""
    kinds = [sampler for i, sampler in enumerate(samplers) if sampler not in samplers[:i]]
    return [_Group(kind, [i for i, other in enumerate(samplers) if other == kind], luck, device) for kind in kinds]


def finished(canvas: Canvas, ends: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """Rows whose text is settled up to an end token that they wrote themselves; -1 is none."""
    settled = canvas.open.long().cumsum(1) == 0
    return (settled & canvas.editable & (canvas.tokens == ends[:, None])).any(1)
