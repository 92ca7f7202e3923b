"""How long will the answer be? A head that reads the prompt and tells.

Axes: d texts, m prompt positions, h hidden size, l possible lengths.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diffusify.canvas import Canvas


class LengthHead(nn.Module):
    """A distribution over answer lengths 1 to `longest` (end token included) from the prompt's mean hidden state.

    The length predictor of Diffusion-LLM, but trained together with the denoiser instead of in a second run.
    """

    def __init__(self, hidden_size: int, longest: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, longest)

    @property
    def longest(self) -> int:
        return self.outer.out_features

    def forward(self, hidden: Float[Tensor, "d m h"], prompts: Canvas) -> Float[Tensor, "d l"]:
        real = prompts.real.to(hidden.dtype)[..., None]
        mean = (hidden * real).sum(1) / real.sum(1)
        return self.outer(torch.tanh(self.inner(mean.to(self.inner.weight.dtype)))).float()


def prompts(canvas: Canvas, pad: int = 0) -> Canvas:
    """What is given of every text that has editable positions, one text a row. ValueError if one is given nothing."""
    rows = torch.arange(len(canvas.document), device=canvas.tokens.device)[:, None]
    text = rows * (int(canvas.document.max()) + 1) + canvas.document
    asked = torch.zeros(int(text.max()) + 1, dtype=torch.bool, device=text.device)
    asked[text[canvas.editable]] = True
    given = asked[text] & canvas.real & ~canvas.editable
    _, sizes = text[given].unique_consecutive(return_counts=True)
    if len(sizes) != int(asked.sum()):
        raise ValueError("a length is told from a prompt, and some texts have none")
    tokens = pad_sequence(list(canvas.tokens[given].split(sizes.tolist())), batch_first=True, padding_value=pad)
    real = torch.arange(tokens.shape[1], device=tokens.device) < sizes[:, None]
    return Canvas.clean(tokens, real.long())
