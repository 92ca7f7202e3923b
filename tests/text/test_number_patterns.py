"""Patterns for numbers compared with the comparison of numbers."""

import re
from decimal import Decimal
from itertools import product

import pytest

from diffusify.text.number_patterns import Bounds, integer_pattern, multiples_pattern, number_pattern

FRACTIONS = ["", ".0", ".00", ".5", ".05", ".049", ".25", ".250", ".2500001", ".24999", ".999"]
NUMBERS = [
    sign + whole + fraction
    for sign in ("", "-")
    for whole in ("0", "1", "2", "9", "10", "12", "13", "99", "100", "119", "120", "121", "1000")
    for fraction in FRACTIONS
    if not (sign and Decimal(whole + fraction) == 0)
]
ENDS = [None, *map(Decimal, ("-120", "-12.25", "-1", "-0.25", "0", "0.05", "0.25", "1", "12", "12.5", "120"))]


@pytest.mark.parametrize(("low_open", "high_open"), [*product((False, True), repeat=2)])
def test_patterns_match_the_numbers_within_bounds(low_open: bool, high_open: bool) -> None:
    for low, high in product(ENDS, ENDS):
        bounds = Bounds(low, high, low_open and low is not None, high_open and high is not None)
        within = {
            number
            for number in NUMBERS
            if (low is None or Decimal(number) > low or (not low_open and Decimal(number) == low))
            and (high is None or Decimal(number) < high or (not high_open and Decimal(number) == high))
        }
        integers = [number for number in NUMBERS if "." not in number]
        for make, numbers in ((number_pattern, NUMBERS), (integer_pattern, integers)):
            try:
                pattern = re.compile(make(bounds))
            except ValueError:
                assert within.isdisjoint(numbers)
                continue
            assert {number for number in numbers if pattern.fullmatch(number)} == within.intersection(numbers), bounds


def test_multiples_are_listed() -> None:
    assert multiples_pattern(Decimal(3), Bounds(Decimal(0), Decimal(9), low_open=True)) == "(3|6|9)"
    assert (
        multiples_pattern(Decimal("0.5"), Bounds(Decimal(-1), Decimal(1), high_open=True)) == r"(-1\.0|-0\.5|0\.0|0\.5)"
    )
    for bounds in (Bounds(Decimal(0)), Bounds(Decimal(0), Decimal(5000))):
        with pytest.raises(ValueError, match="multipleOf=3 needs a minimum and a maximum"):
            multiples_pattern(Decimal(3), bounds)
    with pytest.raises(ValueError, match="no number is within the bounds 1 and 2"):
        multiples_pattern(Decimal(3), Bounds(Decimal(1), Decimal(2)))
