"""Reward functions in TRL's form, `reward(prompts, completions, **columns) -> list[float]`, and their weighted sum."""

import importlib
import importlib.util
import inspect
import math
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusify.config import nearest
from diffusify.reinforcement import builtin_rewards

RewardFunction = Callable[..., Any]  # (prompts, completions, **columns) -> Sequence[float | None]
_WEIGHTED = re.compile(r"(-?[0-9.]+)\*(.+)", re.DOTALL)


class RewardError(ValueError):
    """A reward function failed. It names the function, what it did, and what it should do."""


@dataclass(frozen=True)
class Reward:
    """A reward function with its name and its weight in the sum. ValueError for a weight that is not finite."""

    function: RewardFunction
    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight={self.weight} of reward {self.name} must be finite; 1.0 is usual")

    def check_columns(self, columns: Sequence[str]) -> None:
        """ValueError if the function needs a column that the records lack."""
        given = {"prompts", "completions", *columns}
        parameters = inspect.signature(self.function).parameters.values()
        for each in parameters:
            is_needed = each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
            if is_needed and each.name not in given:
                raise ValueError(
                    f"reward {self.name} needs the field {each.name}, and the records have "
                    f"{', '.join(columns) or 'no other fields'}; add it to the records, or use another reward"
                )

    def __call__(
        self, prompts: list[Any], completions: list[Any], columns: Mapping[str, list[Any]], *, seconds: float
    ) -> Float[Tensor, " texts"]:
        """The rewards of texts; NaN for a value that is not finite, and 0 for None (this reward does not apply).

        The function gets those columns that it takes. RewardError if it raises, returns anything but a number for each
        text, or takes more than `seconds`.
        """
        names = inspect.signature(self.function).parameters
        takes_all = any(each.kind == each.VAR_KEYWORD for each in names.values())
        given = {name: values for name, values in columns.items() if takes_all or name in names}
        call = partial(self.function, prompts=prompts, completions=completions, **given)
        values = list(_run(call, self.name, seconds))
        if len(values) != len(completions):
            raise RewardError(
                f"reward {self.name} returned {len(values)} numbers for {len(completions)} texts; return one for each"
            )
        try:
            numbers = [0.0 if value is None else float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self.name} returned something that is not a number: {error}") from error
        return torch.tensor([value if math.isfinite(value) else math.nan for value in numbers], dtype=torch.float64)


def _run(call: Callable[[], Any], name: str, seconds: float) -> Any:
    """The result of a call in a thread of its own, which is left behind if it takes more than `seconds`."""
    result: list[Any] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise RewardError(f"reward {name} raised {errors[0]!r}") from errors[0]
    if not result:
        raise RewardError(
            f"reward {name} has not returned after {seconds:g} s; make it faster, or raise reward_seconds"
        )
    if not isinstance(result[0], Sequence | Tensor) and not hasattr(result[0], "__iter__"):
        raise RewardError(f"reward {name} returned {result[0]!r}; return a list with a number for each text")
    return result[0]


def make_rewards(given: Any) -> tuple[Reward, ...]:
    """The rewards that a user names: one or several functions, `Reward`s or strings.

    A string is `builtin:NAME`, `builtin:format:REGEX`, `module:function` or `file.py:function`, each also with a
    weight: `0.5*builtin:json`. ValueError if there is none of that name, or two of one name.
    """
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    rewards = tuple(_make_reward(each) for each in several)
    if not rewards:
        raise ValueError("there is no reward; give a function, or builtin:math, builtin:code, builtin:json")
    names = [reward.name for reward in rewards]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"reward {twice[0]} is given twice; add up the weights: 2*{twice[0]}")
    return rewards


def _make_reward(given: Any) -> Reward:
    if isinstance(given, Reward):
        return given
    if callable(given):
        return Reward(given, f"{given.__module__}:{getattr(given, '__qualname__', type(given).__name__)}")
    if not isinstance(given, str):
        raise ValueError(f"reward {given!r} is neither a function nor the name of one, such as builtin:math")
    weighted = _WEIGHTED.fullmatch(given)
    weight, name = (weighted[1], weighted[2]) if weighted else ("1", given)
    try:
        number = float(weight)
    except ValueError:
        raise ValueError(f"reward {given}: {weight} is not a weight; write 0.5*{name}") from None
    return Reward(_find_function(name), name, number)


def _find_function(name: str) -> RewardFunction:
    where, colon, function = name.partition(":")
    if not colon or not where or not function:
        raise ValueError(f"reward {name}: write builtin:NAME, module:function or file.py:function")
    if where == "builtin":
        return _find_builtin(function)
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    except Exception as error:
        raise ValueError(f"reward {name}: {where} cannot be imported ({error!r})") from error
    found = getattr(module, function, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f'reward {name}: {where} has no function "{function}"{nearest(function, functions)}')
    return found


def _find_builtin(name: str) -> RewardFunction:
    kind, _, regex = name.partition(":")
    if kind == "format":
        return builtin_rewards.format_reward(regex)
    if kind not in builtin_rewards.REWARDS:
        known = [*builtin_rewards.REWARDS, "format"]
        raise ValueError(f'reward builtin:{name}: "{kind}" is not known{nearest(kind, known)}')
    return builtin_rewards.REWARDS[kind]


def _import_module(name: str) -> Any:
    """A module of the Python path or of the current folder."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
