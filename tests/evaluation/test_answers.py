"""Answers are read by GSM8K's rule, and tries are counted as the papers count them."""

import pytest

from diffusify.evaluation.answers import final_answer, hit, majority


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


def test_tries_vote() -> None:
    assert majority(["3", "5", "5"]) == "5"
    assert majority(["3", "5"]) == "3"
    assert majority([None, None, "7"]) == "7"
    assert majority([None]) is None and majority([]) is None


def test_one_right_try_is_a_hit() -> None:
    assert hit(["3", None, "5"], "5") and not hit(["3", None], "5") and not hit([], "5")
