"""A job's texts while they are generated, and their JSON and server-sent events."""

import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from diffusify.sampling.generation import GenerationRun
from diffusify.serving.engine.generation_progress import (
    StartEvent,
    StepEvent,
    TextStream,
    written_tokens,
)
from diffusify.serving.engine.job import Job
from diffusify.text.tokenizer import TextTokenizer

# Characters at which some clients split lines, though server-sent events do not end there; as JSON writes them.
_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


@dataclass
class JobTexts:
    """The texts of a job, `copies` of each prompt. `new_text` makes a `TextStream` for a text and its positions."""

    job: Job
    new_text: Callable[[int, list[int]], TextStream]
    copies: int = 1
    texts: list[TextStream] = field(default_factory=list)
    start: StartEvent | None = None

    async def updates(self) -> AsyncIterator[tuple[list[str], StartEvent | StepEvent | None]]:
        """The new text of each text with the event that caused it; at the end what was held back, with None."""
        async for event in self.job:
            if isinstance(event, StartEvent):
                self.start = event
                positions = event.editable[:: event.num_candidates]
                self.texts = [self.new_text(i, each) for i, each in enumerate(positions)]
                yield [""] * len(self.texts), event
                continue
            # Of several candidates the best is not known yet.
            live = self.start is not None and self.start.num_candidates == 1
            for row, text in enumerate(self.texts if live else []):
                text.resize(event.expand[row], event.delete[row])
            new = [
                text.apply(event.write[row], event.settled[row]) if live else "" for row, text in enumerate(self.texts)
            ]
            yield new, event
            if all(text.finish_reason in ("stop", "tool_calls") for text in self.texts):
                self.job.cancel()
        yield self._finish(), None

    async def finished(self) -> list[TextStream]:
        """Wait for the finished texts."""
        async for _ in self.updates():
            pass
        return self.texts

    def _finish(self) -> list[str]:
        assert self.start is not None
        if self.job.cancelled:
            return [""] * len(self.texts)
        rows, new = written_tokens(self.job.work), []
        for text, row in zip(self.texts, self.job.work.best_rows, strict=True):
            if self.job.work.resizes:
                text.positions = self.job.work.canvas.editable[row].nonzero()[:, 0].tolist()
            elif self.start.num_candidates > 1:
                text.positions = self.start.editable[row]
            new.append(text.apply(rows[row], self.job.work.canvas.tokens.shape[1], last=True))
        return new

    @property
    def prompt_tokens(self) -> int:
        """The number of given tokens; a prompt with several copies counts once."""
        assert self.start is not None
        given = sum(len(row) - len(each) for row, each in zip(self.start.rows, self.start.editable, strict=True))
        return given // self.start.num_candidates // self.copies

    @property
    def completion_tokens(self) -> int:
        """The number of generated tokens."""
        return sum(len(text.tokens) for text in self.texts)

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts of the texts (see `usage`)."""
        return usage(self.prompt_tokens, self.completion_tokens, self.job.work.forwards)


def usage(prompt: int, completion: int, forwards: int) -> dict[str, Any]:
    """Token counts as in OpenAI's API, with the number of forward passes."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return counts | {"forwards": forwards, "tokens_per_forward": round(completion / max(1, forwards), 3)}


class StepEvents:
    """Formats start and step events as server-sent events `canvas` and `denoise`.

    Positions are counted without the start token; `has_end` says whether rows end in an end token, which is left out.
    """

    def __init__(self, tokenizer: TextTokenizer, *, has_end: bool) -> None:
        self.tokenizer, self.has_end = tokenizer, has_end
        self._skip: list[int] = []
        self._steps = 0

    def format(self, event: StartEvent | StepEvent | None) -> list[str]:
        """The server-sent events for an event; None has none."""
        if isinstance(event, StartEvent):
            self._skip = [int(bool(row) and row[0] == self.tokenizer.start_token_id) for row in event.rows]
            return [
                sse_event("canvas", {"candidate": i, "tokens": self._canvas(i, row)})
                for i, row in enumerate(event.rows)
            ]
        if event is None:
            return []
        self._steps += 1
        return [
            sse_event("denoise", self._step(row, event))
            for row in range(len(event.write))
            if event.write[row] or event.erase[row] or event.expand[row] or event.delete[row]
        ]

    def _canvas(self, candidate: int, row: list[int | None]) -> list[dict[str, Any]]:
        tokens = row[self._skip[candidate] : len(row) - self.has_end]
        return [
            {"id": token, "text": self.text(token), "kind": "open" if token is None else "given"} for token in tokens
        ]

    def _step(self, row: int, event: StepEvent) -> dict[str, Any]:
        skip = self._skip[row]
        write = [
            {
                "position": position - skip,
                "id": token,
                "text": self.text(token),
                "confidence": round(math.exp(log_prob), 4),
            }
            for position, token, log_prob in event.write[row]
        ]
        changes = {"expand": event.expand[row], "delete": event.delete[row], "erase": event.erase[row]}
        moved = {name: [position - skip for position in positions] for name, positions in changes.items()}
        head = {"candidate": row, "step": self._steps, "forwards": event.forwards}
        return head | {"write": write} | {name: each for name, each in moved.items() if each or name == "erase"}

    def text(self, token: int | None) -> str:
        """The text of one token."""
        return "" if token is None else self.tokenizer.decode([token], continues=True)


def sse_event(name: str | None, data: Any) -> str:
    """A server-sent event; `data` that is not a string becomes JSON."""
    plain = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)
    plain = plain.translate(_LINE_BREAKS)
    return (f"event: {name}\n" if name else "") + f"data: {plain}\n\n"


def row_tokens(run: GenerationRun, row: int, tokenizer: TextTokenizer, *, has_end: bool) -> list[dict[str, Any]]:
    """The tokens of a finished row, each with the probability it had when it was generated."""
    events, canvas = StepEvents(tokenizer, has_end=has_end), run.canvas
    ids, open = canvas.tokens[row].tolist(), canvas.open[row].tolist()
    real, editable, score = canvas.real[row].tolist(), canvas.editable[row].tolist(), run.score[row].tolist()
    positions = [i for i in range(sum(real)) if not open[i]]
    positions = positions[int(ids[0] == tokenizer.start_token_id) : len(positions) - has_end]
    ends = (n for n, i in enumerate(positions) if editable[i] and ids[i] in tokenizer.end_token_ids)
    return [
        {
            "id": ids[i],
            "text": events.text(ids[i]),
            "kind": "written" if editable[i] else "given",
            "confidence": round(math.exp(score[i]), 4) if editable[i] else None,
        }
        for i in positions[: next(ends, len(positions))]
    ]
