"""Drafts: the tokens that masks behind a text predict, from which a draft tree is built.

Axes: b texts, a drafted tokens, c candidates for each, q draft paths, d hidden size, v vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusify.diffusion.objectives import CANDIDATES
from diffusify.models.denoiser import Denoiser


@dataclass(frozen=True)
class Drafts:
    """The likeliest tokens at each depth, and their probabilities, whatever the tokens before; 0 without a draft."""

    tokens: Int[Tensor, "b a c"]
    prob: Float[Tensor, "b a c"]

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "b a v"], count: int) -> "Drafts":
        """The `count` likeliest tokens; a depth without a draft has logits of -inf."""
        prob, tokens = logits.float().softmax(-1).nan_to_num(0.0).topk(min(count, logits.shape[-1]), -1)
        return cls(tokens, prob)

    def prob_after(self, depth: int, path: Int[Tensor, "b q k"]) -> Float[Tensor, "b q c"]:
        """The probabilities of the candidates at a depth after each path of drafts."""
        return self.prob[:, depth, None].expand(-1, path.shape[1], -1)


@dataclass(frozen=True)
class ChainedDrafts(Drafts):
    """Drafts that depend on the token before, by the draft head; the first ones on the latest token of the text."""

    denoiser: Denoiser
    hidden: Float[Tensor, "b a d"]
    latest: Int[Tensor, " b"]

    @classmethod
    def from_masks(
        cls,
        denoiser: Denoiser,
        logits: Float[Tensor, "b a v"],
        hidden: Float[Tensor, "b a d"],
        latest: Int[Tensor, " b"],
    ) -> "ChainedDrafts":
        """The drafts of masks, from their logits and hidden states."""
        plain = Drafts.from_logits(logits, CANDIDATES)
        return cls(plain.tokens, plain.prob, denoiser, hidden, latest)

    def prob_after(self, depth: int, path: Int[Tensor, "b q k"]) -> Float[Tensor, "b q c"]:
        (b, q), tokens = path.shape[:2], self.tokens[:, depth]
        previous = path[..., depth - 1] if depth else self.latest[:, None].expand(b, q)
        logits = self.denoiser.draft_logits(self.hidden[:, depth], previous, tokens).float()
        return logits.masked_fill(self.prob[:, depth, None] == 0, -torch.inf).softmax(-1).nan_to_num(0.0)
