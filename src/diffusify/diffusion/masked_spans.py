"""Random masked spans of training texts, for block models that fill them.

Axes: b texts, n positions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Generator, Tensor

from diffusify.canvas import Canvas, last_starts
from diffusify.diffusion.corruption import RowShard
from diffusify.diffusion.length_tokens import Columns


@dataclass(frozen=True)
class MaskedSpans:
    """One random span of each document is to be filled, and all other text is given.

    Its length is log-uniform up to that of the document. In a share `passages` of the documents it is widened to whole
    passages: lines or sentences, as spans often are in use. An end token follows it, so a model learns where a span
    ends. Raises ValueError if `passages` is not in [0, 1].
    """

    passages: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.passages <= 1:
            raise ValueError(f"passages={self.passages} is a share of the documents, in [0, 1]; 0.5 is usual")

    def __call__(
        self,
        clean: Canvas,
        end_token_id: int,
        passage_starts: Bool[Tensor, "b n"],
        *,
        generator: Generator | None = None,
        shard: RowShard | None = None,
    ) -> Canvas:
        """The canvas with only the tokens of spans editable, and end tokens behind them; rows are cut to their width.

        Random numbers are those of the whole step (see `noised`).
        """
        step = clean.document if shard is None else shard.document
        uniform = torch.rand(3, *step.shape, generator=generator)
        uniform = uniform if shard is None else uniform[:, shard.rows]
        b, n = clean.document.shape
        index, editable = torch.arange(n).expand(b, n), clean.editable

        def highest(values: Tensor) -> Tensor:
            """The highest value in each position's document, of those of its editable positions; -1 without any."""
            values = values.masked_fill(~editable, -1)
            best = values.new_full((b, n + 1), -1).scatter_reduce(1, clean.document, values, "amax")
            return best.gather(1, clean.document)

        start = highest(torch.where(uniform[0] == highest(uniform[0]), index, -1))
        has_span, start = start >= 0, start.clamp_min(0)
        size = highest(clean.position_ids).clamp_min(1) ** uniform[1].gather(1, start)
        end = start + size.ceil().long()
        run = clean.run_starts.cumsum(1)
        before = last_starts(passage_starts | clean.run_starts)
        behind = torch.where(passage_starts, index, n).flip(1).cummin(1).values.flip(1)
        is_widened = uniform[2].gather(1, start) < self.passages
        end = torch.where(is_widened & (end < n), behind.gather(1, end.clamp_max(n - 1)), end)
        run_of_span, start = run.gather(1, start), torch.where(is_widened, before.gather(1, start), start)
        spans = has_span & (index >= start) & (index < end) & (run == run_of_span)
        is_last = spans.clone()
        is_last[:, :-1] &= ~spans[:, 1:] | (clean.document[:, 1:] != clean.document[:, :-1])
        columns = Columns.repeated(1 + is_last.long(), n)
        canvas = columns.take_canvas(Canvas(clean.tokens, clean.open, spans, clean.document))
        is_end = (columns.copy == 1) & canvas.real
        return Canvas(torch.where(is_end, end_token_id, canvas.tokens), canvas.open, canvas.editable, canvas.document)
