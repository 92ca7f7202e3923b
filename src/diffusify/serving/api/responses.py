"""A job's texts as they grow, and how they are told: to OpenAI's clients, and to those who watch every step."""

import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusify.sampling.generation import GenerationRun
from diffusify.serving.api.logprobs import TopLogprobs
from diffusify.serving.engine.generation_progress import StartEvent, StepEvent, Text, Written, written
from diffusify.serving.engine.job import Job
from diffusify.text.tokenizer import TextTokenizer


@dataclass
class Answer:
    """The texts that a job writes, as far as a client may know them."""

    job: Job
    read: Callable[[list[int]], str]
    ends: frozenset[int]
    stops: tuple[str, ...] = ()
    texts: list[Text] = field(default_factory=list)
    begun: StartEvent | None = None

    async def grow(self) -> AsyncIterator[tuple[list[str], StartEvent | StepEvent | None]]:
        """What is new in each text, and what happened; at last what was held back."""
        async for told in self.job:
            if isinstance(told, StartEvent):
                self.begun = told
                rooms = told.room[:: told.beam]
                self.texts = [Text(room, self.read, self.ends, self.stops) for room in rooms]
                yield [""] * len(self.texts), told
                continue
            live = self.begun is not None and self.begun.beam == 1  # else nobody knows yet which row it will be
            new = [
                text.apply(told.write[row], told.settled[row]) if live else "" for row, text in enumerate(self.texts)
            ]
            yield new, told
            if all(text.finish == "stop" for text in self.texts):
                self.job.cancel()
        yield self._rest(), None

    async def whole(self) -> list[Text]:
        """The finished texts."""
        async for _ in self.grow():
            pass
        return self.texts

    def _rest(self) -> list[str]:
        assert self.begun is not None
        if self.job.cancelled:
            return [""] * len(self.texts)
        rows, new = written(self.job.work), []
        for text, row in zip(self.texts, self.job.work.best, strict=True):
            text.room = self.begun.room[row]
            new.append(text.apply(rows[row], len(self.begun.rows[row]), last=True))
        return new

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens as OpenAI counts them, and the forwards that they took."""
        assert self.begun is not None
        given = sum(len(row) - len(room) for row, room in zip(self.begun.rows, self.begun.room, strict=True))
        wrote, forwards = sum(len(text.tokens) for text in self.texts), self.job.work.forwards
        prompt = given // self.begun.beam
        pace = round(wrote / max(1, forwards), 3)
        totals = {"prompt_tokens": prompt, "completion_tokens": wrote, "total_tokens": prompt + wrote}
        return totals | {"forwards": forwards, "tokens_per_forward": pace}


def told_tokens(
    tokens: Sequence[Written], row: int, tokenizer: TextTokenizer, watched: TopLogprobs | None
) -> list[dict]:
    """OpenAI's record of each written token: its text, log-probability and likeliest alternatives."""

    def one(token: int, sure: float) -> dict[str, Any]:
        text = tokenizer.decode([token], continues=True)
        return {"token": text, "logprob": _finite(sure), "bytes": list(text.encode())}

    return [
        one(token, sure)
        | {"top_logprobs": [one(*pair) for pair in (watched.found.get((row, at), []) if watched else [])]}
        for at, token, sure in tokens
    ]


class Events:
    """Every step as server-sent events; positions are counted without the start token."""

    def __init__(self, tokenizer: TextTokenizer, *, closed: bool) -> None:
        self.tokenizer, self.closed = tokenizer, closed
        self._skip: list[int] = []
        self._steps = 0

    def of(self, told: StartEvent | StepEvent | None) -> list[str]:
        if isinstance(told, StartEvent):
            self._skip = [int(bool(row) and row[0] == self.tokenizer.start_token_id) for row in told.rows]
            return [event("canvas", {"candidate": i, "tokens": self._shown(i, row)}) for i, row in enumerate(told.rows)]
        if told is None:
            return []
        self._steps += 1
        return [
            event("denoise", self._step(row, told))
            for row in range(len(told.write))
            if told.write[row] or told.erase[row]
        ]

    def _shown(self, candidate: int, row: list[int | None]) -> list[dict[str, Any]]:
        shown = row[self._skip[candidate] : len(row) - self.closed]
        return [
            {"id": token, "text": self.text(token), "kind": "open" if token is None else "given"} for token in shown
        ]

    def _step(self, row: int, told: StepEvent) -> dict[str, Any]:
        skip = self._skip[row]
        write = [
            {"position": at - skip, "id": token, "text": self.text(token), "confidence": round(math.exp(sure), 4)}
            for at, token, sure in told.write[row]
        ]
        erase = [at - skip for at in told.erase[row]]
        return {"candidate": row, "step": self._steps, "forwards": told.forwards, "write": write, "erase": erase}

    def text(self, token: int | None) -> str:
        return "" if token is None else self.tokenizer.decode([token], continues=True)


def event(name: str | None, data: Any) -> str:
    """A server-sent event."""
    plain = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)
    return (f"event: {name}\n" if name else "") + f"data: {plain}\n\n"


def row_tokens(writing: GenerationRun, row: int, tokenizer: TextTokenizer, *, closed: bool) -> list[dict[str, Any]]:
    """The tokens of a finished row, each with how sure it was when it was written."""
    events, canvas = Events(tokenizer, closed=closed), writing.canvas
    ids, open = canvas.tokens[row].tolist(), canvas.open[row].tolist()
    real, editable, score = canvas.real[row].tolist(), canvas.editable[row].tolist(), writing.score[row].tolist()
    cells = [i for i in range(sum(real)) if not open[i]]
    cells = cells[int(ids[0] == tokenizer.start_token_id) : len(cells) - closed]
    end = next((n for n, i in enumerate(cells) if editable[i] and ids[i] == tokenizer.end_token_id), len(cells))
    return [
        {
            "id": ids[i],
            "text": events.text(ids[i]),
            "kind": "written" if editable[i] else "given",
            "confidence": round(math.exp(score[i]), 4) if editable[i] else None,
        }
        for i in cells[:end]
    ]


def _finite(value: float) -> float:
    """JSON knows no infinity."""
    return max(value, -1e9)
