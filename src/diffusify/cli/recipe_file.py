"""Recipe files: a whole `diffusify adapt` command in YAML."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints


@dataclass(frozen=True)
class RecipeFile:
    """The arguments of one `diffusify adapt` command, as read from a YAML file; see `recipes/` for examples."""

    base: str
    data: str | list[str]
    recipe: str | None = None
    steps: int | None = None
    minutes: float | None = None
    out: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | str) -> "RecipeFile":
        """Read a recipe file. ValueError if it is not YAML, lacks `base` or `data`, or has unknown keys."""
        import yaml

        from diffusify.config import nearest

        try:
            plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        known = get_type_hints(cls)
        if not isinstance(plain, dict) or not {"base", "data"} <= set(plain):
            raise ValueError(f"{path} is not a recipe file: it needs at least base and data")
        for key in plain:
            if key not in known:
                raise ValueError(f'{path}: "{key}" is not known{nearest(str(key), known)}')
        return cls(**plain)

    def pairs(self) -> list[str]:
        """The options as `KEY=VALUE`, as for `-o`."""
        return [f"{key}={json.dumps(value)}" for key, value in self.options.items()]
