"""Scoring of a model on benchmark items: multiple choice, open-ended generation and infilling."""

import re
import string
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rouge_score.rouge_scorer import RougeScorer

from diffusify.evaluation.answers import choice_letter, final_answer, last_number, majority
from diffusify.evaluation.likelihood import Measure
from diffusify.evaluation.likelihood_requests import LikelihoodRequest
from diffusify.evaluation.sandbox import runs_without_error
from diffusify.evaluation.tasks import Infill, Item, MultipleChoice, OpenEnded
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.prompts import UNKNOWN_LENGTH, InfillText

BATCH_SIZE = 16  # items whose texts are generated together

SpanLength = Literal["told", "unknown"]


@dataclass(frozen=True)
class ItemScore:
    """The result of one item: `scores` from 0 to 1, the main one first, and details of what the model `said`.

    `item` is the item's checksum, which identifies it in saved scores.
    """

    scores: dict[str, float]
    said: dict[str, Any]
    item: int = 0


def score(
    lm: DiffusionLM,
    items: Sequence[Item],
    measure: Measure,
    sampling: SamplingConfig,
    *,
    tries: int = 1,
    span_length: SpanLength = "told",
    batch_size: int = BATCH_SIZE,
) -> Iterator[ItemScore]:
    """Score items in order; all items must be of one kind.

    `span_length` says whether bidirectional models are told the length of a span to fill, or have to find it. The texts
    of `batch_size` items are generated together.

    With several `tries`, the most frequent answer counts (self-consistency), and the score `hit` says whether any was
    correct. If an item exceeds the model's context, its text is truncated where it is farthest from the choices, answer
    or span, and `said["cut"]` is the number of removed tokens. ValueError if a choice alone does not fit.
    """
    choices = [item for item in items if isinstance(item, MultipleChoice)]
    if choices:
        yield from _score_choices(lm, choices, measure)
    for start in range(0, len(items) - len(choices), batch_size):
        batch = items[start : start + batch_size]
        yield from _score_answers(lm, [item for item in batch if isinstance(item, OpenEnded)], sampling, tries)
        yield from _score_infills(lm, [item for item in batch if isinstance(item, Infill)], sampling, span_length)


def likelihood_request(lm: DiffusionLM, item: MultipleChoice) -> LikelihoodRequest:
    """An item as token ids after a start token; a choice's tokens are those that it adds to the encoded context."""
    tokenizer = lm.tokenizer
    context = tokenizer.encode(item.context)
    choices = tuple(tuple(tokenizer.encode(item.context + choice)[len(context) :]) for choice in item.choices)
    scales = {
        "sum": (1.0,) * len(choices),
        "character": tuple(1 / max(1, len(choice.removeprefix(" "))) for choice in item.choices),
        "token": tuple(1 / max(1, len(choice)) for choice in choices),
    }
    return LikelihoodRequest(tuple(tokenizer.add_start(context)), choices, scales[item.compare_by])


def _score_choices(lm: DiffusionLM, items: list[MultipleChoice], measure: Measure) -> Iterator[ItemScore]:
    requests = [likelihood_request(lm, item) for item in items]
    for item, request, result in zip(items, requests, measure(lm.denoiser, requests), strict=True):
        best = request.best(result.log_prob)
        said = {"chose": best, "log_prob": result.log_prob, "se": result.se, "draws": result.draws}
        said["worth"] = request.scales
        cut = max(0, len(request.context) + max(map(len, request.choices)) - _context_length(lm))
        yield ItemScore({"accuracy": float(best == item.gold)}, said | {"cut": cut})


def _score_answers(
    lm: DiffusionLM, items: list[OpenEnded], sampling: SamplingConfig, tries: int
) -> Iterator[ItemScore]:
    if not items:
        return
    encode, context = lm.tokenizer.encode, _context_length(lm)
    sizes = [max(len(encode(gold, continues=True)) for gold in item.golds) + item.extra_tokens for item in items]
    lengths = [min(size, context - 1) for size in sizes]
    prompts = [encode(item.prompt) for item in items]
    kept = [truncate_left(prompt, context, length + 1) for prompt, length in zip(prompts, lengths, strict=True)]
    generations = lm.prepare_generation(
        [lm.tokenizer.add_start(prompt) for prompt in kept for _ in range(tries)],
        [length for length in lengths for _ in range(tries)],
        [_seeded(sampling, item.prompt, i) for item in items for i in range(tries)],
    ).results()
    for i, item in enumerate(items):
        mine = generations[i * tries : (i + 1) * tries]
        texts = [_until_stop(one.completion or "", item.stop) for one in mine]
        answers = [_extract(item, text) for text in texts]
        final = majority(answers)
        scores = {"accuracy": float(final is not None and _is_correct(item, final))}
        if tries > 1:
            scores["hit"] = float(any(answer is not None and _is_correct(item, answer) for answer in answers))
        said = {"wrote": texts[0] if tries == 1 else texts, "forwards": mine[0].forwards}
        yield ItemScore(scores, said | {"cut": len(prompts[i]) - len(kept[i])})


def _seeded(sampling: SamplingConfig, prompt: str, attempt: int = 0) -> SamplingConfig:
    """Derive the seed from the prompt, so that samples do not depend on the other items of an evaluation."""
    return replace(sampling, seed=sampling.seed + zlib.crc32(prompt.encode()) + attempt)


def _until_stop(text: str, stop: str | None) -> str:
    text = text.lstrip("\n")
    return text if stop is None else text.split(stop)[0]


def _extract(item: OpenEnded, text: str) -> str | None:
    """The answer in a text, in the form that is compared; None if there is none."""
    extractors = {"number": final_answer, "last number": last_number, "letter": choice_letter}
    return extractors.get(item.match, normalize_answer)(text) or None


def _is_correct(item: OpenEnded, answer: str) -> bool:
    """Whether an extracted answer matches a gold one."""
    golds = [_extract(item, gold) for gold in item.golds]
    return any(gold in answer for gold in golds if gold) if item.match == "contains" else answer in golds


def normalize_answer(text: str) -> str:
    """Remove case, punctuation, articles and repeated spaces, as SQuAD and TriviaQA do to compare answers.

    An answer of articles alone, or of punctuation alone, keeps them ("The The", "!!!").
    """
    lower = text.lower()
    plain = "".join(letter for letter in lower if letter not in string.punctuation)
    forms = (" ".join(form.split()) for form in (re.sub(r"\b(a|an|the)\b", " ", plain), plain, lower))
    return next(filter(None, forms), "")


def _score_infills(
    lm: DiffusionLM, items: list[Infill], sampling: SamplingConfig, span_length: SpanLength
) -> Iterator[ItemScore]:
    """Score infilling; a model that does not attend to the text after a span continues the text before it."""
    if not items:
        return
    encode, bidirectional = lm.tokenizer.encode, lm.config.sees_right_context
    available = _context_length(lm) - (2 if bidirectional else 1)  # without the start token, and the end token
    lengths = [min(len(encode(item.middle, continues=True)), available) for item in items]
    settings = [_seeded(sampling, item.before) for item in items]
    if bidirectional:
        settings = [one.for_infilling(lm.config) for one in settings]
        unknown = UNKNOWN_LENGTH[: max(1, available // 2)]
        spans = [range(length, length + 1) if span_length == "told" else unknown for length in lengths]
        sides = [_truncate_sides(lm, item, available - span[-1]) for item, span in zip(items, spans, strict=True)]
        texts: list[InfillText] = [[a, span, b] for (a, b, _), span in zip(sides, spans, strict=True)]
        results = lm.prepare_infilling(texts, settings).results()
        generated = [result.spans[0] if result.spans else "" for result in results]
        cuts = [cut for _, _, cut in sides]
    else:
        contexts = [encode(item.before) for item in items]
        kept = [truncate_left(ids, available, length) for ids, length in zip(contexts, lengths, strict=True)]
        prompts = [lm.tokenizer.add_start(ids) for ids in kept]
        results = lm.prepare_generation(prompts, lengths, settings).results()
        generated = [result.completion or "" for result in results]
        cuts = [len(a) - len(b) for a, b in zip(contexts, kept, strict=True)]
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for item, text, cut in zip(items, generated, cuts, strict=True):
        if item.check is not None:
            scores = {"pass": float(runs_without_error(item.before + text + item.after + item.check))}
        else:
            values = rouge.score(item.middle, text)
            scores = {name: float(values[name].fmeasure) for name in ("rougeL", "rouge1", "rouge2")}
        yield ItemScore(scores, {"wrote": text, "forwards": results[0].forwards, "cut": cut})


def _truncate_sides(lm: DiffusionLM, item: Infill, length: int) -> tuple[str, str, int]:
    """The texts on both sides of the span, truncated to `length` tokens in all, and the number of removed tokens."""
    encode, decode = lm.tokenizer.encode, lm.tokenizer.decode
    sides = encode(item.before), encode(item.after, continues=True)
    before, after, keep = item.before, item.after, length
    # A cut inside a character adds tokens when the text is encoded again.
    while (size := len(encode(before)) + len(encode(after, continues=True))) > length:
        left, right = nearest_tokens(*sides, keep)
        before, after, keep = decode(left, continues=True), decode(right, continues=True), keep - 1
    return before, after, sum(map(len, sides)) - size


def _context_length(lm: DiffusionLM) -> int:
    """The model's context length; unlimited if the model has none."""
    return lm.denoiser.context_length or sys.maxsize


def nearest_tokens(before: list[int], after: list[int], count: int) -> tuple[list[int], list[int]]:
    """The `count` tokens nearest to a span: half from each side, or more from one if the other has fewer."""
    right = min(len(after), max(count // 2, count - len(before)))
    left = min(len(before), count - right)
    return before[len(before) - left :], after[:right]


def truncate_left(ids: list[int], context: int, reserved: int) -> list[int]:
    """The last tokens that fit a context length in which `reserved` tokens are left free."""
    return ids[max(0, len(ids) + reserved - context) :]
