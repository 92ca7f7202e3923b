"""The denoising loop: a generator of canvases.

Axes: b texts, n positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess, Move
from diffusify.diffusion.luck import Luck
from diffusify.diffusion.picking import Greedy
from diffusify.diffusion.policies import Moment, Unmask


@runtime_checkable
class Answers(Protocol):
    @property
    def logits(self) -> Tensor: ...


@runtime_checkable
class Denoises(Protocol):
    """What the loop needs of a model: logits [k, v] at the asked positions of a canvas, row by row."""

    def __call__(self, canvas: Canvas, *, ask: Tensor) -> Answers: ...


@dataclass(frozen=True)
class Frame:
    """The canvas after a step, the score each written token had (log-probability), and the forwards so far."""

    canvas: Canvas
    score: Float[Tensor, "b n"]
    forwards: int


@dataclass(frozen=True)
class Sampler:
    """How open positions are filled: what is picked, what is written at each step, and how many steps there are.

    Any callables of the same form as the ready-made picks and policies will do.
    A policy that `revises` gets all the steps of a window, and one that `rereads` is told of written positions too.
    `steps` counts denoising steps for the whole text (None: as many as open positions); `banned` tokens are never
    written; behind a written `end_token_id` a row needs no more work. `repetition_penalty` divides the positive
    logits of tokens that a row has already, and multiplies the negative ones (CTRL).
    """

    pick: Callable[[Tensor, Tensor, Luck], tuple[Tensor, Tensor]] = Greedy()
    policy: Callable[[Moment], Move] = Unmask()
    steps: int | None = None
    banned: tuple[int, ...] = ()
    end_token_id: int | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1; leave it unset for one step a token")

    @torch.inference_mode()
    def __call__(
        self,
        denoiser: Denoises,
        canvas: Canvas,
        window: Int[Tensor, "b n"] | None = None,
        *,
        noise: int,
        luck: Luck | None = None,
    ) -> Iterator[Frame]:
        """Yield the canvas after every step.

        `window` numbers the positions that are worked on together, lowest first (blocks); None is all at once. Every
        row goes at its own pace and has its own `luck` (seeds 0, 1, ... if unset), so that its text does not depend on
        its neighbours.
        """
        luck = luck or Luck.seeded(list(range(len(canvas.tokens))), canvas.tokens.device)
        window = torch.zeros_like(canvas.tokens) if window is None else window
        nowhere = torch.iinfo(window.dtype).max
        revises, rereads = (getattr(self.policy, name, False) for name in ("revises", "rereads"))
        room = canvas.open.sum(1)
        score = torch.zeros(canvas.tokens.shape, device=canvas.tokens.device)
        current = torch.full_like(room, -1)
        step, steps, forwards = current, torch.zeros_like(room), 0
        while True:
            todo = canvas.open & ~finished(canvas, self.end_token_id)[:, None]
            front = window.masked_fill(~todo, nowhere).amin(1)
            if revises:  # a window gets all its steps: what is written may still change
                front = torch.where(step + 1 < steps, current, front)
            if (front == nowhere).all():
                return
            here = canvas.editable & (window == front[:, None])
            asked = here if rereads else here & canvas.open
            size = here.sum(1)
            step = torch.where(front == current, step + 1, 0)
            steps = torch.where(front == nowhere, 0, self._steps(size, room))
            current = front
            logits = score.new_zeros(0, 1)
            if asked.any():
                logits = self._shaped(denoiser(canvas, ask=asked).logits, canvas, asked)
                forwards += 1
            tokens, sure = self.pick(logits, asked, luck)
            guess = Guess(
                canvas.tokens.masked_scatter(asked, tokens),
                torch.full_like(score, -torch.inf).masked_scatter(asked, sure.to(score.dtype)),
            )
            move = self.policy(Moment(canvas, guess, score, asked, logits, here, step, steps, luck))
            score = torch.where(move.write, guess.score, score).masked_fill(move.erase, 0.0)
            canvas = canvas.play(move, guess, noise)
            yield Frame(canvas, score, forwards)

    def _shaped(self, logits: Float[Tensor, "k v"], canvas: Canvas, asked: Bool[Tensor, "b n"]) -> Float[Tensor, "k v"]:
        """The model's logits, as the settings change them."""
        if self.repetition_penalty != 1:
            times = torch.zeros(len(asked), logits.shape[-1], dtype=torch.long, device=logits.device)
            times.scatter_add_(1, canvas.tokens, (canvas.real & ~canvas.open).long())
            weaker = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(times[asked.nonzero()[:, 0]] > 0, weaker, logits)
        if self.banned:
            logits = logits.index_fill(-1, torch.tensor(self.banned, device=logits.device), -torch.inf)
        return logits

    def _steps(self, size: Int[Tensor, " b"], room: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The steps that fall to a window, in proportion to its share of the text."""
        if self.steps is None:
            return size.clamp_min(1)
        share = self.steps * size / room.clamp_min(1)
        return share.round().long().clamp_min(1)


def finished(canvas: Canvas, end_token_id: int | None) -> Bool[Tensor, " b"]:
    """Rows whose text is settled up to an end token that they wrote themselves."""
    if end_token_id is None:
        return torch.zeros_like(canvas.open[:, 0])
    settled = canvas.open.long().cumsum(1) == 0
    return (settled & canvas.editable & (canvas.tokens == end_token_id)).any(1)
