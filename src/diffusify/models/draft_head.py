"""The draft head, which lets each draft of a block model depend on the token before it.

Axes: b canvases, n canvas positions, k positions, d hidden size.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from diffusify.canvas import Canvas


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


def previous_tokens(
    canvas: Canvas, clean: Int[Tensor, "texts n"], positions: Bool[Tensor, "b n"], size: int
) -> tuple[Int[Tensor, " k"], Bool[Tensor, " k"]]:
    """The token of the clean text before each position, and whether it is given to the head in training.

    It is not in every second block, so that masks also learn to predict without it.
    """
    tokens = clean.repeat_interleave(len(positions) // len(clean), 0).roll(1, 1)
    is_known = (canvas.position_ids % size > 0) & (canvas.position_ids // size % 2 == 1)
    return tokens[positions], is_known[positions]
