"""Answers are read by their benchmarks' rules, and tries are counted as the papers count them."""

import pytest

from diffusify.evaluation.answers import final_answer, hit, last_number, letter, majority


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<<16-3-4=9>> <<9*2=18>> #### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### 5\nand so on", "5"),
        ("first #### 5 no, #### -6.5 ", "-6.5"),
        ("18", None),
        ("####", None),
        ("#### \n", None),
        ("", None),
    ],
)
def test_the_final_answer_stands_behind_the_last_mark(text: str, answer: str | None) -> None:
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
def test_the_last_number_is_read_alike_however_it_is_written(text: str, number: str | None) -> None:
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
def test_a_letter_is_what_an_answer_begins_with(text: str, chosen: str | None) -> None:
    assert letter(text) == chosen


def test_tries_vote() -> None:
    assert majority(["3", "5", "5"]) == "5"
    assert majority(["3", "5"]) == "3"
    assert majority([None, None, "7"]) == "7"
    assert majority([None]) is None and majority([]) is None


def test_one_right_try_is_a_hit() -> None:
    assert hit(["3", None, "5"], "5") and not hit(["3", None], "5") and not hit([], "5")
