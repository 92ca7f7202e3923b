"""The half-written text that training and sampling both pass around.

Axes: b batch, n canvas positions.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Guess:
    """What a pick proposes for every position, and how sure it is (log-probability; higher is surer)."""

    tokens: Int[Tensor, "b n"]
    score: Float[Tensor, "b n"]


@dataclass(frozen=True)
class Move:
    """What a policy decides: `write` makes guesses final, `erase` opens positions again."""

    write: Bool[Tensor, "b n"]
    erase: Bool[Tensor, "b n"]


@dataclass(frozen=True)
class Canvas:
    """A batch of half-written texts.

    `open` is stored, never inferred from `tokens == mask_token_id`: a prompt may contain the mask token.
    """

    tokens: Int[Tensor, "b n"]  # what is written; noise wherever `open`
    open: Bool[Tensor, "b n"]  # still to be decided
    editable: Bool[Tensor, "b n"]  # may ever be open: not prompt, not padding
    document: Int[Tensor, "b n"]  # 0 is padding; a packed row counts its documents from 1

    @classmethod
    def clean(
        cls,
        tokens: Int[Tensor, "b n"],
        document: Int[Tensor, "b n"] | None = None,
        editable: Bool[Tensor, "b n"] | None = None,
    ) -> "Canvas":
        """Finished texts; unless told otherwise one document a row, and all of it editable."""
        document = torch.ones_like(tokens) if document is None else document
        editable = document > 0 if editable is None else editable
        return cls(tokens, open=torch.zeros_like(document, dtype=torch.bool), editable=editable, document=document)

    @classmethod
    def from_tokens(cls, rows: list[list[int | None]], *, noise: int, pad: int) -> "Canvas":
        """Given token ids, with an open position for every None; shorter rows are padded on the right."""
        n = max(map(len, rows))
        tokens = torch.tensor([[noise if t is None else t for t in row] + [pad] * (n - len(row)) for row in rows])
        open = torch.tensor([[t is None for t in row] + [False] * (n - len(row)) for row in rows])
        document = torch.tensor([[1] * len(row) + [0] * (n - len(row)) for row in rows])
        return cls(tokens, open=open, editable=open, document=document)

    @property
    def real(self) -> Bool[Tensor, "b n"]:
        """Where there is text, not padding."""
        return self.document > 0

    @property
    def written(self) -> Bool[Tensor, "b n"]:
        """What was open and is decided."""
        return self.editable & ~self.open

    @property
    def position_ids(self) -> Int[Tensor, "b n"]:
        """Each token's place in its own document, from 0."""
        at = torch.arange(self.document.shape[1], device=self.document.device)
        starts = torch.ones_like(self.document, dtype=torch.bool)
        starts[:, 1:] = self.document[:, 1:] != self.document[:, :-1]
        return at - torch.where(starts, at, 0).cummax(1).values

    @property
    def sizes(self) -> Int[Tensor, "b documents"]:
        """How many editable positions each document of each row has; column 0 is padding's."""
        sizes = self.document.new_zeros(len(self.document), int(self.document.max()) + 1)
        return sizes.scatter_add(1, self.document, self.editable.to(sizes.dtype))

    def apply(self, move: Move, guess: Guess, noise: Int[Tensor, "b n"] | int) -> "Canvas":
        """The canvas after a move: guesses written, then erased positions opened to noise."""
        open = (self.open & ~move.write) | move.erase
        tokens = torch.where(move.write, guess.tokens, self.tokens)
        return replace(self, tokens=torch.where(open, noise, tokens), open=open)

    def __getitem__(self, index: slice | tuple[slice, slice] | Int[Tensor, " rows"]) -> "Canvas":
        """Some of the rows, or of the columns."""
        return Canvas(self.tokens[index], self.open[index], self.editable[index], self.document[index])

    def to(self, device: torch.device | str) -> "Canvas":
        return Canvas(*(x.to(device) for x in (self.tokens, self.open, self.editable, self.document)))
