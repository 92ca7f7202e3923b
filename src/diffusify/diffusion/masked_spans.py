"""Random masked spans of training texts, for models that fill them in blocks from left to right.

Axes: b texts, n positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import RowShard
from diffusify.diffusion.length_tokens import Columns


@dataclass(frozen=True)
class MaskedSpans:
    """How spans of a training text are chosen to be filled; all other text is given.

    A `share` of the tokens is in spans. The mean length of the spans of a document is log-uniform up to `longest`
    tokens. Half of the spans end with an end token and a gap of up to `longest` positions before the text after them,
    so a model also learns to fill spans whose length it is not told. Raises ValueError for a share outside of (0, 1) or
    a `longest` below 1.
    """

    share: float = 0.5
    longest: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share} of a text must be between 0 and 1; {MaskedSpans.share} is usual")
        if self.longest < 1:
            raise ValueError(f"longest={self.longest} must be at least 1 token; {MaskedSpans.longest} is usual")

    def __call__(
        self,
        clean: Canvas,
        end_token_id: int,
        *,
        generator: Generator | None = None,
        shard: RowShard | None = None,
    ) -> Canvas:
        """The canvas with only the tokens of spans editable; rows that become too long are cut.

        Random numbers are those of the whole step (see `noised`).
        """
        document = clean.document if shard is None else shard.document
        numbers = torch.rand(5, *document.shape, generator=generator)
        numbers = numbers if shard is None else numbers[:, shard.rows]
        index, position = torch.arange(document.shape[1]), clean.position_ids
        mean = self.longest ** numbers[0].gather(1, index - position)  # one for each document
        # Neighbouring segments may both be in a span, which is longer then.
        starts = (position == 0) | (numbers[1] < 1 / (1 + (mean - 1) * (1 - self.share)))
        segment = torch.where(starts, index, 0).cummax(1).values
        spans = (numbers[2].gather(1, segment) < self.share) & clean.editable
        canvas = Canvas(clean.tokens, clean.open, spans, clean.document)
        return _with_gaps(canvas, numbers[3] < 0.5, (self.longest ** numbers[4]).long(), end_token_id)


def _with_gaps(canvas: Canvas, selected: Bool[Tensor, "b n"], size: Int[Tensor, "b n"], end_token_id: int) -> Canvas:
    """The canvas with an end token at the end of the selected spans, and padding up to `size` positions with it."""
    editable, document = canvas.editable, canvas.document
    ends = editable.clone()
    ends[:, :-1] &= ~(editable[:, 1:] & (document[:, 1:] == document[:, :-1]))
    columns = Columns.repeated(1 + size * (ends & selected), document.shape[1])
    gap = columns.take_canvas(canvas)
    is_text, is_end = columns.copy == 0, columns.copy == 1
    return Canvas(
        tokens=torch.where(is_end, end_token_id, gap.tokens),
        open=gap.open,
        editable=gap.editable & (is_text | is_end),
        document=torch.where(is_text | is_end, gap.document, 0),
    )
