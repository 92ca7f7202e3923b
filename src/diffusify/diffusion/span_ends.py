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
    """Which spans may end before their last position, and how likely each end of the current span of each row is.

    `surplus` is the number of positions that the span of each position may lose. The last of them is for an end token,
    which no span keeps; spans of a fixed length have none.

    Where `sampled`, the end token is sampled like any other. Elsewhere the span is written without it until no later
    end is worth waiting for, and then cut at one of its ends. Greedy decoding itself would seldom end a span, because
    the end token competes at each place with the likeliest token: where one or two sentences could stand, the first
    words of the second are likelier than the end, and again after it.

    `log_prob` is the log-probability that the current span ends before each position and not earlier, given the text
    that is written, -inf where it cannot.
    """

    end_token_id: int
    surplus: Int[Tensor, "b n"]
    sampled: Bool[Tensor, " b"]
    log_prob: Float[Tensor, "b n"]

    @classmethod
    def of_spans(cls, surplus: Int[Tensor, "b n"], end_token_id: int, sampled: Bool[Tensor, " b"]) -> "SpanEnds":
        """The ends of spans of which nothing is written."""
        return cls(end_token_id, surplus, sampled, torch.full(surplus.shape, -torch.inf, device=surplus.device))

    def to(self, device: torch.device | str) -> "SpanEnds":
        """The same on a device."""
        tensors = (self.surplus, self.sampled, self.log_prob)
        return SpanEnds(self.end_token_id, *(each.to(device) for each in tensors))

    def __getitem__(self, rows: Int[Tensor, " rows"]) -> "SpanEnds":
        return SpanEnds(self.end_token_id, self.surplus[rows], self.sampled[rows], self.log_prob[rows])

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

    def observe(
        self,
        write: Bool[Tensor, "b n"],
        start: Int[Tensor, " b"],
        end: Int[Tensor, " b"],
        log_prob: Float[Tensor, "b k"],
    ) -> tuple["SpanEnds", Bool[Tensor, " b"]]:
        """The ends after the positions `write` from `start` on are written, and which spans are complete.

        `log_prob` is that of the end token before each of these positions, and `end` the position after the span.
        """
        n, k = write.shape[1], log_prob.shape[1]
        place = start[:, None] + torch.arange(k, device=write.device)
        column = place.clamp_max(n - 1)
        log_prob = torch.where(write.gather(1, column) & (place < n), log_prob, -torch.inf).clamp_max(-1e-6)
        earlier = torch.log1p(-self.log_prob.exp().sum(1, keepdim=True).clamp_max(1 - 1e-6))  # that it did not end
        log_open = earlier + torch.log1p(-log_prob.exp()).cumsum(1)
        log_prob = log_prob + torch.cat([earlier, log_open[:, :-1]], 1)
        best = torch.maximum(log_prob.cummax(1).values, self.log_prob.amax(1, keepdim=True))
        is_last = (place == end[:, None] - 1) & (log_prob > -torch.inf)
        is_over = ((best > -torch.inf) & (best >= log_open + math.log(_MAX_LATER_PROB))) | is_last
        after = is_over.cumsum(1) - is_over.long() > 0  # the text there depends on how far the drafts were right
        found = self.log_prob.scatter_reduce(1, column, log_prob.masked_fill(after, -torch.inf), "amax")
        return replace(self, log_prob=found), is_over.any(1) & ~self.sampled

    def close(
        self, canvas: Canvas, write: Bool[Tensor, "b n"], end: Int[Tensor, " b"], cut: Int[Tensor, " b"]
    ) -> tuple[Canvas, "SpanEnds", Columns | None]:
        """The canvas without what stands from the positions `cut` to `end`, or from end tokens that were sampled.

        Nothing is cut from `end` on. Where the canvas's positions come from, too, as in `SpanLengths.resize`; its width
        stays the same.
        """
        n = write.shape[1]
        at = torch.arange(n, device=write.device)
        end_token = torch.where(write & (canvas.tokens == self.end_token_id), at, n).amin(1)
        gone = (at >= torch.where(self.sampled, end_token, cut)[:, None]) & (at < end[:, None])
        if not gone.any():
            return canvas, self, None
        columns = Columns.repeated((canvas.real & ~gone).long(), n)
        log_prob = self.log_prob.masked_fill(gone.any(1, keepdim=True), -torch.inf)
        ends = replace(self, surplus=columns.take(self.surplus), log_prob=log_prob)
        return columns.take_canvas(canvas), ends, columns

    def settled(self, written: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """How many of the `written` positions at the start of each row will not change or go any more."""
        is_end = self.log_prob > -torch.inf
        return torch.where(self.sampled | ~is_end.any(1), written, is_end.long().argmax(1))
