"""The ends of masked spans that a model fills from left to right.

Axes: b rows, n positions, p nodes of a draft tree, k tokens that a pass may write, v vocabulary.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.length_tokens import Columns

# A span is complete when no later end could be likelier, if the end token has at most this probability there.
_MAX_LATER_PROB = 0.3


@dataclass(frozen=True)
class SpanEnds:
    """Which spans may end before their last position, and the likeliest end of the current span of each row so far.

    `surplus` is the number of positions that the span of each position may lose. The last of them is for an end token,
    which no span keeps; spans of a fixed length have none.

    Where `sampled`, the end token is sampled like any other. Elsewhere a span ends where that is likeliest: after l
    tokens with probability h(l) (1 - h(0)) ... (1 - h(l - 1)), where h(i) is that of the end token after the first i
    tokens of the text that greedy decoding writes without it. Greedy decoding itself would seldom end a span, because
    the end token competes at each place with the likeliest token: where one or two sentences could stand, the first
    words of the second are likelier than the end, and again after it.

    `log_open` is the log-probability that a span has not ended before its first open position, `best_end` the position
    after its likeliest end, and `log_prob` that of this end, -inf before there is one.
    """

    end_token_id: int
    surplus: Int[Tensor, "b n"]
    sampled: Bool[Tensor, " b"]
    log_open: Float[Tensor, " b"]
    best_end: Int[Tensor, " b"]
    log_prob: Float[Tensor, " b"]

    @classmethod
    def of_spans(cls, surplus: Int[Tensor, "b n"], end_token_id: int, sampled: Bool[Tensor, " b"]) -> "SpanEnds":
        """The ends of spans of which nothing is written."""
        zeros = torch.zeros(sampled.shape, device=sampled.device)
        return cls(end_token_id, surplus, sampled, zeros, zeros.long(), zeros - torch.inf)

    def to(self, device: torch.device | str) -> "SpanEnds":
        """The same on a device."""
        tensors = (self.surplus, self.sampled, self.log_open, self.best_end, self.log_prob)
        return SpanEnds(self.end_token_id, *(each.to(device) for each in tensors))

    def restrict(
        self, logits: Float[Tensor, "b p v"], position: Int[Tensor, "b p"], end: Int[Tensor, " b"]
    ) -> Float[Tensor, "b p"]:
        """The log-probability that a span ends at each of these positions, -inf where it may not.

        In place, the end token is left to the logits only where it may be written, and alone at the last position of
        a span. `end` is the position after the span.
        """
        surplus = self.surplus.gather(1, position.clamp_max(self.surplus.shape[1] - 1))
        left = end[:, None] - position
        end_logit = logits[..., self.end_token_id].masked_fill(left > surplus, -torch.inf)
        log_prob = end_logit - logits.logsumexp(-1)
        is_last = (left == 1) & (surplus > 0)
        logits.masked_fill_(is_last[..., None], -torch.inf)
        is_banned = ~self.sampled[:, None] & ~is_last
        logits[..., self.end_token_id] = end_logit.masked_fill(is_banned, -torch.inf)
        return log_prob

    def close(
        self,
        canvas: Canvas,
        write: Bool[Tensor, "b n"],
        start: Int[Tensor, " b"],
        end: Int[Tensor, " b"],
        log_prob: Float[Tensor, "b k"],
    ) -> tuple[Canvas, "SpanEnds", Columns | None]:
        """The canvas with complete spans cut at their ends, after the positions `write` from `start` on are written.

        `log_prob` is that of an end before each of them. Where the canvas's positions come from, too, as in
        `SpanLengths.resize`; its width stays the same.
        """
        n, k = write.shape[1], log_prob.shape[1]
        at = torch.arange(n, device=write.device)
        place = start[:, None] + torch.arange(k, device=write.device)
        is_written = write.gather(1, place.clamp_max(n - 1)) & (place < n)
        log_prob = torch.where(is_written, log_prob, -torch.inf).clamp_max(-1e-6)
        log_open = self.log_open[:, None] + torch.log1p(-log_prob.exp()).cumsum(1)
        reached = torch.cat([self.log_open[:, None], log_open[:, :-1]], 1)
        best = torch.maximum((reached + log_prob).cummax(1).values, self.log_prob[:, None])
        is_over = (
            is_written
            & (best > -torch.inf)
            & ((best >= log_open + math.log(_MAX_LATER_PROB)) | (place == end[:, None] - 1))
        )
        is_counted = is_over.cumsum(1) - is_over.long() == 0  # up to the place where the search is over
        candidate, which = torch.where(is_counted, reached + log_prob, -torch.inf).max(1)
        better = candidate > self.log_prob
        best_end = torch.where(better, place.gather(1, which[:, None])[:, 0], self.best_end)
        token_end = torch.where(write & (canvas.tokens == self.end_token_id), at, n).amin(1)
        cut = torch.where(self.sampled, token_end, torch.where(is_over.any(1), best_end, n))
        is_cut = cut < n
        ends = replace(
            self,
            log_open=torch.where(is_cut, 0.0, log_open[:, -1]),
            best_end=best_end,
            log_prob=torch.where(is_cut, -torch.inf, torch.maximum(candidate, self.log_prob)),
        )
        gone = (at >= cut[:, None]) & (at < end[:, None])
        if not gone.any():
            return canvas, ends, None
        columns = Columns.repeated((canvas.real & ~gone).long(), n)
        return columns.take_canvas(canvas), replace(ends, surplus=columns.take(self.surplus)), columns

    def settled(self, written: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """How many of the `written` positions at the start of each row will not change or go any more."""
        return torch.where(self.sampled | (self.log_prob == -torch.inf), written, self.best_end)
