"""How a model does on items: what it chose, wrote or filled in, and what that is worth."""

import re
import string
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from diffusify.evaluation.answers import final_answer, last_number, letter, majority
from diffusify.evaluation.likelihood import Measure, Question
from diffusify.evaluation.sandbox import runs
from diffusify.evaluation.tasks import Answer, Choice, Hole, Item
from diffusify.sampling.generation import DiffusionLM
from diffusify.sampling.settings import SamplingConfig

BATCH = 16  # texts that are written together


@dataclass(frozen=True)
class Scored:
    """How one item went: `scores` from 0 to 1, the one that counts first, and what the model `said`.

    `item` tells items apart where scores are kept: a checksum.
    """

    scores: dict[str, float]
    said: dict[str, Any]
    item: int = 0


def score(
    lm: DiffusionLM, items: Sequence[Item], measure: Measure, sampling: SamplingConfig, *, tries: int = 1
) -> Iterator[Scored]:
    """Each item's, in order; all items are of one kind. ValueError if a text does not fit the model.

    With several `tries` an answer is what most of them agree on (self-consistency); `hit` tells whether any is right.
    """
    choices = [item for item in items if isinstance(item, Choice)]
    if choices:
        yield from _chosen(lm, choices, measure)
    for start in range(0, len(items) - len(choices), BATCH):
        batch = items[start : start + BATCH]
        yield from _answered(lm, [item for item in batch if isinstance(item, Answer)], sampling, tries)
        yield from _filled(lm, [item for item in batch if isinstance(item, Hole)], sampling)


def question(lm: DiffusionLM, item: Choice) -> Question:
    """A choice in token ids, behind the start token; a choice's tokens are what it adds to the context's."""
    tokenizer = lm.tokenizer
    context = tokenizer.encode(item.context)
    choices = tuple(tuple(tokenizer.encode(item.context + choice)[len(context) :]) for choice in item.choices)
    worth = {
        "sum": (1.0,) * len(choices),
        "byte": tuple(1 / len(choice.encode()) for choice in item.choices),
        "token": tuple(1 / max(1, len(choice)) for choice in choices),
    }
    return Question((tokenizer.start_token_id, *context), choices, worth[item.by])


def _chosen(lm: DiffusionLM, items: list[Choice], measure: Measure) -> Iterator[Scored]:
    questions = [question(lm, item) for item in items]
    for item, asked, told in zip(items, questions, measure(lm.denoiser, questions), strict=True):
        best = asked.best(told.log_prob)
        said = {"chose": best, "log_prob": told.log_prob, "se": told.se, "draws": told.draws, "worth": asked.worth}
        yield Scored({"accuracy": float(best == item.gold)}, said)


def _answered(lm: DiffusionLM, items: list[Answer], sampling: SamplingConfig, tries: int) -> Iterator[Scored]:
    if not items:
        return
    encode = lm.tokenizer.encode
    rooms = [max(len(encode(gold, continues=True)) for gold in item.golds) + item.room for item in items]
    prompts = [
        [lm.tokenizer.start_token_id, *last(encode(item.prompt), lm.denoiser.context, room + 1)]
        for item, room in zip(items, rooms, strict=True)
    ]
    made = lm.continuing(
        [prompt for prompt in prompts for _ in range(tries)],
        [room for room in rooms for _ in range(tries)],
        [_seeded(sampling, item.prompt, i) for item in items for i in range(tries)],
    ).results()
    for i, item in enumerate(items):
        mine = made[i * tries : (i + 1) * tries]
        texts = [_stopped(one.completion or "", item.stop) for one in mine]
        answers = [_read(item, text) for text in texts]
        agreed = majority(answers)
        scores = {"accuracy": float(agreed is not None and _right(item, agreed))}
        if tries > 1:
            scores["hit"] = float(any(answer is not None and _right(item, answer) for answer in answers))
        yield Scored(scores, {"wrote": texts[0] if tries == 1 else texts, "forwards": mine[0].forwards})


def _seeded(sampling: SamplingConfig, prompt: str, tried: int = 0) -> SamplingConfig:
    """What is drawn depends on the seed and the prompt, not on what is evaluated beside it or before."""
    return replace(sampling, seed=sampling.seed + zlib.crc32(prompt.encode()) + tried)


def _stopped(text: str, stop: str | None) -> str:
    text = text.lstrip("\n")
    return text if stop is None else text.split(stop)[0]


def _read(item: Answer, text: str) -> str | None:
    """What a text answers, in the form that is compared; None if nothing."""
    ways = {"number": final_answer, "last number": last_number, "letter": letter}
    return ways.get(item.match, normal)(text)


def _right(item: Answer, answer: str) -> bool:
    """Whether an answer, as it was read, is a gold's."""
    golds = [_read(item, gold) for gold in item.golds]
    return any(gold in answer for gold in golds if gold) if item.match == "contains" else answer in golds


def normal(text: str) -> str:
    """A text without case, punctuation, articles and double spaces, as SQuAD and TriviaQA compare answers."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _filled(lm: DiffusionLM, items: list[Hole], sampling: SamplingConfig) -> Iterator[Scored]:
    """What is written into holes; a model that cannot see behind them writes on from what stands before."""
    if not items:
        return
    encode, context = lm.tokenizer.encode, lm.denoiser.context
    rooms = [len(encode(item.middle, continues=True)) for item in items]
    each = [_seeded(sampling, item.before) for item in items]
    if lm.config.sees_right_context:
        texts = [
            f"{_plain(item.before)}[[{room}]]{_plain(item.after)}" for item, room in zip(items, rooms, strict=True)
        ]
        made = [result.spans[0] if result.spans else "" for result in lm.infilling(texts, each).results()]
    else:
        prompts = [
            [lm.tokenizer.start_token_id, *last(encode(item.before), context, room + 1)]
            for item, room in zip(items, rooms, strict=True)
        ]
        made = [result.completion or "" for result in lm.continuing(prompts, rooms, each).results()]
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for item, text in zip(items, made, strict=True):
        if item.check is not None:
            yield Scored({"pass": float(runs(item.before + text + item.after + item.check))}, {"wrote": text})
        else:
            told = rouge.score(item.middle, text)
            yield Scored({name: float(told[name].fmeasure) for name in ("rougeL", "rouge1", "rouge2")}, {"wrote": text})


def _plain(text: str) -> str:
    """Text whose brackets are no holes."""
    return text.replace("[[", r"\[[")


def last(ids: list[int], context: int | None, room: int) -> list[int]:
    """As many of the last tokens as leave so much room."""
    return ids if context is None or len(ids) + room <= context else ids[len(ids) + room - context :]
