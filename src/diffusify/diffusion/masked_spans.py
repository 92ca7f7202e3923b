"""Random masked spans of training texts, for block models that fill them.

Axes: b texts, n positions.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import RowShard

# What separates two lines or two sentences; the last kind has no width.
_SEPARATOR = re.compile(
    "\\s*\n\\s*|(?<=[.!?]) +|(?<=[.!?][\"')\\]\u2019\u201d]) +|(?<=[\u3002\uff01\uff1f])(?![\u300d\u300f\u201d])"
)


@runtime_checkable
class SpanTokenizer(Protocol):
    """What `MaskedSpans` needs of a tokenizer."""

    special_ids: Any  # a collection of ids, of any kind of property

    @property
    def end_token_id(self) -> int: ...
    def encode(self, text: str, *, continues: bool) -> list[int]: ...
    def decode(self, ids: Iterable[int], *, continues: bool) -> str: ...


@dataclass(frozen=True)
class MaskedSpans:
    """One random span of each document is to be filled, and all other text is given.

    Its length is log-uniform up to that of the document. In a share `passages` of the documents it is widened to whole
    passages, lines or sentences, as spans often are in use. A span starts and ends at any character, also inside a
    token of the document, and the text before it, in it and after it is encoded in parts, as the text that a user
    gives is. An end token follows it, so a model learns where a span ends. Raises ValueError if `passages` is not in
    [0, 1].
    """

    passages: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.passages <= 1:
            raise ValueError(f"passages={self.passages} is a share of the documents, in [0, 1]; 0.5 is usual")

    def __call__(
        self,
        clean: Canvas,
        tokenizer: SpanTokenizer,
        *,
        generator: Generator | None = None,
        shard: RowShard | None = None,
    ) -> Canvas:
        """The canvas with only the tokens of spans editable, and end tokens behind them; rows are cut to their width.

        Random numbers are those of the whole step (see `noised`).
        """
        step = clean.document if shard is None else shard.document
        uniform = torch.rand(*step.shape, 7, generator=generator)
        uniform = uniform if shard is None else uniform[shard.rows]
        n = clean.document.shape[1]
        rows = []
        columns = (clean.tokens.tolist(), clean.editable.tolist(), clean.document.tolist(), uniform)
        for tokens, editable, document, draws in zip(*columns, strict=True):
            row: list[tuple[int, bool, int]] = []
            start = 0
            for number, group in groupby(document):
                end = start + len(list(group))
                ids, marks = tokens[start:end], editable[start:end]
                pieces = self._pieces(ids, marks, tokenizer, draws[start].tolist()) if number else [(ids, False)]
                row += [(i, is_span, number) for piece, is_span in pieces for i in piece]
                start = end
            rows.append(row[:n] + [(0, False, 0)] * (n - len(row)))
        made = torch.tensor(rows)
        editable, document = made[..., 1].bool(), made[..., 2]
        return Canvas(made[..., 0], torch.zeros_like(editable), editable, document)

    def _pieces(
        self, ids: list[int], editable: list[bool], tokenizer: SpanTokenizer, draws: list[float]
    ) -> list[tuple[list[int], bool]]:
        """The tokens of a document with one span, in pieces; only the span is to be filled."""
        text_at = [i for i, on in enumerate(editable) if on and ids[i] not in tokenizer.special_ids]
        if not text_at:
            return [(ids, False)]
        at = text_at[int(draws[0] * len(text_at))]
        possible = set(text_at)
        start = next((i + 1 for i in range(at, -1, -1) if i not in possible), 0)
        end = next((i for i in range(at, len(ids)) if i not in possible), len(ids))
        last = min(at + int((end - start) ** draws[1]), end)

        def text(a: int, b: int) -> str:
            return tokenizer.decode(ids[a:b], continues=True)

        whole = text(start, end)
        if "\ufffd" in whole:  # a character that is cut by the row's edge has no text
            before, span, after = ids[start:at], ids[at:last], ids[last:end]
        else:
            edges = len(text(start, at)), len(text(start, last))
            if draws[2] < self.passages:
                a, b = passage(whole, *edges, draws[3:5])
            else:  # half of the edges are inside a token
                inside = [int(max(0.0, 2 * u - 1) * len(text(i, i + 1))) for u, i in ((draws[5], at), (draws[6], last))]
                a, b = edges[0] + inside[0], edges[1] + inside[1] * (last < end)
            parts = whole[:a], whole[a:b], whole[b:]
            before, span, after = (tokenizer.encode(part, continues=True) for part in parts)
        kept = [(ids[:start] + before, False), (span, True), ([tokenizer.end_token_id], True), (after, False)]
        return [*kept, (ids[end:], False)]


def passage(text: str, start: int, end: int, draws: list[float]) -> tuple[int, int]:
    """The characters `start` to `end` of a text widened to whole lines or sentences.

    The space or the line breaks and indentation at either edge are part of the passage, or only some of them, or none.
    """
    edges = [[0], *([match.start(), match.end()] for match in _SEPARATOR.finditer(text)), [len(text)]]
    for edge in edges[1:-1]:
        edge[1:1] = [i + 1 for i in range(*edge) if text[i] == "\n"]
    first = max(i for i, edge in enumerate(edges[:-1]) if edge[0] <= start)
    second = min(i for i, edge in enumerate(edges) if i > first and edge[-1] >= end)
    a, b = (edges[i][int(u * len(edges[i]))] for i, u in zip((first, second), draws, strict=True))
    return a, b
