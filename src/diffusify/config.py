"""The diffusion config of a model, and the JSON form of the frozen dataclasses that configure it."""

import json
import os
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal, Causal, Prefix
from diffusify.diffusion.length_tokens import LengthTokens
from diffusify.diffusion.objectives import Objective
from diffusify.diffusion.policies import Policy, Unmask
from diffusify.diffusion.schedules import Linear, NoiseSchedule


def to_plain(value: Any) -> Any:
    """A frozen dataclass as JSON types: the name of its class under "type", then its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def from_plain(plain: Any, hint: Any, where: str = "value") -> Any:
    """The inverse of `to_plain`: a value of the type `hint`; only classes that `hint` names are constructed.

    A dataclass may also be given by its name alone ("Linear"). Raises ValueError for a value that `hint` does not
    allow; the message starts with `where`.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    classes: dict[str, Any] = {o.__name__: o for o in options if isinstance(o, type) and is_dataclass(o)}
    former = {c.former_name: name for name, c in classes.items() if hasattr(c, "former_name")}
    if isinstance(plain, str) and plain in classes | former:
        plain = {"type": plain}
    if isinstance(plain, dict) and classes:
        given = dict(plain)
        name = str(given.pop("type", next(iter(classes)) if len(classes) == 1 else None))
        name = former.get(name, name)
        if name not in classes:
            raise ValueError(f'{where}: type "{name}" is not known{nearest(name, classes)}')
        hints = get_type_hints(classes[name])
        known = {f.name for f in fields(classes[name])}
        former_fields = getattr(classes[name], "former_fields", {})
        given = {former_fields.get(key, key): value for key, value in given.items()}
        for key in given:
            if key not in known:
                raise ValueError(f'{where}: {name} has no "{key}"{nearest(key, known)}')
        for field in fields(classes[name]):
            if field.name not in given and field.default is MISSING and field.default_factory is MISSING:
                raise ValueError(f'{where}: {name} needs "{field.name}"')
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


def to_current(plain: Any, hint: Any) -> Any:
    """A saved value with the current names and all fields of its classes; unchanged if it cannot be read."""
    try:
        return to_plain(from_plain(plain, hint))
    except ValueError:
        return plain


def nearest(name: str, known: Any) -> str:
    """The end of an error message about an unknown name: the closest known name, or all of them."""
    close = get_close_matches(name, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(sorted(known))}"


def cache_folder() -> Path:
    """The folder for cached files: $DIFFUSIFY_CACHE, or `diffusify` in the user's cache folder."""
    if folder := os.environ.get("DIFFUSIFY_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusify"


def sees_right_context(attention: AttentionPattern) -> bool:
    """Whether open positions attend to the text after them, as infilling requires."""
    return isinstance(attention, Bidirectional | Prefix) or (
        isinstance(attention, BlockCausal) and attention.sides == "both"
    )


def keeps_ar_model(attention: AttentionPattern, shift: int) -> bool:
    """Whether the clean copy in block training is processed as by the AR base model (the AR half)."""
    return shift == 1 and isinstance(attention, BlockCausal) and attention.clean == "token"


@dataclass(frozen=True)
class DocumentFrame:
    """The first and last token of every document; None stands for the tokenizer's own (see `TextTokenizer`).

    Without `start_prompts`, prompts have no start token. Documents and texts without a prompt always have one.
    """

    start_token_id: int | None = None
    end_token_id: int | None = None
    start_prompts: bool = True


@dataclass(frozen=True)
class DiffusionConfig:
    """How a network is used as a denoiser; saved next to the weights as `diffusion_config.json`.

    Raises ValueError if `shift` is neither 0 nor 1.
    """

    mask_token_id: int
    shift: int  # 1: the output at position i predicts position i + 1, as in an AR model
    attention: AttentionPattern  # which token attends to which in sampling
    architecture: str  # the transformers class of the network
    recipe: str = "ar"
    base_model: str = ""
    schedule: NoiseSchedule = Linear()
    objective: Objective = Objective()
    policy: Policy = Unmask()
    infilling: AttentionPattern | None = None  # the pattern for infilling, if it differs
    longest_answer: int | None = None  # the largest length that the length head predicts; no head if unset
    frame: DocumentFrame = DocumentFrame()
    adapters: Literal["all", "masks"] = "all"  # the rows of a forward pass that adapters act on, if there are any
    draft_head: int | None = None  # the inner size of the draft head; no head if unset
    length_tokens: LengthTokens | None = None  # for models that change the length of masked spans while they fill them
    spans: float | None = None  # the mean length of the spans that `PerText` masks in training, which goes on with them

    @property
    def added_token_ids(self) -> tuple[int, ...]:
        """The tokens that a base does not have: the mask token and the length tokens."""
        return (self.mask_token_id, *([] if self.length_tokens is None else self.length_tokens.ids))

    def __post_init__(self) -> None:
        if self.shift not in (0, 1):
            raise ValueError(f"shift={self.shift} must be 1 (autoregressive networks) or 0 (masked networks)")

    @property
    def block_size(self) -> int | None:
        """The block size of a block model, else None."""
        return self.attention.size if isinstance(self.attention, BlockCausal) else None

    @property
    def infiller(self) -> "DiffusionConfig":
        """The diffusion config for infilling: this one with the attention pattern `infilling`, if that is set."""
        return self if self.infilling is None else replace(self, attention=self.infilling, infilling=None)

    @property
    def sees_right_context(self) -> bool:
        """Whether the model can infill: open positions attend to the text after them."""
        return sees_right_context(self.infiller.attention)

    @property
    def keeps_ar_model(self) -> bool:
        """Whether the model is a block model whose clean text is processed as by the AR base model."""
        return keeps_ar_model(self.attention, self.shift)

    @property
    def reads_as_ar_model(self) -> bool:
        """Whether finished text is processed as by an AR model: an AR base, or a block model that keeps its AR half."""
        return self.keeps_ar_model or (self.shift == 1 and isinstance(self.attention, Causal))

    def save(self, folder: Path | str) -> None:
        """Write `diffusion_config.json` into a folder."""
        text = json.dumps(to_plain(self), indent=2)
        (Path(folder) / "diffusion_config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> "DiffusionConfig":
        """Read `diffusion_config.json` from a folder. Raises ValueError if it is missing or invalid."""
        path = Path(folder) / "diffusion_config.json"
        if not path.is_file():
            if (Path(folder) / "run.json").is_file():
                raise ValueError(f"{folder} holds an unfinished run; give its command again, which finishes it")
            raise ValueError(
                f"{folder} holds no diffusion_config.json, so it is not a diffusion model; "
                "make one with `diffusify adapt BASE --out DIR`"
            )
        try:
            return from_plain(json.loads(path.read_text(encoding="utf-8")), cls, "diffusion config")
        except ValueError as error:
            raise ValueError(f"{path} is not a valid diffusion config: {error}") from error
