"""Log-likelihoods of texts under a model: exact where possible, otherwise a bound with its standard error.

Axes: b rows, n positions, d draws, c choices.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.bounds import control_variate_estimates, log_probability, stratified_masks
from diffusify.diffusion.logits import CHUNK_SIZE
from diffusify.diffusion.objectives import cross_entropy
from diffusify.evaluation.branches import Branches, causal_inputs
from diffusify.evaluation.likelihood_requests import (
    Likelihood,
    LikelihoodRequest,
    batches,
    choice_rows,
    fitting_context,
    pad,
    request_chunks,
    stack,
)
from diffusify.models.denoiser import Denoiser


@dataclass(frozen=True)
class Autoregressive:
    """The exact log-probability under an AR model, or under the AR half of a block model, in one forward pass."""

    former_name: ClassVar[str] = "LeftToRight"
    batch_tokens: int | None = None

    def __call__(self, denoiser: Denoiser, requests: Sequence[LikelihoodRequest]) -> Iterator[Likelihood]:
        """Measure requests in order. ValueError for a model without an AR half, and for choices that do not fit."""
        if not denoiser.diffusion_config.reads_as_ar_model:
            config = denoiser.diffusion_config
            raise ValueError(
                f"a model with {config.attention} and shift {config.shift} is not autoregressive; "
                "measure MonteCarlo() or TokenByToken() (--likelihood bound or one-by-one)"
            )
        for chunk in request_chunks(requests):
            rows = [row for request in chunk for row in _branches(denoiser, request)]
            values: dict[int, Tensor] = {}
            for batch in batches([(1, len(row.tokens)) for row in rows], self.batch_tokens, denoiser.device):
                measured = _ar_log_probs(denoiser, [rows[i] for i in batch])
                values |= zip(batch, measured, strict=True)
            each_choice = iter(torch.cat([values[i] for i in range(len(rows))]).tolist())
            for request in chunk:
                log_prob, misses = zip(*(next(each_choice) for _ in request.choices), strict=True)
                yield Likelihood(log_prob, (0.0,) * len(log_prob), greedy=tuple(count == 0 for count in misses))


@torch.inference_mode()
def _ar_log_probs(denoiser: Denoiser, rows: list[Branches]) -> tuple[Float[Tensor, "c 2"], ...]:
    """The AR log-probability of each continuation, and the number of its tokens that greedy decoding would not choose.

    The result has a tensor for each row.
    """
    inputs, column, source = causal_inputs(rows, denoiser.device)
    targets = inputs.tokens.flatten()[column]
    chunks = zip(
        denoiser.lazy_logits(denoiser.hidden_states(inputs, source)).chunks(), targets.split(CHUNK_SIZE), strict=True
    )
    values = [torch.stack([-cross_entropy(chunk, t), (chunk.argmax(-1) != t).float()], 1) for chunk, t in chunks]
    lengths = torch.tensor([len(choice) for row in rows for choice in row.continuations])
    totals = [each.sum(0) for each in torch.cat(values).cpu().double().split(lengths.tolist())]
    return torch.stack(totals).split([len(row.continuations) for row in rows])


@dataclass(frozen=True)
class TokenByToken:
    """The exact log-probability of generating the tokens in order from left to right: a forward pass per token."""

    former_name: ClassVar[str] = "OneByOne"
    batch_tokens: int | None = None

    def __call__(self, denoiser: Denoiser, requests: Sequence[LikelihoodRequest]) -> Iterator[Likelihood]:
        """Measure requests in order. ValueError for choices that do not fit the context length."""

        def predict(canvas: Canvas, clean: Tensor) -> Tensor:
            return denoiser.predict(canvas, positions=canvas.open).logits

        def measure(denoiser: Denoiser, clean: Canvas) -> Tensor:
            return log_probability(predict, clean, clean.position_ids, noise=denoiser.diffusion_config.mask_token_id)

        for log_prob in _measure_texts(denoiser, requests, self.batch_tokens, measure):
            yield Likelihood(tuple(log_prob), (0.0,) * len(log_prob))


@dataclass(frozen=True)
class MonteCarlo:
    """The negative NELBO, estimated in rounds of `draws` stratified mask counts until the best choice is certain.

    All choices of a request use common random numbers. Rounds stop when every other choice is `margin` standard errors
    behind the best, but not before `min_rounds` and not after `max_rounds`. The random numbers depend on `seed` and the
    request alone. A block model is measured block by block, each after clean text.
    """

    former_fields: ClassVar[dict[str, str]] = {"least": "min_rounds", "most": "max_rounds", "decided": "margin"}
    draws: int = 2
    min_rounds: int = 3
    max_rounds: int = 5
    margin: float = 4.0
    batch_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws={self.draws} must be at least 1 per round")
        if not 2 <= self.min_rounds <= self.max_rounds:
            raise ValueError(
                f"min_rounds={self.min_rounds} must be at least 2, and at most max_rounds={self.max_rounds}"
            )

    def __call__(self, denoiser: Denoiser, requests: Sequence[LikelihoodRequest]) -> Iterator[Likelihood]:
        """Measure requests in order. ValueError for choices that do not fit the context length."""
        for chunk in request_chunks(requests):
            rounds: list[list[_Round]] = [[] for _ in chunk]
            active = list(range(len(chunk)))
            for number in range(self.max_rounds):
                active = [i for i in active if not self._is_certain(chunk[i], rounds[i])]
                for i, one in zip(active, self._run_round(denoiser, [chunk[i] for i in active], number), strict=True):
                    rounds[i].append(one)
            for request, mine in zip(chunk, rounds, strict=True):
                estimates = _pseudo_values(mine)
                draws = self._draws_per_round(request) * len(mine)
                yield Likelihood(tuple(map(fmean, estimates)), tuple(map(_se, estimates)), draws)

    def _draws_per_round(self, request: LikelihoodRequest) -> int:
        """At most the number of different mask counts."""
        return min(self.draws, max(map(len, request.choices)))

    def _is_certain(self, request: LikelihoodRequest, rounds: list["_Round"]) -> bool:
        """Whether more rounds are unlikely to change the best choice."""
        if len(rounds) < self.min_rounds:
            return False
        estimates = _pseudo_values(rounds)
        scales = request.scales or (1.0,) * len(estimates)
        best = request.best([fmean(values) for values in estimates])
        for i, values in enumerate(estimates):
            lead = [scales[best] * a - scales[i] * b for a, b in zip(estimates[best], values, strict=True)]
            if i != best and fmean(lead) < self.margin * _se(lead):
                return False
        return len(estimates) > 1 or _se(estimates[0]) == 0.0

    def _run_round(self, denoiser: Denoiser, requests: list[LikelihoodRequest], number: int) -> list["_Round"]:
        noise, size = denoiser.diffusion_config.mask_token_id, denoiser.diffusion_config.block_size
        noisy, clean, share = [], [], []
        for request in requests:
            texts = choice_rows(denoiser, request)
            unit = texts.position_ids // size if size else torch.zeros_like(texts.tokens)
            seed = zlib.crc32(repr((self.seed, number, request.context, request.choices)).encode())
            generator, draws = Generator().manual_seed(seed), self._draws_per_round(request)
            masks = list(stratified_masks(texts, unit, draws, noise, generator, same_noise=True))
            noisy.append(stack([canvas for canvas, _ in masks]))
            clean.append(texts.tokens.repeat(draws, 1))
            share.append(torch.cat([open_share for _, open_share in masks]))
        results: dict[int, _Round] = {}
        for batch in batches([canvas.tokens.shape for canvas in noisy], self.batch_tokens, denoiser.device):
            canvas, text = stack([noisy[i] for i in batch]), pad([clean[i] for i in batch])
            nll = _masked_nll(denoiser, canvas.to(denoiser.device), text.to(denoiser.device))
            for i, values in zip(batch, nll.split([len(clean[i]) for i in batch]), strict=True):
                width, draws_and_choices = clean[i].shape[1], (-1, len(requests[i].choices))
                tensors = (values[:, :width], noisy[i].open, share[i], noisy[i].editable)
                results[i] = _Round(*(tensor.unflatten(0, draws_and_choices) for tensor in tensors))
        return [results[i] for i in range(len(requests))]


@dataclass(frozen=True)
class _Round:
    """One round of draws for one request; `nll` (nats) is 0 except at open positions."""

    nll: Float[Tensor, "d c n"]
    open: Bool[Tensor, "d c n"]
    share: Float[Tensor, "d c n"]
    editable: Bool[Tensor, "d c n"]


def _pseudo_values(rounds: list[_Round]) -> list[list[float]]:
    """The jackknife pseudo-values of each choice's log-probability, one per round.

    Their mean is the estimate and their spread gives its standard error, although rounds are control variates of each
    other and so not independent.
    """
    count = len(rounds)
    total = _estimate(rounds)
    without = torch.stack([_estimate(rounds[:i] + rounds[i + 1 :]) for i in range(count)])
    return (count * total - (count - 1) * without).T.tolist()


def _estimate(rounds: list[_Round]) -> Float[Tensor, " c"]:
    nll, open, share = (torch.cat([getattr(one, name) for one in rounds]) for name in ("nll", "open", "share"))
    return -control_variate_estimates(nll, open, share, rounds[0].editable[0]).mean(0)


@torch.inference_mode()
def _masked_nll(denoiser: Denoiser, canvas: Canvas, clean: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """The cross-entropy at every open position, 0 elsewhere; on the CPU in float64."""
    logits = denoiser(canvas, clean if denoiser.diffusion_config.block_size else None, positions=canvas.open).logits
    nll = cross_entropy(logits, clean[canvas.open]).cpu().double()
    return torch.zeros(clean.shape, dtype=nll.dtype).masked_scatter(canvas.open.cpu(), nll)


Measure = Autoregressive | TokenByToken | MonteCarlo


def best_measure(denoiser: Denoiser) -> Measure:
    """`Autoregressive` (exact) if the model has an AR half, otherwise `MonteCarlo`."""
    return Autoregressive() if denoiser.diffusion_config.reads_as_ar_model else MonteCarlo()


def _measure_texts(
    denoiser: Denoiser,
    requests: Sequence[LikelihoodRequest],
    batch_tokens: int | None,
    measure: Callable[[Denoiser, Canvas], Tensor],
) -> Iterator[list]:
    """For each request in order, the values of `measure` for its choices."""
    for chunk in request_chunks(requests):
        texts = [choice_rows(denoiser, request) for request in chunk]
        results: dict[int, list] = {}
        for batch in batches([canvas.tokens.shape for canvas in texts], batch_tokens, denoiser.device):
            measured = measure(denoiser, stack([texts[i] for i in batch]).to(denoiser.device))
            for i, values in zip(batch, measured.split([len(texts[i].tokens) for i in batch]), strict=True):
                results[i] = values.tolist()
        yield from (results[i] for i in range(len(chunk)))


def _branches(denoiser: Denoiser, request: LikelihoodRequest) -> list[Branches]:
    """The choices in as few rows as possible: those that leave room for the same context share a row."""
    contexts = [fitting_context(denoiser, request.context, choice) for choice in request.choices]
    pairs = groupby(zip(contexts, request.choices, strict=True), key=lambda pair: pair[0])
    return [Branches(context, tuple(choice for _, choice in group)) for context, group in pairs]


def _se(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return stdev(values) / len(values) ** 0.5
