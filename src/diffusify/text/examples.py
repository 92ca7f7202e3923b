"""Training examples from records: which tokens are the prompt and which are the target."""

import json
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import Any

import numpy as np
from datasets import Dataset

from diffusify.text.chat_template import ChatTemplate, Example
from diffusify.text.tokenizer import TextTokenizer

CHAT_FIELDS = ("messages", "conversations")
PAIR_FIELDS = (
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("inputs", "targets"),
    ("source", "target"),
)
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


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

    def fill_prompt(self, record: dict[str, Any]) -> str:
        """The prompt with the fields of a record. ValueError if the record lacks one of them."""
        return _fill(self.prompt, record)

    def fill_target(self, record: dict[str, Any]) -> str:
        """The target with the fields of a record. ValueError if the record lacks one of them."""
        return _fill(self.target, record)


def make_examples(
    records: Dataset, tokenizer: TextTokenizer, *, template: Template | None, each_turn: bool, length: int
) -> tuple[Dataset, int]:
    """Encode records (see `load_records`) as examples with `tokens` and `target`, and count the examples left out.

    Left out are examples longer than `length` tokens; none is ever cut. With a template an example is the start token,
    prompt, target and end token, and the last two are target. Without one a record is a chat (`messages` or
    `conversations`) or a question and its answer (see PAIR_FIELDS; `input` is appended to `instruction`), encoded with
    the tokenizer's chat template; `each_turn` as in `ChatTemplate.examples`. ValueError, with the record's number, for
    a record of another format or with an empty target, and if no example is left.
    """
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: one token of prompt and one of target")
    if not len(records):
        raise ValueError("there are no records to make examples of; give a dataset with at least one")
    if template:
        encode = partial(_encode_pair, tokenizer, template)
    else:
        encode = partial(_encode_chat, ChatTemplate(tokenizer), each_turn)
    tokens, target, too_long = [], [], []
    for number, record in enumerate(records["record"][:], 1):
        try:
            examples = encode(json.loads(record))
        except ValueError as error:
            raise ValueError(f"record {number}: {error}") from error
        for example in examples:
            if len(example.tokens) > length:
                too_long.append(len(example.tokens))
                continue
            tokens.append(np.array(example.tokens, np.int32))
            target.append(np.array(example.target))
    if not tokens:
        raise ValueError(f"no example fits into length={length}; the shortest has {min(too_long)} tokens")
    return Dataset.from_dict({"tokens": tokens, "target": target}), len(too_long)


def _encode_pair(tokenizer: TextTokenizer, template: Template, record: dict[str, Any]) -> list[Example]:
    prompt, target = template.fill_prompt(record), template.fill_target(record)
    if not target.strip():
        raise ValueError(f"the target {template.target!r} is empty for this record; leave the record out")
    prompt_ids = [tokenizer.start_token_id, *tokenizer.encode(prompt)]
    target_ids = [*tokenizer.encode(target, continues=bool(prompt)), tokenizer.end_token_id]
    return [Example(prompt_ids + target_ids, [False] * len(prompt_ids) + [True] * len(target_ids))]


def _encode_chat(chat_template: ChatTemplate, each_turn: bool, record: dict[str, Any]) -> list[Example]:
    return chat_template.examples(_messages(record), each_turn=each_turn)


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a record. ValueError if it has none of the known formats."""
    for field in CHAT_FIELDS:
        if isinstance(record.get(field), list):
            return [_message(message) for message in record[field]]
    for question, answer in PAIR_FIELDS:
        if record.get(question) is None or record.get(answer) is None:
            continue
        extra = record.get("input") if question == "instruction" else None
        user_texts = [record[question], extra] if extra else [record[question]]
        for text in (*user_texts, record[answer]):
            if not isinstance(text, str):
                raise ValueError(f"{question} and {answer} must be strings, not {str(text)[:40]}; or give a template")
        user = {"role": "user", "content": "\n\n".join(user_texts)}
        return [user, {"role": "assistant", "content": record[answer]}]
    fields = list(record) or ["question", "answer"]
    raise ValueError(
        f"fields {', '.join(record) or 'none'} are neither a chat nor a known pair; give a template of prompt and "
        f"target, such as '{{{fields[0]}}}\\nAnswer:' and ' {{{fields[-1]}}}'"
    )


def prompt_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a record without the last answer; a pair may lack it. ValueError as in `make_examples`."""
    fields = [answer for question, answer in PAIR_FIELDS if isinstance(record.get(question), str)]
    messages = _messages(dict.fromkeys(fields, "") | {k: v for k, v in record.items() if v is not None})
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    return messages


def _message(message: Any) -> dict[str, Any]:
    """A message as `role` and `content`; ShareGPT calls them `from` and `value`."""
    if not isinstance(message, dict):
        raise ValueError(f'{str(message)[:40]} is not a message; write {{"role": "user", "content": "Hello"}}')
    if message.get("from") is not None and "value" in message:
        return {"role": _SHAREGPT_ROLES.get(str(message["from"]), message["from"]), "content": message["value"]}
    return message


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
