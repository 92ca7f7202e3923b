"""`-o KEY=VALUE` on the command line, and whole commands in a YAML file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from diffusify.config import from_plain, nearest


def parse_options(pairs: list[str], *known: dict[str, Any]) -> list[dict[str, Any]]:
    """`KEY=VALUE` pairs, each for the first of those who know the key: a dictionary for each of them.

    `known` maps keys to types; a value for Any is checked elsewhere. ValueError for a key that nobody knows.
    """
    given: list[dict[str, Any]] = [{} for _ in known]
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"-o {pair}: write KEY=VALUE")
        takers = [i for i, names in enumerate(known) if key in names]
        if not takers:
            raise ValueError(f'-o {pair}: "{key}" is not known{nearest(key, set().union(*known))}')
        hint, value = known[takers[0]][key], read_value(text)
        given[takers[0]][key] = value if hint is Any else from_plain(value, hint, f"-o {key}")
    return given


def read_value(text: str) -> Any:
    """JSON if it reads as such, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def training_options() -> dict[str, Any]:
    """The fields of `transformers.TrainingArguments`, which checks them itself."""
    from transformers import TrainingArguments

    return dict.fromkeys(get_type_hints(TrainingArguments), Any)


def arguments(function: Any, *names: str) -> dict[str, Any]:
    """Some of a function's arguments, or all, with their types."""
    hints = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    return {name: hints[name] for name in names} if names else hints


@dataclass(frozen=True)
class RecipeFile:
    """A YAML file that says a whole `diffusify adapt` command; see `recipes/`."""

    base: str
    data: str | list[str]
    recipe: str | None = None
    steps: int | None = None
    minutes: float | None = None
    out: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | str) -> "RecipeFile":
        """Read a story. ValueError for one that does not read or has unknown keys."""
        import yaml

        try:
            plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        known = get_type_hints(cls)
        if not isinstance(plain, dict) or not {"base", "data"} <= set(plain):
            raise ValueError(f"{path} is no recipe; it needs at least base and data")
        for key in plain:
            if key not in known:
                raise ValueError(f'{path}: "{key}" is not known{nearest(str(key), known)}')
        return cls(**plain)

    def pairs(self) -> list[str]:
        """The options as `KEY=VALUE`."""
        return [f"{key}={json.dumps(value)}" for key, value in self.options.items()]
