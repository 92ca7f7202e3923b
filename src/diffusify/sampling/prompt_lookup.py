"""Drafts copied from the text itself: what followed the last occurrence of its latest tokens (prompt lookup decoding).

Axes: b texts, n canvas positions, c drafted tokens, w compared tokens.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from diffusify.canvas import Canvas

LONGEST_MATCH = 8  # tokens compared before a position


def copied_drafts(
    tokens: Int[Tensor, "b n"], settled: Int[Tensor, " b"], count: int
) -> tuple[Int[Tensor, "b c"], Float[Tensor, "b c"]]:
    """The next `count` tokens of each text if it goes on as it did before, and the probability of each draft's path.

    The last tokens of the `settled` ones are looked up in the text before; the longest match of up to `LONGEST_MATCH`
    tokens counts, and among equally long ones the latest. A copy that reaches the end of the text repeats itself.
    Probabilities are 0 where nothing matches.
    """
    at = torch.arange(tokens.shape[1], device=tokens.device)
    windows = pad(tokens, (LONGEST_MATCH - 1, 0), value=-1).unfold(1, LONGEST_MATCH, 1)  # [b, n, w], ending at n
    last = (settled - 1)[:, None]
    suffix = windows.gather(1, last[..., None].expand(-1, 1, LONGEST_MATCH))
    length = ((windows == suffix) & (windows >= 0)).flip(-1).long().cumprod(-1).sum(-1)
    best, end = (length * len(at) + at).masked_fill(at >= last, 0).max(1, keepdim=True)
    length, ahead = best // len(at), torch.arange(count, device=tokens.device)
    copied = tokens.gather(1, (end + 1 + ahead % (last - end).clamp_min(1)).clamp_max(len(at) - 1))
    # A token that follows a match of w tokens was right in about 1 - 0.75 / w of all cases; every one lengthens it.
    rate = 1 - 0.75 / (length + ahead)
    return copied, torch.where(length > 0, rate, 0.0).cumprod(-1)


def tokens_as_read(canvas: Canvas, settled: Int[Tensor, " b"]) -> tuple[Int[Tensor, "b n"], Int[Tensor, " b"]]:
    """The tokens in the order in which text behind a span is read first, and how many of them precede the next one."""
    place, is_behind = canvas.reading_order()
    order = torch.where(canvas.real, place, place.shape[1]).argsort(dim=1, stable=True)
    count = torch.where(canvas.open.any(1), settled + is_behind.sum(1), settled)  # a finished row has no next one
    return canvas.tokens.gather(1, order), count
