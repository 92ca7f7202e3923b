"""Records that ask for a text: reading them, preparing their generation, and adding its result."""

import io
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from diffusify.config import from_plain
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.generation import Generation, GenerationRun
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.compression import file_type, open_bytes, report_damage
from diffusify.text.files import try_records
from diffusify.text.folders import RECORD_TYPES, find_files
from diffusify.text.messages import CHAT_FIELDS, LABEL_FIELDS, record_messages

_OVERRIDES = get_type_hints(SamplingConfig) | {"max_new_tokens": int}
_TEXT_OVERRIDES = ("policy", "cache", "regex", "stop")


@dataclass(frozen=True)
class BulkInput:
    """The records of a file or folder: those of data sources, and the lines of `.txt` files as records of `field`.

    Blank lines are skipped. ValueError if there is no such file.
    """

    path: Path
    field: str = "prompt"

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise ValueError(f"input {self.path} does not exist; give a file of records, or a folder of such files")

    @cached_property
    def files(self) -> list[Path]:
        """The files with the records."""
        return find_files(self.path, (*RECORD_TYPES, ".txt"))

    @cached_property
    def count(self) -> int:
        """The number of records. ValueError if there are none, or none of a file can be read."""
        count = sum(1 for _ in self)
        if not count:
            raise ValueError(f"input {self.path} has no records")
        return count

    def __iter__(self) -> Iterator[dict[str, Any] | ValueError]:
        """The records in order, and a ValueError for each that cannot be read."""
        for file in self.files:
            if file_type(file) != ".txt":
                yield from try_records(file)
                continue
            with report_damage(file), io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig") as lines:
                yield from ({self.field: line.rstrip("\n")} for line in lines if line.strip())


@dataclass(frozen=True)
class BulkSettings:
    """The settings of all records, which fields of a record override.

    A record has one of the `allowed` fields: a `prompt` to continue, the `messages` of a chat to answer, or a `text`
    with masked spans, for which `infilling` are the settings. Record i has the seed `seed + i`.
    """

    sampling: SamplingConfig = SamplingConfig()
    infilling: SamplingConfig = SamplingConfig()
    max_new_tokens: int | None = None
    allowed: tuple[str, ...] = ("prompt", "messages", "text")

    def prepare(self, lm: DiffusionLM, record: dict[str, Any], index: int) -> GenerationRun:
        """Prepare the generation that a record asks for. ValueError if it asks for none or has invalid settings."""
        field = self._field(record)
        sampling = self.infilling if field == "text" else self.sampling
        sampling = replace(sampling, seed=sampling.seed + index)
        changes = {name: _setting(name, record[name]) for name in _OVERRIDES if record.get(name) not in (None, "")}
        length = changes.pop("max_new_tokens", self.max_new_tokens)
        sampling = sampling.override(**changes)
        if field == "messages":
            return lm.prepare_chat([record_messages(_as_chat(record))], length, sampling)
        if not isinstance(record[field], str):
            raise ValueError(f"the field {field} is not a text but {str(record[field])[:40]}")
        if field == "text":
            return lm.prepare_infilling([record[field]], sampling)
        return lm.prepare_generation([record[field]], length, sampling)

    def _field(self, record: dict[str, Any]) -> str:
        """The field that says what to generate."""
        found = [name for name, value in record.items() if value is not None]
        asked = {_kind(name, record[name]) for name in found} & {*self.allowed}
        if len(asked) != 1:
            allowed = " or ".join(self.allowed)
            raise ValueError(f"a record has one field {allowed}; fields found: {', '.join(found) or 'none'}")
        return asked.pop()


def with_result(record: dict[str, Any], result: Generation) -> dict[str, Any]:
    """A record with the text that was generated for it."""
    text = (
        {"completion": result.completion, "finish_reason": result.finish_reason}
        if result.spans is None
        else {"text": result.text, "spans": list(result.spans)}
    )
    kept = {name: value for name, value in record.items() if name != "error"}
    return kept | text | {"tokens": result.tokens, "forwards": result.forwards, "seed": result.seed}


def _kind(name: str, value: Any) -> str:
    """What a field asks for; a prompt of messages is a chat."""
    return "messages" if name in CHAT_FIELDS or (name == "prompt" and isinstance(value, list)) else name


def _as_chat(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a chat to answer, without published answers."""
    chat = {name: value for name, value in record.items() if name not in ("chosen", "rejected", *LABEL_FIELDS)}
    return chat if any(name in chat for name in CHAT_FIELDS) else {**chat, "messages": chat["prompt"]}


def _setting(name: str, value: Any) -> Any:
    """The value of a setting. Tables write numbers as text."""
    if isinstance(value, str) and name not in _TEXT_OVERRIDES:
        with suppress(ValueError):
            value = json.loads(value)
    return from_plain(value, _OVERRIDES[name], name)
