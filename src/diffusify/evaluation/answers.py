"""What a written solution answers, and how several tries become one answer."""

import re
from collections import Counter


def final_answer(text: str) -> str | None:
    """What stands behind the last `####` of a solution, up to its line's end, without commas: GSM8K's own rule.

    None if there is no `####` or nothing behind it.
    """
    _, mark, rest = text.rpartition("####")
    lines = rest.strip().splitlines()
    answer = lines[0].replace(",", "").strip() if lines else ""
    return answer if mark and answer else None


def last_number(text: str) -> str | None:
    """The last number of a text, commas left out, equal numbers alike, as math-evaluation-harness reads answers."""
    found = re.findall(r"(?:(?<![\d.])-)?\d*\.?\d+", text.replace(",", ""))
    return str(float(found[-1])) if found else None


def letter(text: str) -> str | None:
    """The capital letter that an answer begins with: D of "D" and of "(D) 14", none of "Dogs"."""
    found = re.match(r"\W*([A-Z])\b", text)
    return found[1] if found else None


def majority(answers: list[str | None]) -> str | None:
    """The answer most tries agree on, the first of equals (self-consistency); tries without an answer do not vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def hit(answers: list[str | None], gold: str) -> bool:
    """Whether any try is right (hit@k)."""
    return gold in answers
