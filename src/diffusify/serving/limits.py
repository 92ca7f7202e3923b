"""The limits of one server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of one server. Raises ValueError unless all are above 0.

    `tokens`: positions of all texts that are generated at once, for each model. `waiting`: requests that may wait.
    `seconds`: the longest time of one request. `body_bytes`: the largest request body. `receive_timeout`: seconds in
    which a request has to arrive.
    """

    tokens: int = 16384
    waiting: int = 256
    seconds: float = 600.0
    body_bytes: int = 1_000_000
    receive_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name}={value} must be above 0")
