"""Requests for the log-likelihoods of choices, and the rows and batches in which they run.

Axes: b rows, n positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from diffusify.canvas import Canvas
from diffusify.models.denoiser import Denoiser

REQUESTS_PER_CHUNK = 64  # requests that are batched together


@dataclass(frozen=True)
class LikelihoodRequest:
    """A context and its possible continuations, as token ids; the context begins with the start token.

    `scales` multiply the choices' log-probabilities before these are compared: 1 each for sums (the default), or one
    over the length for means. ValueError if the context or a choice is empty, or the number of scales is wrong.
    """

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.context or not self.choices or not all(self.choices):
            raise ValueError("a request needs a context (at least the start token) and choices of at least one token")
        if self.scales and len(self.scales) != len(self.choices):
            raise ValueError(f"{len(self.scales)} scales for {len(self.choices)} choices; give one for each, or none")

    def best(self, log_prob: Sequence[float]) -> int:
        """The index of the choice with the highest scaled log-probability; the first if several are equal."""
        scaled = [a * b for a, b in zip(log_prob, self.scales or [1.0] * len(log_prob), strict=True)]
        return scaled.index(max(scaled))


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of every choice (nats), or a lower bound, and its standard error, 0 if exact.

    `greedy` says for each choice whether greedy decoding generates exactly its tokens; None if unknown.
    """

    log_prob: tuple[float, ...]
    se: tuple[float, ...]
    draws: int = 1
    greedy: tuple[bool, ...] | None = None


def choice_rows(denoiser: Denoiser, request: LikelihoodRequest) -> Canvas:
    """A row for each choice."""
    rows = []
    for choice in request.choices:
        head = fitting_context(denoiser, request.context, choice)
        editable = torch.tensor([[False] * len(head) + [True] * len(choice)])
        rows.append(Canvas.clean(torch.tensor([[*head, *choice]]), editable=editable))
    return stack(rows)


def fitting_context(denoiser: Denoiser, context: tuple[int, ...], choice: tuple[int, ...]) -> tuple[int, ...]:
    """The context before a choice. One that does not fit loses its beginning, but not its start token."""
    limit = denoiser.context_length
    if limit is None or len(context) + len(choice) <= limit:
        return context
    if len(choice) >= limit:
        raise ValueError(f"a choice of {len(choice)} tokens does not fit the context of {limit} tokens; leave it out")
    start = int(denoiser.diffusion_config.frame.start_prompts)
    return context[:start] + context[len(context) + len(choice) + start - limit :]


def pad(tensors: list[Tensor]) -> Tensor:
    """Concatenate rows of several widths, padded with zeros at the end."""
    n = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([nn.functional.pad(tensor, (0, n - tensor.shape[1])) for tensor in tensors])


def stack(canvases: list[Canvas]) -> Canvas:
    return Canvas(*(pad([getattr(canvas, field.name) for canvas in canvases]) for field in fields(Canvas)))


def request_chunks(requests: Sequence[LikelihoodRequest]) -> Iterator[Sequence[LikelihoodRequest]]:
    return (requests[i : i + REQUESTS_PER_CHUNK] for i in range(0, len(requests), REQUESTS_PER_CHUNK))


def batches(shapes: Sequence[Sequence[int]], max_tokens: int | None, device: torch.device) -> Iterator[list[int]]:
    """Indices of texts to run together, the longest first, with at most `max_tokens` tokens after padding.

    `shapes` are their numbers of rows and of positions. A single one may have more tokens. The default depends on the
    device; on a CPU, batches beyond its caches are slower.
    """
    max_tokens = max_tokens or (512 if device.type == "cpu" else 16384)
    batch: list[int] = []
    rows = 0
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i][1]):
        if batch and (rows + shapes[i][0]) * shapes[batch[0]][1] > max_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += shapes[i][0]
    if batch:
        yield batch
