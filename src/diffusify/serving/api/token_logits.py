"""The logits of given tokens, each after the tokens before it, and the log-probabilities of a prompt's tokens.

Axes: b rows, n positions, k tokens, v vocabulary.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.logits import CHUNK_SIZE
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.api.logprobs import TokenLogprob

ROWS_PER_PASS = 16  # of models without an AR half; each row predicts one token


def token_logits(lm: DiffusionLM, canvas: Canvas) -> Iterator[tuple[Float[Tensor, "k v"], Int[Tensor, "k 2"]]]:
    """The logits at all editable positions of a clean canvas, in chunks, with their (row, position).

    Each is given the tokens before it: in one forward pass under the AR model or AR half, otherwise with all later
    positions open, a row for each token.
    """
    canvas = canvas.to(lm.denoiser.device)
    cells = canvas.editable.nonzero()
    if not len(cells):
        return
    if lm.config.reads_as_ar_model:
        logits = lm.denoiser.predict(canvas, positions=canvas.editable)
        yield from zip(logits.chunks(), cells.split(CHUNK_SIZE), strict=True)
        return
    for chunk in cells.split(ROWS_PER_PASS):
        rows, positions = chunk[:, 0], chunk[:, 1:]
        index = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device)
        open = (index >= positions) & canvas.real[rows]
        tokens = torch.where(open, lm.config.mask_token_id, canvas.tokens[rows])
        later = Canvas(tokens, open, canvas.editable[rows], canvas.document[rows])
        yield lm.denoiser.predict(later, positions=index == positions).logits, chunk


class PromptLogprobs:
    """The log-probability of each token of some prompts, with the `top` most likely tokens; for `Job.work`.

    After its only step, `found` has the tokens of each prompt; the first one has no log-probability.
    """

    def __init__(self, lm: DiffusionLM, prompts: list[list[int]], top: int) -> None:
        self._lm, self._top = lm, top
        tokens = sum(map(len, prompts)) - len(prompts)
        self.forwards = min(1, tokens) if lm.config.reads_as_ar_model else math.ceil(tokens / ROWS_PER_PASS)
        pad, n = lm.tokenizer.pad_token_id, max(map(len, prompts))
        document = torch.tensor([[1] * len(prompt) + [0] * (n - len(prompt)) for prompt in prompts])
        rows = torch.tensor([prompt + [pad] * (n - len(prompt)) for prompt in prompts])
        editable = (document > 0) & (torch.arange(n) > 0)
        self.canvas = Canvas.clean(rows, document, editable)
        self.found = [[TokenLogprob(prompt[0])] for prompt in prompts]

    def __iter__(self) -> Iterator[None]:
        tokens = self.canvas.tokens.tolist()
        for logits, cells in token_logits(self._lm, self.canvas):
            log_probs = logits.log_softmax(-1)
            own = log_probs.gather(1, self.canvas.tokens.to(cells.device)[cells[:, 0], cells[:, 1]][:, None])[:, 0]
            values, ids = (each.tolist() for each in log_probs.topk(min(self._top, logits.shape[1])))
            for (row, position), log_prob, *top in zip(cells.tolist(), own.tolist(), ids, values, strict=True):
                likely = tuple((token, value) for token, value in zip(*top, strict=True) if value > -math.inf)
                self.found[row].append(TokenLogprob(tokens[row][position], log_prob, likely))
        yield
