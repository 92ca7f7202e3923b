"""The canvas: a batch of partly decoded texts, shared by training and sampling.

Axes: b batch, n canvas positions.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def last_starts(starts: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The position of the last start up to each position; 0 before the first one."""
    return torch.where(starts, torch.arange(starts.shape[1], device=starts.device), 0).cummax(1).values


def offsets(starts: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Each position's distance from the last start."""
    return torch.arange(starts.shape[1], device=starts.device) - last_starts(starts)


@dataclass(frozen=True)
class Guess:
    """The token proposed for every position, and its log-probability (`score`)."""

    tokens: Int[Tensor, "b n"]
    score: Float[Tensor, "b n"]


@dataclass(frozen=True)
class Move:
    """A policy's decision: `write` makes guesses final, `erase` opens positions again (remasking)."""

    write: Bool[Tensor, "b n"]
    erase: Bool[Tensor, "b n"]


@dataclass(frozen=True)
class Canvas:
    """A batch of partly decoded texts.

    `open` is stored, never inferred from `tokens == mask_token_id`: a prompt may contain the mask token.
    """

    tokens: Int[Tensor, "b n"]  # token ids; noise wherever `open`
    open: Bool[Tensor, "b n"]  # still to be decided
    editable: Bool[Tensor, "b n"]  # may be open at any time: neither prompt nor padding
    document: Int[Tensor, "b n"]  # 0 is padding; the documents of a packed row count from 1

    @classmethod
    def clean(
        cls,
        tokens: Int[Tensor, "b n"],
        document: Int[Tensor, "b n"] | None = None,
        editable: Bool[Tensor, "b n"] | None = None,
    ) -> "Canvas":
        """A canvas of finished texts; by default one document per row, all of it editable."""
        document = torch.ones_like(tokens) if document is None else document
        editable = document > 0 if editable is None else editable
        return cls(tokens, open=torch.zeros_like(document, dtype=torch.bool), editable=editable, document=document)

    @classmethod
    def from_tokens(cls, rows: list[list[int | None]], *, noise: int, pad: int) -> "Canvas":
        """A canvas from token ids, with an open, editable position for every None; padded on the right."""
        n = max(map(len, rows))
        tokens = torch.tensor([[noise if t is None else t for t in row] + [pad] * (n - len(row)) for row in rows])
        open = torch.tensor([[t is None for t in row] + [False] * (n - len(row)) for row in rows])
        document = torch.tensor([[1] * len(row) + [0] * (n - len(row)) for row in rows])
        return cls(tokens, open=open, editable=open, document=document)

    @property
    def real(self) -> Bool[Tensor, "b n"]:
        """Where there is text rather than padding."""
        return self.document > 0

    @property
    def written(self) -> Bool[Tensor, "b n"]:
        """The editable positions that are decided."""
        return self.editable & ~self.open

    @property
    def position_ids(self) -> Int[Tensor, "b n"]:
        """Each token's position in its own document, from 0."""
        starts = torch.ones_like(self.document, dtype=torch.bool)
        starts[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        return offsets(starts)

    @property
    def run_starts(self) -> Bool[Tensor, "b n"]:
        """Where masked spans and the given text around them start: runs of equal `editable` in a document."""
        starts = torch.ones_like(self.editable)
        changes = (self.editable[:, 1:] != self.editable[:, :-1]) | (self.document[:, 1:] != self.document[:, :-1])
        starts[:, 1:] = changes
        return starts

    def block_starts(self, size: int, *, of_spans: bool = False) -> Bool[Tensor, "b n"]:
        """Where blocks of `size` tokens start, counted from the start of their document.

        Blocks `of_spans` are counted from the start of each masked span instead; given text between them is a block of
        any size.
        """
        if not of_spans:
            return self.position_ids % size == 0
        starts = self.run_starts
        return starts | (self.editable & (offsets(starts) % size == 0))

    def reading_order(self) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Each token's place in its document if the text behind a span is read first, and where this text is.

        The span is the first one of the document with open positions, or its first one if none is open.
        """
        b, n = self.document.shape
        index = torch.arange(n, device=self.document.device).expand(b, n)

        def first(mask: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
            """The first of these positions in each position's document; n if there is none."""
            values = torch.where(mask, index, n)
            return (
                values.new_full((b, n + 1), n).scatter_reduce(1, self.document, values, "amin").gather(1, self.document)
            )

        open, editable, run = first(self.open), first(self.editable), self.run_starts.cumsum(1)
        span = torch.where(open < n, open, editable)
        is_behind = self.real & (span < n) & (run > run.gather(1, span.clamp_max(n - 1)))
        behind = torch.zeros(b, n + 1, dtype=torch.long, device=index.device)
        behind = behind.scatter_add(1, self.document, is_behind.long()).gather(1, self.document)
        return torch.where(is_behind, index - first(is_behind), self.position_ids + behind), is_behind

    @property
    def sizes(self) -> Int[Tensor, "b documents"]:
        """The number of editable positions of each document of each row; column 0 is padding."""
        sizes = self.document.new_zeros(len(self.document), int(self.document.max()) + 1)
        return sizes.scatter_add(1, self.document, self.editable.to(sizes.dtype))

    def apply(self, move: Move, guess: Guess, noise: Int[Tensor, "b n"] | int) -> "Canvas":
        """The canvas after a move: guesses are written, then erased positions are opened and filled with noise."""
        open = (self.open & ~move.write) | move.erase
        tokens = torch.where(move.write, guess.tokens, self.tokens)
        return replace(self, tokens=torch.where(open, noise, tokens), open=open)

    def end_row(self, row: int, tokens: list[int]) -> "Canvas":
        """The canvas with these tokens, as far as they fit, in place of the editable ones of a row, before padding."""
        canvas = Canvas(*(x.clone() for x in (self.tokens, self.open, self.editable, self.document)))
        start, size = int(self.editable[row].long().argmax()), int(self.editable[row].sum())
        end = start + min(len(tokens), size)
        canvas.tokens[row, start:end] = torch.tensor(tokens[:size], dtype=torch.long, device=canvas.tokens.device)
        canvas.open[row], canvas.editable[row, end:], canvas.document[row, end:] = False, False, 0
        return canvas

    def __getitem__(self, index: slice | tuple[slice, slice] | Int[Tensor, " rows"]) -> "Canvas":
        """A canvas of some of the rows, or of some of the columns."""
        return Canvas(self.tokens[index], self.open[index], self.editable[index], self.document[index])

    def to(self, device: torch.device | str) -> "Canvas":
        """The canvas on a device."""
        return Canvas(*(x.to(device) for x in (self.tokens, self.open, self.editable, self.document)))
