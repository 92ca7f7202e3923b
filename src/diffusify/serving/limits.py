"""The limits of one server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one server takes on.

    `tokens`: positions of all texts that are written at once, of each model. `waiting`: requests that may wait.
    `seconds`: how long a request may take. `body`: bytes that it may have. `patience`: seconds for it to arrive.
    """

    tokens: int = 16384
    waiting: int = 256
    seconds: float = 600.0
    body: int = 1_000_000
    patience: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
