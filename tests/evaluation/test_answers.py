"""Answers are extracted by the benchmarks' rules, and attempts are aggregated as in the papers."""

import pytest

from diffusify.evaluation.answers import choice_letter, final_answer, hit, last_number, majority


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<<16-3-4=9>> <<9*2=18>> #### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### 5\nand so on", "5"),
        ("first #### 5 no, #### -6.5 ", "-6.5"),
        ("#### 18 eggs", "18"),
        ("#### 18.", "18"),
        ("#### $18", "18"),
        ("#### 18.00", "18"),
        ("#### -$1,020.50 in all", "-1020.5"),
        ("#### .5", "0.5"),
        ("#### -0.0", "0"),
        ("#### 007", "7"),
        ("#### 12345678901234567890", "12345678901234567890"),
        ("#### five apples, or so", "five apples or so"),
        ("18", None),
        ("####", None),
        ("#### \n", None),
        ("", None),
    ],
)
def test_the_final_answer_follows_the_last_mark(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 18", "18.0"),
        ("18.00 apples", "18.0"),
        ("2 + 3 = 5.", "5.0"),
        ("about 1,234,567", "1234567.0"),
        ("it fell to -.5", "-0.5"),
        ("5-3", "3.0"),
        ("five", None),
        ("", None),
    ],
)
def test_the_last_number_has_one_form(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (" A", "A"),
        ("(D)", "D"),
        (" (D)14.3", "D"),
        ("B. 4", "B"),
        ("Dogs", None),
        ("the C", None),
        ("a", None),
        ("", None),
    ],
)
def test_the_choice_letter_begins_an_answer(text: str, chosen: str | None) -> None:
    assert choice_letter(text) == chosen


def test_the_majority_of_attempts_counts() -> None:
    assert majority(["3", "5", "5"]) == "5"
    assert majority(["3", "5"]) == "3"
    assert majority([None, None, "7"]) == "7"
    assert majority([None]) is None and majority([]) is None
    forms = ["#### 20", "#### 18 eggs", "#### 18.", "#### 20", "#### $18", "#### 18.00"]
    assert majority([final_answer(text) for text in forms]) == "18"


def test_one_correct_attempt_is_a_hit() -> None:
    assert hit(["3", None, "5"], "5") and not hit(["3", None], "5") and not hit([], "5")
