"""OpenAI's options about token probabilities: biases and penalties, and reports of tokens and the likeliest others.

Axes: b rows, n positions.
"""

import math
from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.logits import LazyLogits
from diffusify.text.tokenizer import TextTokenizer


@dataclass(eq=False)
class TopLogprobs:
    """Records the `top` most likely tokens of each position in the step that writes it.

    `found` holds them as (token id, log-probability), by row and position.
    """

    top: int
    found: dict[tuple[int, int], list[tuple[int, float]]] = field(default_factory=dict)

    def __call__(self, write: Bool[Tensor, "b n"], logits: LazyLogits) -> None:
        chunks = [chunk.log_softmax(-1).topk(self.top) for chunk in logits.chunks()]
        for (row, position), log_probs, ids in zip(
            write.nonzero().tolist(),
            [values for chunk in chunks for values in chunk.values.tolist()],
            [values for chunk in chunks for values in chunk.indices.tolist()],
            strict=True,
        ):
            self.found[row, position] = [(i, p) for i, p in zip(ids, log_probs, strict=True) if p > -math.inf]


@dataclass(frozen=True)
class Penalties:
    """A logits processor for OpenAI's `logit_bias`, `presence_penalty` and `frequency_penalty`.

    `bias` is added to the logits of its tokens. The penalties are subtracted for tokens that the text already has.
    """

    bias: tuple[tuple[int, float], ...] = ()
    presence: float = 0.0
    frequency: float = 0.0

    def __call__(self, logits: Tensor, canvas: Canvas, positions: Bool[Tensor, "b n"]) -> Tensor:
        if self.presence or self.frequency:
            counts = logits.new_zeros(len(positions), logits.shape[-1])
            counts.scatter_add_(1, canvas.tokens, canvas.written.to(counts.dtype))
            penalty = self.frequency * counts + self.presence * (counts > 0)
            logits = logits - penalty[positions.nonzero()[:, 0]]
        if self.bias:
            tokens, values = zip(*self.bias, strict=True)
            added = logits.new_tensor(values).expand(len(logits), -1)
            logits = logits.index_add(1, torch.tensor(tokens, device=logits.device), added)
        return logits


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability, which the first one of a text does not have, and the most likely tokens."""

    token: int
    log_prob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def chat_logprobs(tokens: Sequence[TokenLogprob], tokenizer: TextTokenizer) -> dict[str, Any]:
    """The logprobs object of /v1/chat/completions, which has a record for each token."""

    def record(token: int, log_prob: float | None) -> dict[str, Any]:
        data = list(_token_bytes(token, tokenizer))
        return {"token": _name(token, tokenizer), "logprob": _finite(log_prob), "bytes": data}

    records = [
        record(each.token, each.log_prob) | {"top_logprobs": [record(*pair) for pair in each.top]} for each in tokens
    ]
    return {"content": records, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprob], tokenizer: TextTokenizer, text: str) -> dict[str, Any]:
    """The logprobs object of /v1/completions, which has one list per field; `text` is that of all tokens."""
    data = [_token_bytes(each.token, tokenizer) for each in tokens]
    if b"".join(data) == f" {text}".encode():  # the space before a text's first word
        first = next(n for n, each in enumerate(data) if each)
        data[first] = data[first][1:]
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    return {
        "tokens": list(map(_text, data)),
        "token_logprobs": [_finite(each.log_prob) for each in tokens],
        # Reversed, so that of tokens with the same text the most likely is kept.
        "top_logprobs": [
            {_name(token, tokenizer): _finite(value) for token, value in reversed(each.top)}
            if each.log_prob is not None
            else None
            for each in tokens
        ],
        "text_offset": list(accumulate((len(decoder.decode(each)) for each in data), initial=0))[:-1],
    }


def _token_bytes(token: int, tokenizer: TextTokenizer) -> bytes:
    if tokenizer.has_plain_bytes:
        return tokenizer.token_bytes(token)
    return tokenizer.decode([token], continues=True).encode()


def _name(token: int, tokenizer: TextTokenizer) -> str:
    """The text of a token, or the name of a special one, which has no text."""
    is_special = token in tokenizer.special_ids
    return (
        str(tokenizer.tokenizer.convert_ids_to_tokens(token)) if is_special else _text(_token_bytes(token, tokenizer))
    )


def _text(data: bytes) -> str:
    """The text of a token; a part of a character is written as its bytes, as OpenAI does."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(log_prob: float | None) -> float | None:
    return None if log_prob is None else max(log_prob, -1e9)  # JSON has no infinity
