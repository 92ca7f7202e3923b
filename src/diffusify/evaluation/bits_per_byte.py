"""The bits per byte of texts, which compare models with different tokenizers."""

import math
from collections.abc import Sequence

from diffusify.evaluation.likelihood import Measure
from diffusify.evaluation.likelihood_requests import LikelihoodRequest
from diffusify.models.denoiser import Denoiser
from diffusify.text.tokenizer import TextTokenizer


def bits_per_byte(
    denoiser: Denoiser, texts: Sequence[str], tokenizer: TextTokenizer, measure: Measure, *, length: int = 256
) -> tuple[float, float]:
    """The bits per byte of texts and their standard error, in windows of at most `length` tokens.

    Each window follows a start token and no other context. Its bytes are its share of the text's. With `MonteCarlo` the
    value is an upper bound. ValueError if there is no text.
    """
    length = min(length, (denoiser.context_length or length + 1) - 1)
    requests, sizes = [], []
    for text in texts:
        ids = tokenizer.encode(text)
        windows = [ids[start : start + length] for start in range(0, len(ids), length)]
        requests += [LikelihoodRequest((tokenizer.start_token_id,), (tuple(window),)) for window in windows]
        sizes += [len(text.encode()) * len(window) / len(ids) for window in windows]
    if not requests:
        raise ValueError("there is no text to measure")
    bits = [-result.log_prob[0] / math.log(2) for result in measure(denoiser, requests)]
    mean = sum(bits) / sum(sizes)
    spread = sum((one - mean * size) ** 2 for one, size in zip(bits, sizes, strict=True)) ** 0.5
    return mean, spread / sum(sizes)
