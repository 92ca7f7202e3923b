"""How a network became a denoiser, and how frozen choices are written down and read back."""

import json
import os
import types
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal, Causal, Prefix
from diffusify.diffusion.objectives import Objective
from diffusify.diffusion.policies import Policy, Unmask
from diffusify.diffusion.schedules import Linear, NoiseSchedule


def to_plain(choice: Any) -> Any:
    """A frozen choice as JSON types: its class's name under "type", then its fields."""
    if is_dataclass(choice) and not isinstance(choice, type):
        return {"type": type(choice).__name__} | {f.name: to_plain(getattr(choice, f.name)) for f in fields(choice)}
    return list(choice) if isinstance(choice, tuple) else choice


def from_plain(plain: Any, hint: Any, where: str = "value") -> Any:
    """A frozen choice from JSON types. Only the classes that `hint` names can come out.

    A choice may also be given by its name alone ("Linear"). Anything else than `hint` allows is a ValueError.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    classes: dict[str, Any] = {o.__name__: o for o in options if isinstance(o, type) and is_dataclass(o)}
    former = {c.former_name: name for name, c in classes.items() if hasattr(c, "former_name")}
    if isinstance(plain, str) and plain in classes | former:
        plain = {"type": plain}
    if isinstance(plain, dict) and classes:
        given = dict(plain)
        name = given.pop("type", next(iter(classes)) if len(classes) == 1 else None)
        name = former.get(name, name)
        if name not in classes:
            raise ValueError(f'{where}: type "{name}" is not known{nearest(str(name), classes)}')
        hints = get_type_hints(classes[name])
        known = {f.name for f in fields(classes[name])}
        former_fields = getattr(classes[name], "former_fields", {})
        given = {former_fields.get(key, key): value for key, value in given.items()}
        for key in given:
            if key not in known:
                raise ValueError(f'{where}: {name} has no "{key}"{nearest(key, known)}')
        return classes[name](**{key: from_plain(value, hints[key], f"{where}.{key}") for key, value in given.items()})
    for option in options:
        if get_origin(option) is tuple and isinstance(plain, list):
            return tuple(from_plain(value, get_args(option)[0], where) for value in plain)
        if get_origin(option) is Literal and plain in get_args(option):
            return plain
        if option is float and isinstance(plain, int) and not isinstance(plain, bool):
            return float(plain)
        if isinstance(option, type) and isinstance(plain, option) and (option is bool) == isinstance(plain, bool):
            return plain
    allowed = [a for o in options for a in (get_args(o) if get_origin(o) is Literal else [getattr(o, "__name__", o)])]
    raise ValueError(f"{where}: {plain!r} must be one of {', '.join(map(str, allowed))}")


def nearest(name: str, known: Any) -> str:
    """The end of an error message: what the user may have meant."""
    close = get_close_matches(name, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(sorted(known))}"


def cache_folder() -> Path:
    """Where what is worth keeping between runs is kept: $DIFFUSIFY_CACHE, else the user's cache."""
    if folder := os.environ.get("DIFFUSIFY_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusify"


def sees_right_context(attention: AttentionPattern) -> bool:
    """Whether an open position is decided with a view of the text behind it: what infilling needs."""
    return isinstance(attention, Bidirectional | Prefix)


def keeps_ar_model(attention: AttentionPattern, shift: int) -> bool:
    """Whether the clean text beside the noisy one is read as by the left-to-right base; a pass tells its answers."""
    return shift == 1 and isinstance(attention, BlockCausal) and attention.clean == "token"


@dataclass(frozen=True)
class DiffusionConfig:
    """How a network became a denoiser: saved beside the weights as `diffusion_config.json`, read back by everyone."""

    mask_token_id: int
    shift: int  # 1: the output at position i is about position i + 1, as in a left-to-right model
    attention: AttentionPattern  # who may look at whom when the model is used
    architecture: str  # the transformers class of the network
    recipe: str = "ar"
    base_model: str = ""
    schedule: NoiseSchedule = Linear()
    objective: Objective = Objective()
    policy: Policy = Unmask()
    infilling: AttentionPattern | None = None  # who may look at whom where holes are filled, if that is another pattern
    longest_answer: int | None = None  # the longest that the length head tells; no head if unset

    def __post_init__(self) -> None:
        if self.shift not in (0, 1):
            raise ValueError(f"shift={self.shift} must be 1 (left-to-right networks) or 0 (masked networks)")

    @property
    def block_size(self) -> int | None:
        return self.attention.size if isinstance(self.attention, BlockCausal) else None

    @property
    def infiller(self) -> "DiffusionConfig":
        """The card by which holes are filled: this one, unless that is done under a pattern of its own."""
        return self if self.infilling is None else replace(self, attention=self.infilling, infilling=None)

    @property
    def sees_right_context(self) -> bool:
        return sees_right_context(self.infiller.attention)

    @property
    def keeps_ar_model(self) -> bool:
        return keeps_ar_model(self.attention, self.shift)

    @property
    def reads_as_ar_model(self) -> bool:
        """Whether finished text is read as by a left-to-right model: a base as it is, or one that kept that half."""
        return self.keeps_ar_model or (self.shift == 1 and isinstance(self.attention, Causal))

    def save(self, folder: Path | str) -> None:
        text = json.dumps(to_plain(self), indent=2)
        (Path(folder) / "diffusion_config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> "DiffusionConfig":
        """Read the card in a folder. ValueError when there is none or it does not read."""
        path = Path(folder) / "diffusion_config.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no diffusion_config.json, so it is not a diffusion model; "
                "make one with `diffusify adapt BASE --out DIR`"
            )
        try:
            return from_plain(json.loads(path.read_text(encoding="utf-8")), cls, "card")
        except ValueError as error:
            raise ValueError(f"{path} does not read as a card: {error}") from error
