"""Drafts: the tokens that masks behind a text predict, from which a draft tree is built.

Axes: b texts, a drafted tokens, c candidates for each, q draft paths, d hidden size, v vocabulary.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusify.models.denoiser import Denoiser

_CANDIDATES = 64  # for each token, of which the draft head chooses


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
        plain = Drafts.from_logits(logits, _CANDIDATES)
        return cls(plain.tokens, plain.prob, denoiser, hidden, latest)

    def prob_after(self, depth: int, path: Int[Tensor, "b q k"]) -> Float[Tensor, "b q c"]:
        (b, q), tokens = path.shape[:2], self.tokens[:, depth]
        previous = path[..., depth - 1] if depth else self.latest[:, None].expand(b, q)
        hidden = self.denoiser.after_tokens(self.hidden[:, depth, None].expand(-1, q, -1), previous)
        logits = _logits_of(self.denoiser, hidden, tokens).float()
        return logits.masked_fill(self.prob[:, depth, None] == 0, -torch.inf).softmax(-1).nan_to_num(0.0)


def _logits_of(
    denoiser: Denoiser, hidden: Float[Tensor, "b q d"], tokens: Int[Tensor, "b c"]
) -> Float[Tensor, "b q c"]:
    """The logits of each text's candidates alone.

    Where the network's head is its embedding, which the first call finds out, other tokens cost nothing.
    """
    head = denoiser.draft_head
    assert head is not None, "the model has no draft head"
    products = hidden @ denoiser.embed(tokens).mT
    if head.logits_are_products:
        return products
    every = denoiser.project(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
    logits = every.gather(2, tokens[:, None].expand(-1, hidden.shape[1], -1))
    if head.logits_are_products is None:
        finite = logits.isfinite()
        tolerance = max(1e-3, 4 * torch.finfo(products.dtype).eps)
        head.logits_are_products = torch.allclose(
            products[finite], logits[finite].to(products.dtype), tolerance, tolerance
        )
    return logits
