"""Random masked spans of training texts, for block models that fill them.

Axes: b texts, n positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import RowShard
from diffusify.diffusion.length_tokens import Columns


@dataclass(frozen=True)
class MaskedSpans:
    """One random span of each document is to be filled, and all other text is given.

    Its length is log-uniform up to that of the document, times `longest`. An end token follows it, so a model learns
    where a span ends. Raises ValueError if `longest` is not in (0, 1].
    """

    longest: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.longest <= 1:
            raise ValueError(f"longest={self.longest} must be a share of a document in (0, 1]; 1.0 is usual")

    def __call__(
        self,
        clean: Canvas,
        end_token_id: int,
        *,
        generator: Generator | None = None,
        shard: RowShard | None = None,
    ) -> Canvas:
        """The canvas with only the tokens of spans editable, and end tokens behind them; rows are cut to their width.

        Random numbers are those of the whole step (see `noised`).
        """
        step = clean.document if shard is None else shard.document
        uniform = torch.rand(2, *step.shape, generator=generator)
        uniform = uniform if shard is None else uniform[:, shard.rows]
        b, n = clean.document.shape
        index = torch.arange(n).expand(b, n)

        def highest(values: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
            """The highest value in each position's document, of those of its editable positions."""
            values = values.masked_fill(~clean.editable, -1.0)
            return (
                values.new_full((b, n + 1), -1.0)
                .scatter_reduce(1, clean.document, values, "amax")
                .gather(1, clean.document)
            )

        is_start = clean.editable & (uniform[0] == highest(uniform[0]))
        size = (highest(clean.position_ids.float()) * self.longest).clamp_min(1) ** uniform[1]
        start = torch.where(is_start, index, -1).cummax(1).values  # of the last span
        length = size.gather(1, start.clamp_min(0)).ceil()
        run = clean.run_starts.cumsum(1)
        spans = (start >= 0) & (index < start + length) & (run == run.gather(1, start.clamp_min(0)))
        is_last = spans.clone()
        is_last[:, :-1] &= ~spans[:, 1:] | is_start[:, 1:]
        columns = Columns.repeated(1 + is_last.long(), n)
        canvas = columns.take_canvas(Canvas(clean.tokens, clean.open, spans, clean.document))
        is_end = (columns.copy == 1) & canvas.real
        return Canvas(torch.where(is_end, end_token_id, canvas.tokens), canvas.open, canvas.editable, canvas.document)
