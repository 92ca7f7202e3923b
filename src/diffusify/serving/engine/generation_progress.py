"""A text on its way to a client: what each step changed, and what of it will stay as it is.

Axes: b rows, n positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.sampling.generation import GenerationRun
from diffusify.sampling.sampler import Frame

Written = tuple[int, int, float]  # position, token, log-probability


@dataclass(frozen=True)
class StartEvent:
    """How each row begins, without padding: token ids, None where open; and the positions that are to be written.

    Every `beam` neighbours are candidates for one text.
    """

    rows: list[list[int | None]]
    room: list[list[int]]
    beam: int


@dataclass(frozen=True)
class StepEvent:
    """What a step did to each row, and how much of the row is settled."""

    write: list[list[Written]]
    erase: list[list[int]]
    settled: list[int]
    forwards: int


class Follow:
    """What happens to a text, as plain numbers. For `Job.listen`: it runs in the engine's thread."""

    def __init__(self) -> None:
        self._before: Canvas | None = None

    def __call__(self, told: GenerationRun | Frame) -> StartEvent | StepEvent:
        before, self._before = self._before, told.canvas
        if isinstance(told, GenerationRun):
            return StartEvent(*_beginnings(told.canvas), told.beam)
        assert before is not None
        after = told.canvas
        changed = ~after.open & (before.open | (before.tokens != after.tokens))
        erase = [[at for at, *_ in row] for row in _by_row(after.open & ~before.open, after.tokens, told.score)]
        return StepEvent(_by_row(changed, after.tokens, told.score), erase, told.settled.tolist(), told.forwards)


def written(writing: GenerationRun) -> list[list[Written]]:
    """All that has been written, row by row."""
    return _by_row(writing.canvas.written, writing.canvas.tokens, writing.score)


def _beginnings(canvas: Canvas) -> tuple[list[list[int | None]], list[list[int]]]:
    cells = torch.where(canvas.open, -1, canvas.tokens).tolist()
    ids = [
        [None if cell < 0 else cell for cell, is_real in zip(row, real, strict=True) if is_real]
        for row, real in zip(cells, canvas.real.tolist(), strict=True)
    ]
    return ids, [[at for at, can in enumerate(row) if can] for row in canvas.editable.tolist()]


def _by_row(where: Bool[Tensor, "b n"], tokens: Tensor, score: Tensor) -> list[list[Written]]:
    rows: list[list[Written]] = [[] for _ in where]
    places = where.nonzero().tolist()
    for (row, at), token, sure in zip(places, tokens[where].tolist(), score[where].tolist(), strict=True):
        rows[row].append((at, token, sure))
    return rows


@dataclass
class Text:
    """A continuation as a client sees it grow: only what is settled, never taken back, up to where it stops."""

    room: Sequence[int]  # its positions
    read: Callable[[list[int]], str]
    ends: frozenset[int]
    stops: tuple[str, ...] = ()
    sent: str = ""
    finish: str | None = None
    ids: dict[int, int] = field(default_factory=dict)
    sure: dict[int, float] = field(default_factory=dict)

    def apply(self, write: list[Written], settled: int, *, last: bool = False) -> str:
        """Take in a step; the new text that can be sent. With the `last` one, all that was held back."""
        for at, token, sure in write:
            self.ids[at], self.sure[at] = token, sure
        if self.finish is not None:
            return ""
        own = [self.ids[at] for at in self.room if at < settled and at in self.ids]
        ended = next((i for i, token in enumerate(own) if token in self.ends), None)
        text = self.read(own if ended is None else own[:ended])
        cut = min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            text, self.finish = text[:cut], "stop"
        elif ended is not None:
            self.finish = "stop"
        elif last or len(own) == len(self.room):
            self.finish = "length"
        else:
            text = self._certain(text)
        new = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += new
        return new

    @property
    def tokens(self) -> list[tuple[int, int, float]]:
        """Position, token and log-probability of what was written, up to the end token."""
        found = []
        for at in self.room:
            if at not in self.ids or self.ids[at] in self.ends:
                break
            found.append((at, self.ids[at], self.sure[at]))
        return found

    def _certain(self, text: str) -> str:
        """Without an unfinished letter at its end, or the beginning of a stop."""
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        for stop in self.stops:
            held = next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-k:])), 0)
            text = text[: len(text) - held]
        return text
