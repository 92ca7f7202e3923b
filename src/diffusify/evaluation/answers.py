"""Extraction of answers from generated solutions, and aggregation of several attempts."""

import re
from collections import Counter


def final_answer(text: str) -> str | None:
    """The text after the last `####` of a solution, up to the end of the line, without commas (GSM8K's rule).

    None if there is no `####` or nothing after it.
    """
    _, mark, rest = text.rpartition("####")
    lines = rest.strip().splitlines()
    answer = lines[0].replace(",", "").strip() if lines else ""
    return answer if mark and answer else None


def last_number(text: str) -> str | None:
    """The last number of a text in a normal form, without commas, as in math-evaluation-harness; None if none."""
    found = re.findall(r"(?:(?<![\d.])-)?\d*\.?\d+", text.replace(",", ""))
    return str(float(found[-1])) if found else None


def choice_letter(text: str) -> str | None:
    """The capital letter that an answer begins with: D for "D" and "(D) 14", None for "Dogs"."""
    found = re.match(r"\W*([A-Z])\b", text)
    return found[1] if found else None


def majority(answers: list[str | None]) -> str | None:
    """The most frequent answer, the first of equals (self-consistency); attempts without an answer do not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def hit(answers: list[str | None], gold: str) -> bool:
    """Whether any attempt is correct (hit@k)."""
    return gold in answers
