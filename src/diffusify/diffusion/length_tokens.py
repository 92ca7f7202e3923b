"""Masked spans that change their length while they are filled, by two tokens (DreamOn, arXiv 2602.01326).

Where the model writes the expand token, two open positions stand; where it writes the delete token, the position goes.

Axes: b rows, n positions, m positions after a step, s spans (column 0 is everything else), k requested positions.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess
from diffusify.diffusion.logits import LazyLogits


@dataclass(frozen=True)
class LengthTokens:
    """The ids of the two tokens by which a model changes the length of a masked span."""

    expand_token_id: int
    delete_token_id: int

    @property
    def ids(self) -> list[int]:
        """Both ids: expand, delete."""
        return [self.expand_token_id, self.delete_token_id]


@dataclass(frozen=True)
class Columns:
    """Where the positions of a canvas come from: `index` is a column of an earlier canvas, -1 in padding.

    `copy` numbers the positions that come from the same column from 0.
    """

    index: Int[Tensor, "b m"]
    copy: Int[Tensor, "b m"]

    @classmethod
    def repeated(cls, counts: Int[Tensor, "b n"], width: int | None = None) -> "Columns":
        """Each column `counts` times in a row; rows are cut or padded to `width`, by default that of the longest."""
        ends = counts.cumsum(1)
        width = int(ends[:, -1].amax()) if width is None else width
        place = torch.arange(width, device=counts.device).expand(len(counts), width).contiguous()
        index = torch.searchsorted(ends, place, right=True)
        copy = place - (ends - counts).gather(1, index.clamp_max(counts.shape[1] - 1))
        return cls(torch.where(place < ends[:, -1:], index, -1), copy)

    def take(self, values: Tensor, padding: int | float | bool = 0) -> Tensor:
        """The values [b, n] of the columns, and `padding` where there is none."""
        return torch.where(self.index < 0, padding, values.gather(1, self.index.clamp_min(0)))

    def take_canvas(self, canvas: Canvas) -> Canvas:
        """The canvas with these columns."""
        tokens, open, editable, document = canvas.tokens, canvas.open, canvas.editable, canvas.document
        return Canvas(self.take(tokens), self.take(open, False), self.take(editable, False), self.take(document))

    def counts(self, n: int) -> Int[Tensor, "b n"]:
        """How often each of the n earlier columns is taken."""
        counts = torch.zeros(len(self.index), n, dtype=torch.long, device=self.index.device)
        return counts.scatter_add(1, self.index.clamp_min(0), (self.index >= 0).long())

    def __getitem__(self, rows: slice | Int[Tensor, " rows"]) -> "Columns":
        return Columns(self.index[rows], self.copy[rows])

    def to(self, device: torch.device | str) -> "Columns":
        """The same on a device."""
        return Columns(self.index.to(device), self.copy.to(device))


@dataclass(frozen=True)
class SpanLengths:
    """The spans of a canvas whose lengths may change, and how far.

    `span` numbers each row's spans from 1; elsewhere it is 0. `spare` positions may still be added to a span, and
    `surplus` positions may be removed. A removed position is not spare again, so a span gets a limited number of
    positions in all, and generation ends.
    """

    tokens: LengthTokens
    span: Int[Tensor, "b n"]
    spare: Int[Tensor, "b s"]
    surplus: Int[Tensor, "b s"]

    def to(self, device: torch.device | str) -> "SpanLengths":
        """The same on a device."""
        return SpanLengths(self.tokens, self.span.to(device), self.spare.to(device), self.surplus.to(device))

    def __getitem__(self, rows: Int[Tensor, " rows"]) -> "SpanLengths":
        return SpanLengths(self.tokens, self.span[rows], self.spare[rows], self.surplus[rows])

    def restrict(self, logits: LazyLogits, canvas: Canvas, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        """The logits at `positions`, without the two tokens where they may not be written."""
        possible = [canvas.open & (left.gather(1, self.span) > 0) for left in (self.spare, self.surplus)]
        banned = ~torch.stack([each[positions] for each in possible], 1)

        def ban(chunk: Float[Tensor, "k v"], index: Int[Tensor, " k"]) -> Float[Tensor, "k v"]:
            ids = torch.tensor(self.tokens.ids, device=chunk.device)
            return chunk.index_copy(1, ids, chunk[:, ids].masked_fill(banned[index], -torch.inf))

        return logits.transform(ban)

    def consistent_writes(self, write: Bool[Tensor, "b n"], guess: Guess) -> Bool[Tensor, "b n"]:
        """`write` without the least likely of those length tokens that are too many for their span together."""
        for token, left in zip(self.tokens.ids, (self.spare, self.surplus), strict=True):
            written = write & (guess.tokens == token) & (self.span > 0)
            for span in range(1, left.shape[1]):
                here = written & (self.span == span)
                order = guess.score.masked_fill(~here, -torch.inf).argsort(dim=1, descending=True, stable=True)
                write = write & (~here | (order.argsort(1) < left[:, span, None]))
        return write

    def resize(
        self, canvas: Canvas, write: Bool[Tensor, "b n"], noise: int
    ) -> tuple[Canvas, "SpanLengths", Columns | None]:
        """Execute the length tokens among what was written: the new canvas, and where its positions come from.

        Without any, nothing changes and there are no `Columns`.
        """
        expand, delete = (write & (self.span > 0) & (canvas.tokens == token) for token in self.tokens.ids)
        if not (expand | delete).any():
            return canvas, self, None
        columns = Columns.repeated((1 + expand.long() - delete.long()) * canvas.real)
        opened, moved = columns.take(expand, False), columns.take_canvas(canvas)
        moved = replace(moved, tokens=torch.where(opened, noise, moved.tokens), open=moved.open | opened)
        added, removed = (
            torch.zeros_like(self.spare).scatter_add(1, self.span, each.long()) for each in (expand, delete)
        )
        lengths = SpanLengths(self.tokens, columns.take(self.span), self.spare - added, self.surplus + added - removed)
        return moved, lengths, columns
