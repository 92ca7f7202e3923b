"""A count of records that cannot be read: they are skipped, and too many of them are an error."""

from dataclasses import asdict, dataclass, field
from typing import Any

MAX_MESSAGES = 3  # unreadable records whose error is reported
MIN_RECORDS = 1000  # while fewer records have been read, the limit counts as a share of this many


@dataclass
class BadRecords:
    """The number of records read, the number of corrupt ones, their first errors, and what is wrong with them."""

    records: int = 0
    corrupt: int = 0
    first: list[str] = field(default_factory=list)
    problem: str = "cannot be read"

    def filter_batch(self, batch: dict[str, list[Any]], limit: float) -> list[str]:
        """Count a batch of `stream_texts` and return its documents. ValueError if over a share `limit` is corrupt."""
        faults = [fault for fault in batch.get("fault", ()) if fault is not None]
        self.records += len(batch["text"])
        self.corrupt += len(faults)
        self.first += faults[: MAX_MESSAGES - len(self.first)]
        self.check(limit, MIN_RECORDS)
        return [text for text in batch["text"] if text and text.strip()]

    def add(self, fault: str) -> None:
        """Count a record that cannot be used."""
        self.records += 1
        self.corrupt += 1
        self.first += [fault][: MAX_MESSAGES - len(self.first)]

    def check(self, limit: float, min_records: int = 0) -> None:
        """ValueError if over a share `limit` of the records is corrupt, of at least `min_records` records."""
        if self.corrupt > limit * max(self.records, min_records):
            raise ValueError(f"{self}, more than max_corrupt={limit:g} of them; repair the data, or raise max_corrupt")

    def __str__(self) -> str:
        more = "; ..." if self.corrupt > len(self.first) else ""
        return f"{self.corrupt:,} of {self.records:,} records {self.problem} ({'; '.join(self.first)}{more})"

    def __add__(self, other: "BadRecords") -> "BadRecords":
        first = [*self.first, *other.first][:MAX_MESSAGES]
        return BadRecords(self.records + other.records, self.corrupt + other.corrupt, first, self.problem)

    def state(self) -> dict[str, Any]:
        """A copy as JSON types; `BadRecords(**state)` restores it."""
        return asdict(self)


def check_limit(max_corrupt: float) -> None:
    """ValueError if `max_corrupt` is not from 0 to 1."""
    if not 0 <= max_corrupt <= 1:
        raise ValueError(f"max_corrupt={max_corrupt} must be a share of the records, from 0 to 1; 0.01 is the default")
