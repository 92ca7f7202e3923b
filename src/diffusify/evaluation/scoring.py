"""How a model does on items: what it chose, wrote or filled in, and what that is worth."""

import re
import string
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from diffusify.evaluation.answers import final_answer, last_number, letter, majority
from diffusify.evaluation.likelihood import Measure, Question
from diffusify.evaluation.sandbox import runs
from diffusify.evaluation.tasks import Answer, Choice, Hole, Item
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig

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
    """Each item's, in order; all items are of one kind.

    With several `tries` an answer is what most of them agree on (self-consistency); `hit` tells whether any is right.
    Where an item is too long for the model, what is farthest from the part in question is cut off, and `said` tells how
    many tokens were: `cut`. ValueError if a choice does not fit even alone.
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
        cut = max(0, len(asked.context) + max(map(len, asked.choices)) - _context(lm))
        yield Scored({"accuracy": float(best == item.gold)}, said | {"cut": cut})


def _answered(lm: DiffusionLM, items: list[Answer], sampling: SamplingConfig, tries: int) -> Iterator[Scored]:
    if not items:
        return
    encode, context = lm.tokenizer.encode, _context(lm)
    sizes = [max(len(encode(gold, continues=True)) for gold in item.golds) + item.room for item in items]
    rooms = [min(size, context - 1) for size in sizes]
    prompts = [encode(item.prompt) for item in items]
    seen = [last(prompt, context, room + 1) for prompt, room in zip(prompts, rooms, strict=True)]
    made = lm.prepare_generation(
        [[lm.tokenizer.start_token_id, *prompt] for prompt in seen for _ in range(tries)],
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
        said = {"wrote": texts[0] if tries == 1 else texts, "forwards": mine[0].forwards}
        yield Scored(scores, said | {"cut": len(prompts[i]) - len(seen[i])})


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
    encode, ahead = lm.tokenizer.encode, lm.config.sees_right_context
    fits = _context(lm) - (2 if ahead else 1)  # between start and end token, or behind the start token
    rooms = [min(len(encode(item.middle, continues=True)), fits) for item in items]
    each = [_seeded(sampling, item.before) for item in items]
    if ahead:
        if lm.config.infilling is not None:  # drafts are for the other way that this model writes
            each = [replace(one, tolerance=None) for one in each]
        near = [_near(lm, item, fits - room) for item, room in zip(items, rooms, strict=True)]
        texts = [f"{_plain(a)}[[{room}]]{_plain(b)}" for (a, b, _), room in zip(near, rooms, strict=True)]
        made = [result.spans[0] if result.spans else "" for result in lm.prepare_infilling(texts, each).results()]
        cuts = [cut for _, _, cut in near]
    else:
        whole = [encode(item.before) for item in items]
        seen = [last(ids, fits, room) for ids, room in zip(whole, rooms, strict=True)]
        prompts = [[lm.tokenizer.start_token_id, *ids] for ids in seen]
        made = [result.completion or "" for result in lm.prepare_generation(prompts, rooms, each).results()]
        cuts = [len(a) - len(b) for a, b in zip(whole, seen, strict=True)]
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for item, text, cut in zip(items, made, cuts, strict=True):
        if item.check is not None:
            scores = {"pass": float(runs(item.before + text + item.after + item.check))}
        else:
            told = rouge.score(item.middle, text)
            scores = {name: float(told[name].fmeasure) for name in ("rougeL", "rouge1", "rouge2")}
        yield Scored(scores, {"wrote": text, "cut": cut})


def _near(lm: DiffusionLM, item: Hole, room: int) -> tuple[str, str, int]:
    """What stands on both sides of a hole, as far as there is room for it, and how many tokens are cut off."""
    encode, decode = lm.tokenizer.encode, lm.tokenizer.decode
    whole = encode(item.before), encode(item.after, continues=True)
    before, after, keep = item.before, item.after, room
    while (took := len(encode(before)) + len(encode(after, continues=True))) > room:  # half a letter takes more tokens
        left, right = beside(*whole, keep)
        before, after, keep = decode(left, continues=True), decode(right, continues=True), keep - 1
    return before, after, sum(map(len, whole)) - took


def _plain(text: str) -> str:
    """Text whose brackets are no holes."""
    return text.replace("[[", r"\[[")


def _context(lm: DiffusionLM) -> int:
    """How many tokens the model can see; without end where it does not say."""
    return lm.denoiser.context or sys.maxsize


def beside(before: list[int], after: list[int], room: int) -> tuple[list[int], list[int]]:
    """The `room` tokens nearest to a hole: as many from each side, or more from one where the other has fewer."""
    right = min(len(after), max(room // 2, room - len(before)))
    left = min(len(before), room - right)
    return before[len(before) - left :], after[:right]


def last(ids: list[int], context: int, room: int) -> list[int]:
    """As many of the last tokens as leave so much room."""
    return ids[max(0, len(ids) + room - context) :]
