"""Training examples from records: which tokens are the prompt and which are the target."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import Any, NamedTuple, TypeVar

import numpy as np
from datasets import Dataset

from diffusify.text.bad_records import BadRecords, check_limit
from diffusify.text.chat_template import ChatTemplate, Example
from diffusify.text.messages import is_preference, record_messages
from diffusify.text.tokenizer import TextTokenizer

T = TypeVar("T")


class Examples(NamedTuple):
    """Encoded examples (`tokens` and `target`), and what was left out: longer examples, and records of no use.

    `rejected` is the number of records whose rejected answer is not used.
    """

    rows: Dataset
    too_long: int
    bad_records: BadRecords
    rejected: int

    def notes(self, length: int) -> Iterator[str]:
        """What to tell about examples that are left out, those of more than `length` tokens among them."""
        if self.bad_records.corrupt:
            yield f"skipped {self.bad_records}"
        if self.rejected:
            yield f"{self.rejected:,} records are preferences: chosen answers are learned, rejected ones unused"
        if self.too_long:
            total = self.too_long + len(self.rows)
            yield f"skipped {self.too_long:,} of {total:,} examples: more than {length} tokens"


@dataclass(frozen=True)
class Template:
    r"""The text of a prompt and of its target, with the fields of a record in braces.

    `Template("German: {de}\nEnglish:", " {en}")`; `{{` and `}}` are plain braces. The target starts with the space
    between the two, since most tokenizers join a space to the word after it. ValueError if a text cannot be parsed or
    the target has no field.
    """

    prompt: str
    target: str

    def __post_init__(self) -> None:
        _parse_template(self.prompt)
        if not any(field for _, field in _parse_template(self.target)):
            raise ValueError(f"target {self.target!r} of the template has no field; write one in braces: ' {{answer}}'")

    @property
    def prompt_fields(self) -> list[str]:
        """The names of the fields in the prompt."""
        return [field for _, field in _parse_template(self.prompt) if field is not None]

    def fill_prompt(self, record: dict[str, Any]) -> str:
        """The prompt with the fields of a record. ValueError if the record lacks one of them."""
        return _fill(self.prompt, record)

    def fill_target(self, record: dict[str, Any]) -> str:
        """The target with the fields of a record. ValueError if the record lacks one of them."""
        return _fill(self.target, record)


def make_examples(
    records: Dataset,
    tokenizer: TextTokenizer,
    *,
    template: Template | None,
    each_turn: bool,
    length: int,
    max_corrupt: float = 0.01,
) -> Examples:
    """Encode records (see `load_records`) as examples with `tokens` and `target`.

    Examples longer than `length` tokens are left out; none is ever cut. With a template an example is the start token,
    prompt, target and end token, and the last two are target. Without one a record is a chat (see `record_messages`),
    encoded with the tokenizer's chat template; `each_turn` as in `ChatTemplate.examples`. Records that cannot be used,
    because they cannot be read, have another format or an empty target, are left out as well; ValueError if they are
    more than a share `max_corrupt`, and if no example is left.
    """
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: one token of prompt and one of target")
    if not len(records):
        raise ValueError("there are no records to make examples of; give a dataset with at least one")
    check_limit(max_corrupt)
    if template:
        encode = partial(_encode_pair, tokenizer, template)
    else:
        encode = partial(_encode_chat, ChatTemplate(tokenizer), each_turn)
    bad_records, rejected = BadRecords(problem="cannot be used"), 0
    tokens, target, too_long = [], [], []
    for record, examples in usable_records(records, encode, bad_records):
        rejected += template is None and is_preference(record)
        for example in examples:
            if len(example.tokens) > length:
                too_long.append(len(example.tokens))
                continue
            tokens.append(np.array(example.tokens, np.int32))
            target.append(np.array(example.target))
    bad_records.check(max_corrupt)
    if not tokens and not too_long:
        raise ValueError(f"no record can be used: {bad_records}")
    if not tokens:
        raise ValueError(f"no example fits into length={length}; the shortest has {min(too_long)} tokens")
    return Examples(Dataset.from_dict({"tokens": tokens, "target": target}), len(too_long), bad_records, rejected)


def usable_records(
    records: Dataset, use: Callable[[dict[str, Any]], T], bad_records: BadRecords
) -> Iterator[tuple[dict[str, Any], T]]:
    """Each record that could be read and that `use` accepts, with its result; `bad_records` counts the others."""
    for record in parse_records(records):
        try:
            if isinstance(record, ValueError):
                raise record
            result = use(record)
        except ValueError as error:
            bad_records.add(f"record {bad_records.records + 1}: {error}")
            continue
        bad_records.records += 1
        yield record, result


def parse_records(records: Dataset) -> Iterator[dict[str, Any] | ValueError]:
    """The records of a dataset (see `load_records`), and a ValueError for each that could not be read."""
    for record, fault in zip(records["record"][:], records["fault"][:], strict=True):
        yield ValueError(fault) if record is None else json.loads(record)


def _encode_pair(tokenizer: TextTokenizer, template: Template, record: dict[str, Any]) -> list[Example]:
    prompt, target = template.fill_prompt(record), template.fill_target(record)
    if not target.strip():
        raise ValueError(f"the target {template.target!r} is empty for this record; leave the record out")
    prompt_ids = tokenizer.add_start(tokenizer.encode(prompt))
    target_ids = [*tokenizer.encode(target, continues=bool(prompt)), tokenizer.end_token_id]
    return [Example(prompt_ids + target_ids, [False] * len(prompt_ids) + [True] * len(target_ids))]


def _encode_chat(chat_template: ChatTemplate, each_turn: bool, record: dict[str, Any]) -> list[Example]:
    return chat_template.examples(record_messages(record), each_turn=each_turn)


def _parse_template(text: str) -> list[tuple[str, str | None]]:
    """A template as pairs of plain text and the field after it, which may be None."""
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"template {text!r}: {error}; plain braces are written twice") from error
    for _, field, spec, conversion in parsed:
        if field == "" or spec or conversion:
            raise ValueError(
                f"template {text!r}: write only the field's name, {{name}}; plain braces are written twice"
            )
    return [(plain, field) for plain, field, _, _ in parsed]


def _fill(text: str, record: dict[str, Any]) -> str:
    filled = ""
    for plain, field in _parse_template(text):
        filled += plain
        if field is not None:
            if record.get(field) is None:
                raise ValueError(
                    f'the record has no field "{field}" for template {text!r}; fields: {", ".join(record)}'
                )
            value = record[field]
            filled += value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return filled
