"""Records that cannot be read: left out, counted, and too many of them refused."""

from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 3  # corrupt records that are told of
FEW = 1000  # records before which nobody can say whether many are corrupt


@dataclass
class BadRecords:
    """How many records were read, how many of them were corrupt, and what is wrong with the first of those."""

    records: int = 0
    corrupt: int = 0
    first: list[str] = field(default_factory=list)

    def sift(self, batch: dict[str, list[Any]], limit: float) -> list[str]:
        """The documents among some records of a stream of texts. ValueError when over a share `limit` is corrupt."""
        faults = [fault for fault in batch.get("fault", ()) if fault is not None]
        self.records += len(batch["text"])
        self.corrupt += len(faults)
        self.first += faults[: SHOWN - len(self.first)]
        self._check(limit, FEW)
        return [text for text in batch["text"] if text and text.strip()]

    def close(self, limit: float) -> None:
        """All records have been read: ValueError when over a share `limit` of them is corrupt."""
        self._check(limit, 0)

    def _check(self, limit: float, few: int) -> None:
        if self.corrupt > limit * max(self.records, few):
            raise ValueError(
                f"{self}, more than max_corrupt={limit:g} of them; mend them, or allow for more with max_corrupt"
            )

    def __str__(self) -> str:
        more = "; ..." if self.corrupt > len(self.first) else ""
        return f"{self.corrupt:,} of {self.records:,} records cannot be read ({'; '.join(self.first)}{more})"

    def __add__(self, other: "BadRecords") -> "BadRecords":
        both = [*self.first, *other.first][:SHOWN]
        return BadRecords(self.records + other.records, self.corrupt + other.corrupt, both)

    def state(self) -> dict[str, Any]:
        """A copy as JSON types; `BadRecords(**state)` makes the same again."""
        return asdict(self)


def check_limit(max_corrupt: float) -> None:
    """ValueError if it is no share."""
    if not 0 <= max_corrupt <= 1:
        raise ValueError(f"max_corrupt={max_corrupt} is a share of the records, from 0 to 1; 0.01 is the default")
