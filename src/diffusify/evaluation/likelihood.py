"""How likely a model finds texts: exactly where it can say, else as a bound with its standard error.

Axes: b rows, n positions, k asked positions, v vocabulary.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from diffusify.canvas import Canvas
from diffusify.diffusion.bounds import draws_compared, log_probability, mask_counts
from diffusify.diffusion.logits import TOGETHER
from diffusify.diffusion.objectives import cross_entropy
from diffusify.models.denoiser import Denoiser
from diffusify.text.tokenizer import TextTokenizer

WAVE = 64  # questions that are measured together


@dataclass(frozen=True)
class Question:
    """A text so far, and ways in which it may go on: token ids, the start token first.

    `worth` is what each choice's log-probability is multiplied by before choices are compared: 1 for sums (unset), one
    by the length for means.
    """

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    worth: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.context or not self.choices or not all(self.choices):
            raise ValueError("a question has a context, if only the start token, and choices of one token at least")
        if self.worth and len(self.worth) != len(self.choices):
            raise ValueError(f"{len(self.worth)} worths for {len(self.choices)} choices; give one for each, or none")

    def best(self, log_prob: Sequence[float]) -> int:
        """The choice that is the likeliest by its worth, the first of equals."""
        told = [a * b for a, b in zip(log_prob, self.worth or [1.0] * len(log_prob), strict=True)]
        return told.index(max(told))


@dataclass(frozen=True)
class Likelihood:
    """Of every choice the log-probability (nats), or a bound from below; its standard error, 0 where it is exact.

    `greedy` tells, where it is known, whether the choice is what the model would write itself, token for token.
    """

    log_prob: tuple[float, ...]
    se: tuple[float, ...]
    draws: int = 1
    greedy: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class LeftToRight:
    """The exact log-probability by the left-to-right model, or by the left-to-right half of a block model: one pass."""

    batch_tokens: int | None = None

    def __call__(self, denoiser: Denoiser, questions: Sequence[Question]) -> Iterator[Likelihood]:
        """In order. ValueError for a model without a left-to-right half, and for texts that it cannot see whole."""
        if not denoiser.diffusion_config.reads_as_ar_model:
            raise ValueError(
                f"a model with {denoiser.diffusion_config.attention} and shift {denoiser.diffusion_config.shift} does not read from "
                "left to right; measure MonteCarlo() or OneByOne()"
            )
        for told in _texts_measured(denoiser, questions, self.batch_tokens, _told):
            log_prob, missed = zip(*told, strict=True)
            yield Likelihood(log_prob, (0.0,) * len(told), greedy=tuple(count == 0 for count in missed))


@torch.inference_mode()
def _told(denoiser: Denoiser, canvas: Canvas) -> Float[Tensor, "b 2"]:
    """Of finished texts, seen from left to right: log-probabilities, and how many tokens are not the likeliest."""
    targets, row = canvas.tokens[canvas.editable], canvas.editable.nonzero()[:, 0]
    parts = zip(denoiser.predict(canvas, positions=canvas.editable).parts(), targets.split(TOGETHER), strict=True)
    each = [torch.stack([-cross_entropy(part, these), (part.argmax(-1) != these).float()], 1) for part, these in parts]
    total = torch.zeros(len(canvas.tokens), 2, dtype=torch.float64, device=targets.device)
    return total.index_add_(0, row, torch.cat(each).double())


@dataclass(frozen=True)
class OneByOne:
    """The exact log-probability of writing the tokens one by one from left to right: a pass for each token."""

    batch_tokens: int | None = None

    def __call__(self, denoiser: Denoiser, questions: Sequence[Question]) -> Iterator[Likelihood]:
        """In order. ValueError for texts that the model cannot see whole."""

        def answer(canvas: Canvas, clean: Tensor) -> Tensor:
            return denoiser.predict(canvas, positions=canvas.open).logits

        def measure(denoiser: Denoiser, clean: Canvas) -> Tensor:
            return log_probability(answer, clean, clean.position_ids, noise=denoiser.diffusion_config.mask_token_id)

        for told in _texts_measured(denoiser, questions, self.batch_tokens, measure):
            yield Likelihood(tuple(told), (0.0,) * len(told))


@dataclass(frozen=True)
class MonteCarlo:
    """The bound, estimated in rounds of `draws` stratified mask counts, until the best choice is decided.

    The choices of a question share their luck (common random numbers). Its rounds end when every other choice is
    `decided` standard errors behind the best, after `least` rounds, and at `most`. What is drawn for a question depends
    on `seed` and the question alone. A block model is measured block by block, each against clean history.
    """

    draws: int = 2
    least: int = 3
    most: int = 5
    decided: float = 4.0
    batch_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws={self.draws} must be at least 1 a round")
        if not 2 <= self.least <= self.most:
            raise ValueError(f"least={self.least} and most={self.most} rounds: at least 2, which a spread takes")

    def __call__(self, denoiser: Denoiser, questions: Sequence[Question]) -> Iterator[Likelihood]:
        """In order. ValueError for texts that the model cannot see whole."""
        for wave in _waves(questions):
            found: list[list[_Draws]] = [[] for _ in wave]  # of each question, its rounds
            going = list(range(len(wave)))
            for turn in range(self.most):
                going = [i for i in going if not self._settled(wave[i], found[i])]
                for i, one in zip(going, self._round(denoiser, [wave[i] for i in going], turn), strict=True):
                    found[i].append(one)
            for question, rounds in zip(wave, found, strict=True):
                each = _choices(rounds)
                draws = self._draws(question) * len(rounds)
                yield Likelihood(tuple(map(fmean, each)), tuple(map(_se, each)), draws)

    def _draws(self, question: Question) -> int:
        """A round's: no more than there are mask counts."""
        return min(self.draws, max(map(len, question.choices)))

    def _settled(self, question: Question, rounds: list["_Draws"]) -> bool:
        """Whether more rounds would hardly tell another choice to be the best."""
        if len(rounds) < self.least:
            return False
        each = _choices(rounds)
        best, worth = question.best([fmean(values) for values in each]), question.worth or (1.0,) * len(each)
        for i, values in enumerate(each):
            ahead = [worth[best] * a - worth[i] * b for a, b in zip(each[best], values, strict=True)]
            if i != best and fmean(ahead) < self.decided * _se(ahead):
                return False
        return len(each) > 1 or _se(each[0]) == 0.0

    def _round(self, denoiser: Denoiser, questions: list[Question], turn: int) -> list["_Draws"]:
        noise, size = denoiser.diffusion_config.mask_token_id, denoiser.diffusion_config.block_size
        noisy, clean, share = [], [], []
        for question in questions:
            texts = _texts(denoiser, question)
            unit = texts.position_ids // size if size else torch.zeros_like(texts.tokens)
            seed = zlib.crc32(repr((self.seed, turn, question.context, question.choices)).encode())
            luck = Generator().manual_seed(seed)
            drawn = list(mask_counts(texts, unit, self._draws(question), noise, luck, alike=True))
            noisy.append(_stack([canvas for canvas, _ in drawn]))
            clean.append(texts.tokens.repeat(len(drawn), 1))
            share.append(torch.cat([part for _, part in drawn]))
        found: dict[int, _Draws] = {}
        for batch in _batches(noisy, self.batch_tokens, denoiser.device):
            canvas, text = _stack([noisy[i] for i in batch]), _pad([clean[i] for i in batch])
            nll = _errors(denoiser, canvas.to(denoiser.device), text.to(denoiser.device)).cpu()
            for i, values in zip(batch, nll.split([len(clean[i]) for i in batch]), strict=True):
                width, apart = clean[i].shape[1], (-1, len(questions[i].choices))
                parts = (values[:, :width], noisy[i].open, share[i], noisy[i].editable)
                found[i] = _Draws(*(part.unflatten(0, apart) for part in parts))
        return [found[i] for i in range(len(questions))]


@dataclass(frozen=True)
class _Draws:
    """A round's errors (nats) at open positions: d draws of c choices."""

    nll: Float[Tensor, "d c n"]
    open: Bool[Tensor, "d c n"]
    share: Float[Tensor, "d c n"]
    editable: Bool[Tensor, "d c n"]


def _choices(rounds: list[_Draws]) -> list[list[float]]:
    """What every round adds to the estimate of each choice's log-probability: the jackknife's pseudo-values.

    Their mean is the estimate, and their spread its error, though rounds are set against each other.
    """
    count = len(rounds)
    whole = _estimate(rounds)
    without = torch.stack([_estimate(rounds[:i] + rounds[i + 1 :]) for i in range(count)])
    return (count * whole - (count - 1) * without).T.tolist()


def _estimate(rounds: list[_Draws]) -> Float[Tensor, " c"]:
    nll, open, share = (torch.cat([getattr(one, name) for one in rounds]) for name in ("nll", "open", "share"))
    return -draws_compared(nll, open, share, rounds[0].editable[0]).mean(0)


@torch.inference_mode()
def _errors(denoiser: Denoiser, canvas: Canvas, clean: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """The cross-entropy at every open position, 0 elsewhere."""
    logits = denoiser(canvas, clean if denoiser.diffusion_config.block_size else None, positions=canvas.open).logits
    told = cross_entropy(logits, clean[canvas.open]).double()
    return torch.zeros(clean.shape, dtype=told.dtype, device=told.device).masked_scatter(canvas.open, told)


Measure = LeftToRight | OneByOne | MonteCarlo


def best_measure(denoiser: Denoiser) -> Measure:
    """What tells most for the least work: exact in one pass where the model can, else the bound."""
    return LeftToRight() if denoiser.diffusion_config.reads_as_ar_model else MonteCarlo()


def _texts_measured(
    denoiser: Denoiser, questions: Sequence[Question], most: int | None, measure: Callable[[Denoiser, Canvas], Tensor]
) -> Iterator[list]:
    """What `measure` says of each question's choices, one entry for each, in order."""
    for wave in _waves(questions):
        texts = [_texts(denoiser, question) for question in wave]
        found: dict[int, list] = {}
        for batch in _batches(texts, most, denoiser.device):
            told = measure(denoiser, _stack([texts[i] for i in batch]).to(denoiser.device))
            for i, values in zip(batch, told.split([len(texts[i].tokens) for i in batch]), strict=True):
                found[i] = values.tolist()
        yield from (found[i] for i in range(len(wave)))


def _texts(denoiser: Denoiser, question: Question) -> Canvas:
    """A row for each choice. What does not fit is cut off the context's beginning, but for its start token."""
    rows, context = [], denoiser.context
    for choice in question.choices:
        head = question.context
        if context is not None and len(head) + len(choice) > context:
            if len(choice) >= context:
                raise ValueError(
                    f"a choice of {len(choice)} tokens does not fit the context of {context}; leave it out"
                )
            spare = context - len(choice) - 1
            head = head[:1] + head[len(head) - spare :]
        rows.append(
            Canvas.clean(
                torch.tensor([[*head, *choice]]), editable=torch.tensor([[False] * len(head) + [True] * len(choice)])
            )
        )
    return _stack(rows)


def _pad(parts: list[Tensor]) -> Tensor:
    """Rows of several widths under each other, zeros behind them."""
    n = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, n - part.shape[1])) for part in parts])


def _stack(canvases: list[Canvas]) -> Canvas:
    return Canvas(*(_pad([getattr(canvas, field.name) for canvas in canvases]) for field in fields(Canvas)))


def _waves(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    return (questions[start : start + WAVE] for start in range(0, len(questions), WAVE))


def _batches(canvases: list[Canvas], most: int | None, device: torch.device) -> Iterator[list[int]]:
    """Canvases to be run together, the longest first, padded to `most` tokens (one canvas may have more).

    Unset, that is what suits the device: what a CPU's caches do not hold costs it more than what batches save.
    """
    most = most or (512 if device.type == "cpu" else 16384)
    batch: list[int] = []
    rows = 0
    for i in sorted(range(len(canvases)), key=lambda i: -canvases[i].tokens.shape[1]):
        if batch and (rows + len(canvases[i].tokens)) * canvases[batch[0]].tokens.shape[1] > most:
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += len(canvases[i].tokens)
    if batch:
        yield batch


def _se(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return stdev(values) / len(values) ** 0.5


def bits_per_byte(
    denoiser: Denoiser, texts: Sequence[str], tokenizer: TextTokenizer, measure: Measure, *, length: int = 256
) -> tuple[float, float]:
    """What texts cost in bits per byte, and its standard error: in windows of `length` tokens, or as many as fit.

    Each window stands alone, behind a start token. Where `measure` tells a bound, so is this.
    """
    length = min(length, (denoiser.context or length + 1) - 1)
    questions, sizes = [], []
    for text in texts:
        ids = tokenizer.encode(text)
        windows = [ids[start : start + length] for start in range(0, len(ids), length)]
        questions += [Question((tokenizer.start_token_id,), (tuple(window),)) for window in windows]
        sizes += [len(tokenizer.decode(window, continues=i > 0).encode()) for i, window in enumerate(windows)]
    if not questions:
        raise ValueError("there is no text to measure")
    told = [-one.log_prob[0] / math.log(2) for one in measure(denoiser, questions)]
    mean = sum(told) / sum(sizes)
    spread = sum((bits - mean * size) ** 2 for bits, size in zip(told, sizes, strict=True)) ** 0.5
    return mean, spread / sum(sizes)
