"""The length head, which predicts an answer's length from its prompt.

Axes: t texts, m prompt positions, h hidden size, l possible lengths.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diffusify.canvas import Canvas


class LengthHead(nn.Module):
    """Logits of the answer lengths 1 to `max_length` (end token included) from the prompt's mean hidden state.

    It is Diffusion-LLM's length predictor, but it is trained together with the denoiser instead of in a second run.
    """

    def __init__(self, hidden_size: int, max_length: int, earlier: "LengthHead | None" = None) -> None:
        """With what an `earlier` head has learned, and at least its `max_length`."""
        super().__init__()
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, max(max_length, earlier.max_length if earlier else 0))
        for weight, learned in zip(self.parameters(), earlier.parameters(), strict=True) if earlier else ():
            weight.data[: len(learned)] = learned

    @property
    def max_length(self) -> int:
        return self.outer.out_features

    def forward(self, hidden: Float[Tensor, "t m h"], prompts: Canvas) -> Float[Tensor, "t l"]:
        real = prompts.real.to(hidden.dtype)[..., None]
        mean = (hidden * real).sum(1) / real.sum(1)
        return self.outer(torch.tanh(self.inner(mean.to(self.inner.weight.dtype)))).float()


def prompt_canvas(canvas: Canvas, pad: int = 0) -> Canvas:
    """The prompts of all texts that have editable positions, one text per row. ValueError if a text has no prompt."""
    rows = torch.arange(len(canvas.document), device=canvas.tokens.device)[:, None]
    text = rows * (int(canvas.document.max()) + 1) + canvas.document
    has_answer = torch.zeros(int(text.max()) + 1, dtype=torch.bool, device=text.device)
    has_answer[text[canvas.editable]] = True
    is_prompt = has_answer[text] & canvas.real & ~canvas.editable
    _, sizes = text[is_prompt].unique_consecutive(return_counts=True)
    if len(sizes) != int(has_answer.sum()):
        raise ValueError("the length head predicts a length from a prompt, and some texts have no prompt")
    tokens = pad_sequence(list(canvas.tokens[is_prompt].split(sizes.tolist())), batch_first=True, padding_value=pad)
    real = torch.arange(tokens.shape[1], device=tokens.device) < sizes[:, None]
    return Canvas.clean(tokens, real.long())
