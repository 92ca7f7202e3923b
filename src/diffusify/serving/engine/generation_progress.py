"""The progress of a generation as clients receive it: the changes of each step, and the text that is final.

Axes: b rows, n positions.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.sampling.generation import GenerationRun
from diffusify.sampling.sampler import Frame
from diffusify.text.stop_strings import find_stop
from diffusify.text.tool_calls import ToolCallFormat

WrittenToken = tuple[int, int, float]  # position, token id, log-probability


@dataclass(frozen=True)
class StartEvent:
    """The rows of a generation before its first step, without padding.

    `rows` are token ids, None where open; `editable` are the positions that will be written. Every `num_candidates`
    consecutive rows are candidates for one text.
    """

    rows: list[list[int | None]]
    editable: list[list[int]]
    num_candidates: int


@dataclass(frozen=True)
class StepEvent:
    """The changes of one step in each row, and how many positions at the start of each row are final (`settled`).

    Positions in `expand` have become two open ones, and those in `delete` are gone, both counted before the step; the
    others are counted after it.
    """

    write: list[list[WrittenToken]]
    erase: list[list[int]]
    settled: list[int]
    forwards: int
    expand: list[list[int]]
    delete: list[list[int]]


class ProgressTracker:
    """Turns the steps of a generation into events of plain numbers. For `Job.on_step`, so in the engine's thread."""

    def __init__(self) -> None:
        self._previous: Canvas | None = None

    def __call__(self, step: GenerationRun | Frame) -> StartEvent | StepEvent:
        before, self._previous = self._previous, step.canvas
        if isinstance(step, GenerationRun):
            return StartEvent(*_initial_rows(step.canvas), step.num_candidates)
        assert before is not None
        after, counts = step.canvas, before.real.long()
        if step.columns is not None:
            counts = step.columns.counts(counts.shape[1])
        expand, delete = _positions(counts == 2), _positions((counts == 0) & before.real)
        if step.columns is not None:
            before = step.columns.take_canvas(before)
        changed = after.written & (before.open | (before.tokens != after.tokens))
        erase = _positions(after.open & ~before.open)
        write = _by_row(changed, after, step.score)
        return StepEvent(write, erase, step.settled.tolist(), step.forwards, expand, delete)


def written_tokens(run: GenerationRun) -> list[list[WrittenToken]]:
    """All generated tokens of each row."""
    return _by_row(run.canvas.written, run.canvas, run.score)


def _initial_rows(canvas: Canvas) -> tuple[list[list[int | None]], list[list[int]]]:
    cells = torch.where(canvas.open, -1, canvas.tokens).tolist()
    ids = [
        [None if cell < 0 else cell for cell, is_real in zip(row, real, strict=True) if is_real]
        for row, real in zip(cells, canvas.real.tolist(), strict=True)
    ]
    return ids, _positions(canvas.editable)


def _positions(mask: Bool[Tensor, "b n"]) -> list[list[int]]:
    return [[i for i, chosen in enumerate(row) if chosen] for row in mask.tolist()]


def _by_row(mask: Bool[Tensor, "b n"], canvas: Canvas, score: Tensor) -> list[list[WrittenToken]]:
    rows: list[list[WrittenToken]] = [[] for _ in mask]
    cells = zip(mask.nonzero().tolist(), canvas.tokens[mask].tolist(), score[mask].tolist(), strict=True)
    for (row, position), token, log_prob in cells:
        rows[row].append((position, token, log_prob))
    return rows


@dataclass
class TextStream:
    """One text as it is sent to a client: only what is final, up to an end token, a stop string or a tool call.

    `decode` turns token ids into text, and `trim` removes white space at its ends. `sent` is the text so far;
    `finish_reason` is None until the text is finished, then "stop", "tool_calls" or "length".
    """

    positions: Sequence[int]  # of its tokens in the row
    decode: Callable[[list[int]], str]
    end_token_ids: frozenset[int]
    stops: tuple[str, ...] = ()
    trim: Callable[[str], str] = str
    calls: ToolCallFormat | None = None
    sent: str = ""
    finish_reason: str | None = None
    ids: dict[int, int] = field(default_factory=dict)
    log_probs: dict[int, float] = field(default_factory=dict)
    before_call: str = ""  # the text before a tool call, untrimmed
    num_tokens: int | None = None  # of a text that a stop string or a tool call ends
    max_tokens: int = 0  # of a span of unknown length, which the model may end before

    def resize(self, expand: list[int], delete: list[int]) -> None:
        """Follow a step in which positions have become two or are gone (see `StepEvent`)."""
        gone, doubled = set(delete), set(expand)

        def moved(position: int) -> int:
            return position + bisect_left(expand, position) - bisect_left(delete, position)

        kept = [position for position in self.positions if position not in gone]
        self.positions = [moved(p) + copy for p in kept for copy in range(1 + (p in doubled))]
        self.ids = {moved(position): token for position, token in self.ids.items() if position not in gone}
        self.log_probs = {moved(p): log_prob for p, log_prob in self.log_probs.items() if p not in gone}

    def apply(self, write: list[WrittenToken], settled: int, *, last: bool = False) -> str:
        """Add the tokens of a step; the text that can be sent now. After the `last` step nothing is held back."""
        for position, token, log_prob in write:
            self.ids[position], self.log_probs[position] = token, log_prob
        if self.finish_reason is not None:
            return ""
        ids = [self.ids[position] for position in self.positions if position < settled and position in self.ids]
        end = next((i for i, token in enumerate(ids) if token in self.end_token_ids), None)
        text = self.decode(ids if end is None else ids[:end])
        found = self._find_end(text)
        if found is not None:
            at, self.finish_reason = found
            lengths = range(len(ids) if end is None else end)
            self.num_tokens = bisect_left(lengths, True, key=lambda n: self._find_end(self.decode(ids[:n])) is not None)
            text = self.before_call = text[:at]
        elif end is not None:
            self.finish_reason = "stop"
        elif last or len(ids) == len(self.positions):
            self.finish_reason = "stop" if len(self.positions) < self.max_tokens else "length"
        else:
            text = self._without_partial_end(text)
        text = self.trim(text)
        new = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += new
        return new

    @property
    def tokens(self) -> list[WrittenToken]:
        """The generated tokens up to the end token, or up to the one that completes a stop string."""
        found = []
        for position in self.positions[: self.num_tokens]:
            if position not in self.ids or self.ids[position] in self.end_token_ids:
                break
            found.append((position, self.ids[position], self.log_probs[position]))
        return found

    @property
    def end_token(self) -> WrittenToken | None:
        """The end token, if the text has one."""
        position = next(iter(self.positions[len(self.tokens) : self.num_tokens]), None)
        return None if position not in self.ids else (position, self.ids[position], self.log_probs[position])

    def _find_end(self, text: str) -> tuple[int, str] | None:
        """Where the stop string or tool call begins that is complete first, and the reason to finish there."""
        stop = find_stop(text, self.stops)
        ends = [] if stop is None else [(stop.end, stop.start, "stop")]
        if self.calls is not None and (at := self.calls.find_call(text)) >= 0:
            ends.append((at + len(self.calls.sign), at, "tool_calls"))
        return min(ends)[1:] if ends else None

    def _without_partial_end(self, text: str) -> str:
        """The text without an incomplete character or the beginning of a stop string or tool call at its end."""
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        for stop in (*self.stops, *([] if self.calls is None else [self.calls.sign])):
            held = next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-k:])), 0)
            text = text[: len(text) - held]
        return text
