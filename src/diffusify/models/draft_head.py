"""The draft head, which lets each draft of a block model depend on the token before it.

Axes: b texts or positions, q tokens before, c candidates, d hidden size, v vocabulary.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


class DraftHead(nn.Module):
    """Changes the hidden state of a mask by the token before the one that it predicts, once that token is known.

    All masks of a forward pass predict at once, each without knowing what the others will be. With this head the drafts
    of a tree depend on each other, at the price of two small products (as Hydra's heads, and DSpark's Markov head). It
    does not change anything yet when it is new.
    """

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * hidden_size, inner_size)
        self.outer = nn.Linear(inner_size, hidden_size, bias=False)
        nn.init.zeros_(self.outer.weight)
        self.logits_are_products: bool | None = None  # whether a token's logit is the product with its embedding

    def forward(self, hidden: Float[Tensor, "*k d"], previous: Float[Tensor, "*k d"]) -> Float[Tensor, "*k d"]:
        """The changed hidden states; `previous` are the embeddings of the tokens before."""
        previous = functional.rms_norm(previous.float(), previous.shape[-1:])
        inner = self.inner(torch.cat([hidden.to(previous.dtype), previous], -1).to(self.inner.weight.dtype))
        return hidden + self.outer(functional.silu(inner)).to(hidden.dtype)

    def logits_of(
        self,
        hidden: Float[Tensor, "b q d"],
        candidates: Int[Tensor, "b c"],
        embed: Callable[[Tensor], Tensor],
        project: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "b q c"]:
        """The logits of candidates alone, from changed hidden states.

        `embed` gives the embeddings of tokens, and `project` the logits of all tokens. Where these are products with
        the embeddings, which the first call finds out, other tokens than the candidates cost nothing.
        """
        products = hidden @ embed(candidates).to(hidden.dtype).mT
        if self.logits_are_products:
            return products
        every = project(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        logits = every.gather(2, candidates[:, None].expand(-1, hidden.shape[1], -1))
        if self.logits_are_products is None:
            finite = logits.isfinite()
            tolerance = max(1e-3, 4 * torch.finfo(products.dtype).eps)
            self.logits_are_products = torch.allclose(
                products[finite], logits[finite].to(products.dtype), tolerance, tolerance
            )
        return logits
