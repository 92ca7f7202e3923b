"""Regular expressions for numbers within bounds, in the form that JSON writes them."""

import math
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

MAX_MULTIPLES = 1000  # multiples of a number are listed one by one
ANY_DIGITS = "[0-9]*"


class Bounds(NamedTuple):
    """The bounds of a number; None is unbounded, and an open bound is itself left out."""

    low: Decimal | None = None
    high: Decimal | None = None
    low_open: bool = False
    high_open: bool = False

    @property
    def mirrored(self) -> "Bounds":
        """The bounds of the numbers with the other sign."""
        low, high = (None if bound is None else -bound for bound in (self.low, self.high))
        return Bounds(high, low, self.high_open, self.low_open)

    @property
    def below_zero(self) -> bool:
        """Whether a number below zero is within the bounds."""
        return self.low is None or self.low < 0

    def at_least(self, low: int, *, is_open: bool = False) -> "Bounds":
        """The bounds of the numbers from `low` on that are within these."""
        return self if self.low is not None and self.low >= low else self._replace(low=Decimal(low), low_open=is_open)


def integer_pattern(bounds: Bounds) -> str:
    """A pattern for the integers within bounds. ValueError if there are none."""
    parts = _integers(bounds.at_least(0))
    if bounds.below_zero:
        parts += ["-" + part for part in _integers(bounds.mirrored.at_least(1))]
    return _any_of(parts, bounds)


def number_pattern(bounds: Bounds) -> str:
    """A pattern for the decimal numbers within bounds, without exponents. ValueError if there are none."""
    parts = _decimals(bounds.at_least(0))
    if bounds.below_zero:
        parts += ["-" + part for part in _decimals(bounds.mirrored.at_least(0, is_open=True))]
    return _any_of(parts, bounds)


def multiples_pattern(factor: Decimal, bounds: Bounds) -> str:
    """A pattern for the multiples of a number within bounds. ValueError if there are none, or too many to list."""
    low, high = (None if bound is None else Fraction(bound) / Fraction(factor) for bound in bounds[:2])
    if low is None or high is None or high - low > MAX_MULTIPLES:
        raise ValueError(
            f"multipleOf={factor} needs a minimum and a maximum, with at most {MAX_MULTIPLES} multiples between them"
        )
    first, last = _integers_between(low, high, bounds.low_open, bounds.high_open)
    return _any_of([f"{i * factor:f}".replace(".", r"\.") for i in range(first, last + 1)], bounds)


def _any_of(parts: list[str], bounds: Bounds) -> str:
    if not parts:
        raise ValueError(f"no number is within the bounds {bounds.low} and {bounds.high}")
    return f"({'|'.join(parts)})"


def _integers_between(low: Fraction, high: Fraction, low_open: bool, high_open: bool) -> tuple[int, int]:
    """The first and the last integer within bounds."""
    return math.floor(low) + 1 if low_open else math.ceil(low), math.ceil(high) - 1 if high_open else math.floor(high)


def _integers(bounds: Bounds) -> list[str]:
    """Patterns for the integers within bounds of 0 or more."""
    low, high, low_open, high_open = bounds
    assert low is not None
    first, last = _integers_between(Fraction(low), Fraction(low if high is None else high), low_open, high_open)
    return _integer_range(first, None if high is None else last)


def _integer_range(first: int, last: int | None) -> list[str]:
    """Patterns for the integers from `first`, at least 0, to `last`: one for each number of digits."""
    if last is None:
        n = len(str(first))
        return [*_integer_range(first, 10**n - 1), f"[1-9][0-9]{{{n},}}"]
    lengths = range(len(str(first)), len(str(last)) + 1) if first <= last else ()
    return [_same_length(str(max(first, 10 ** (n - 1) if n > 1 else 0)), str(min(last, 10**n - 1))) for n in lengths]


def _same_length(first: str, last: str) -> str:
    """A pattern for the strings of digits between two strings of the same length."""
    n = len(first) - 1
    if n < 0:
        return ""
    if first[0] == last[0]:
        return first[0] + _same_length(first[1:], last[1:])
    if not first.strip("0") and not last.strip("9"):
        return f"[0-9]{{{n + 1}}}"
    low, high = int(first[0]), int(last[0])
    parts = [first[0] + _same_length(first[1:], "9" * n), last[0] + _same_length("0" * n, last[1:])]
    if high - low > 1:
        parts.insert(1, f"[{low + 1}-{high - 1}]" + (f"[0-9]{{{n}}}" if n else ""))
    return f"({'|'.join(parts)})"


def _decimals(bounds: Bounds) -> list[str]:
    """Patterns for the decimal numbers within bounds of 0 or more: by whether their integer part is that of a bound."""
    low, high, low_open, high_open = bounds
    assert low is not None
    if high is not None and high < low:
        return []
    first, last = int(low), None if high is None else int(high)
    low_digits, high_digits = _fraction_digits(low), None if high is None else _fraction_digits(high)
    if first == last:
        return _with_fraction(str(first), low_digits, low_open, high_digits, high_open)
    parts = _with_fraction(str(first), low_digits, low_open, None, False)
    parts += [rf"{part}(\.[0-9]+)?" for part in _integer_range(first + 1, None if last is None else last - 1)]
    return parts if last is None else parts + _with_fraction(str(last), "", False, high_digits, high_open)


def _fraction_digits(number: Decimal) -> str:
    return f"{number:f}".partition(".")[2].rstrip("0")


def _with_fraction(integer: str, low: str, low_open: bool, high: str | None, high_open: bool) -> list[str]:
    """Patterns for an integer part and the fractions within bounds, which are digits after the point."""
    whole = not low and not low_open and (high is None or high > "" or not high_open)
    fractions = _fractions(low, low_open, high, high_open, first=True)
    return [integer] * whole + ([] if fractions is None else [rf"{integer}\.{fractions}"])


def _fractions(low: str, low_open: bool, high: str | None, high_open: bool, *, first: bool = False) -> str | None:
    """A pattern for the digits of fractions within bounds, the `first` of them or those after it; None if none fit."""
    if not low and high is None:
        return "0*[1-9][0-9]*" if low_open else "[0-9]+" if first else ANY_DIGITS
    if high == "":
        return None if low or low_open or high_open else "0+" if first else "0*"
    digits: dict[str, str] = {}  # by the pattern of the digits after them
    bottom, top = int(low[:1] or 0), 9 if high is None else int(high[0])
    for digit in range(bottom, top + 1):
        after_low = (low[1:], low_open) if digit == bottom else ("", False)
        after_high = (high[1:], high_open) if high is not None and digit == top else (None, False)
        rest = _fractions(*after_low, *after_high)
        if rest is not None:
            digits[rest] = digits.get(rest, "") + str(digit)
    parts = [f"[{each}]{rest}" for rest, each in digits.items()]
    if not parts:
        return None
    return f"({'|'.join(parts)})" + ("" if first or low or low_open else "?")
