"""Extraction of answers from generated solutions, and aggregation of several attempts."""

import re
from collections import Counter
from decimal import Decimal

_NUMBER = re.compile(r"(-?)\s*[$€£]?\s*(-?(?:\d+\.?\d*|\.\d+))")


def final_answer(text: str) -> str | None:
    """The answer after the last `####` of a solution, up to the end of the line (GSM8K's rule), without commas.

    Of an answer with numbers it is the first number, in a form that equal numbers share: "18" for "$18.00 a day". None
    if there is no `####` or nothing after it.
    """
    _, mark, rest = text.rpartition("####")
    lines = rest.strip().splitlines()
    answer = lines[0].replace(",", "").strip() if lines else ""
    if not mark or not answer:
        return None
    number = _NUMBER.search(answer)
    return answer if number is None else _shortest_form(number[1] + number[2])


def _shortest_form(number: str) -> str:
    """A number without a sign before zero, zeros at its ends or an exponent."""
    plain = f"{Decimal(number.replace('--', '-')):f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain


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
