"""Stop strings, which end a generated text."""

from collections.abc import Sequence
from typing import NamedTuple


class FoundStop(NamedTuple):
    """Where a stop string ends in a text, and where it begins."""

    end: int
    start: int


def find_stop(text: str, stops: Sequence[str]) -> FoundStop | None:
    """The stop string that is complete first in a text; the text ends where it begins."""
    return min((FoundStop(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0), default=None)
