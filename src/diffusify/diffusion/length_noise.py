"""Training canvases on which masked spans have too few or too many positions (DreamOn, arXiv 2602.01326).

Axes: b canvases, n positions.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Noised, RowShard
from diffusify.diffusion.length_tokens import Columns, LengthTokens
from diffusify.diffusion.schedules import NoiseSchedule

_MEAN_RUN = 4  # delete tokens in a row


@dataclass(frozen=True)
class LengthNoise:
    """How often training replaces open tokens by one expand token, and inserts delete tokens.

    Each document has rates of its own, uniform up to the given ones. `expand` is the share of neighbouring open tokens
    that become one position; more than two may. `delete` is the number of delete tokens for each token, in runs that
    stand at the end of open spans. Raises ValueError if a rate is not in [0, 1).
    """

    expand: float = 0.5
    delete: float = 0.25

    def __post_init__(self) -> None:
        for name, value in (("expand", self.expand), ("delete", self.delete)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be a rate in [0, 1); {getattr(LengthNoise, name)} is usual")

    def __call__(
        self,
        noised: Noised,
        tokens: LengthTokens,
        schedule: NoiseSchedule,
        mask_token_id: int,
        *,
        generator: Generator | None = None,
        shard: RowShard | None = None,
    ) -> Noised:
        """The canvases with length tokens among their targets, which are always open; rows are cut or padded.

        An expand token stands for a run of tokens: the two positions that it becomes stand for the halves of the run.
        Delete tokens weigh 1 - alpha(t), because they are open at every time: on average over the time, each weighs as
        much as a token. Random numbers are those of the whole step (see `noised`), and equal for all views of a text.
        """
        document = noised.canvas.document[:: noised.views] if shard is None else shard.document
        numbers = torch.rand(5, *document.shape, generator=generator)
        numbers = (numbers if shard is None else numbers[:, shard.rows]).repeat_interleave(noised.views, 1)
        canvas, n = noised.canvas, document.shape[1]
        start = torch.arange(n) - canvas.position_ids  # of each position's document
        expand_rate, delete_rate = (
            rate * numbers[i].gather(1, start) for i, rate in ((3, self.expand), (4, self.delete))
        )
        continues = torch.zeros_like(canvas.open)  # of a run that becomes one position
        continues[:, 1:] = canvas.open[:, 1:] & canvas.open[:, :-1] & (canvas.position_ids[:, 1:] > 0)
        continues &= numbers[0] < expand_rate
        runs = (~continues).long().cumsum(1) - 1
        length = torch.zeros_like(runs).scatter_add(1, runs, torch.ones_like(runs)).gather(1, runs)
        deletes = _deletes(canvas, numbers[1] < delete_rate / _MEAN_RUN, numbers[2])
        columns = Columns.repeated(deletes + (~continues).long(), n)
        delete = (columns.index >= 0) & (columns.copy < columns.take(deletes))
        targets = torch.where(columns.take(length) > 1, tokens.expand_token_id, columns.take(noised.clean))
        # Delete tokens belong to the document before them.
        left = Columns(torch.where(delete, columns.index - 1, columns.index), columns.copy)
        open = delete | columns.take(canvas.open, False)
        is_token = (columns.index >= 0) & ~delete & (columns.take(length) == 1)
        aligned = Columns(torch.where(is_token, columns.index, -1), columns.copy)
        weight = torch.where(delete, 1 - schedule.alpha(left.take(noised.t)), columns.take(noised.weight))
        return replace(
            noised,
            canvas=Canvas(
                tokens=torch.where(open, mask_token_id, columns.take(canvas.tokens)),
                open=open,
                editable=delete | columns.take(canvas.editable, False),
                document=left.take(canvas.document),
            ),
            clean=torch.where(delete, tokens.delete_token_id, targets),
            t=left.take(noised.t, 1.0),
            ar_positions=columns.take(noised.ar_positions, False) & ~delete,
            weight=weight,
            resized_from=(replace(canvas, tokens=noised.clean, open=torch.zeros_like(canvas.open)), aligned),
        )


def _deletes(canvas: Canvas, starts: Bool[Tensor, "b n"], uniform: Float[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The number of delete tokens before each position, given where they are drawn.

    Those in an open span go to its end.
    """
    n = starts.shape[1]
    size = 1 + (uniform.clamp_min(1e-9).log() / math.log(1 - 1 / _MEAN_RUN)).floor().long()  # geometric
    size = size * (starts & canvas.editable & (canvas.position_ids > 0))
    at = torch.arange(n).expand(size.shape)
    ends = torch.where(canvas.open & (canvas.position_ids > 0), n, at)
    end = ends.flip(1).cummin(1).values.flip(1)
    return torch.zeros(len(size), n + 1, dtype=torch.long).scatter_add(1, end, size)[:, :n]
