"""The rows of a batch that are still decoded, while others are finished.

Axes: b rows of the batch, u unfinished rows, n positions.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.length_tokens import Columns
from diffusify.sampling.sampler import Frame

# Rows are left out once no more than this share of the rows of a pass is unfinished, because that copies the KV cache.
_MAX_SHARE = 0.75


@dataclass
class UnfinishedRows:
    """The rows that a decoding loop still runs, and its latest frame of the whole batch.

    A finished row would cost as much of each forward pass as any other.
    """

    rows: Int[Tensor, " u"]
    frame: Frame

    @classmethod
    def of_batch(cls, canvas: Canvas) -> "UnfinishedRows":
        """All rows of a batch before the first step."""
        score = torch.zeros_like(canvas.tokens, dtype=torch.float32)
        rows = torch.arange(len(score), device=score.device)
        return cls(rows, Frame(canvas, score, 0, canvas.real.sum(1)))

    def narrow(self, left: Int[Tensor, " left"]) -> bool:
        """Leave out all of these rows but those that are `left`, if they are few enough."""
        is_narrower = len(left) <= _MAX_SHARE * len(self.rows)
        if is_narrower:
            self.rows = self.rows[left]
        return is_narrower

    def whole(self, frame: Frame) -> Frame:
        """The frame of the whole batch after a step of these rows."""
        if len(self.rows) == len(self.frame.settled):
            self.frame = frame
            return frame

        def merged(before: Tensor, after: Tensor) -> Tensor:
            return before.index_copy(0, self.rows, after)

        before, after, columns = self.frame.canvas, frame.canvas, frame.columns
        if columns is not None:
            still = torch.arange(before.tokens.shape[1], device=self.rows.device).expand_as(before.tokens)
            still = Columns(still.where(before.real, -1), torch.zeros_like(still))
            columns = Columns(merged(still.index, columns.index), merged(still.copy, columns.copy))
        self.frame = Frame(
            Canvas(
                merged(before.tokens, after.tokens),
                merged(before.open, after.open),
                merged(before.editable, after.editable),
                merged(before.document, after.document),
            ),
            merged(self.frame.score, frame.score),
            frame.forwards,
            merged(self.frame.settled, frame.settled),
            columns,
        )
        return self.frame

    def of_whole(self, canvas: Canvas) -> Canvas:
        """These rows of a canvas that replaces that of the whole batch."""
        self.frame = replace(self.frame, canvas=canvas)
        return canvas[self.rows]
