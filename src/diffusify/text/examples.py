"""Records to examples: which tokens are given, and which are to be written."""

import json
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import Any

import numpy as np
from datasets import Dataset

from diffusify.text.chat_template import ChatTemplate, Example
from diffusify.text.tokenizer import TextTokenizer

CHATS = ("messages", "conversations")
PAIRS = (
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("inputs", "targets"),
    ("source", "target"),
)
_SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for roles


@dataclass(frozen=True)
class Template:
    r"""How a record becomes a prompt and what is to be written behind it: its fields, in braces, among plain text.

    `Template("German: {de}\nEnglish:", " {en}")`; `{{` and `}}` are plain braces. Most tokenizers keep a space at the
    start of a word, so it is the target that starts with one.
    """

    prompt: str
    target: str

    def __post_init__(self) -> None:
        _pieces(self.prompt)
        if not any(field for _, field in _pieces(self.target)):
            raise ValueError(f"target {self.target!r} of the template has no field; write one in braces: ' {{answer}}'")

    def fill_prompt(self, record: dict[str, Any]) -> str:
        """The prompt, with the fields of a record. ValueError if it lacks one of them."""
        return _fill(self.prompt, record)

    def fill_target(self, record: dict[str, Any]) -> str:
        """The target, with the fields of a record. ValueError if it lacks one of them."""
        return _fill(self.target, record)


def make_examples(
    records: Dataset, tokenizer: TextTokenizer, *, template: Template | None, each_turn: bool, length: int
) -> tuple[Dataset, int]:
    """Records (see `load_records`) as `tokens` and `target`, and how many of the examples were left out.

    Left out are those longer than `length` tokens; none is ever cut. With a template an example is the start token,
    prompt, target and end token, of which target and end token are to be written. Without one a record is a chat
    (`messages` or `conversations`), or a question and its answer (see PAIRS; `input` may stand beside `instruction`),
    told by the tokenizer's chat template; `each_turn` as in `Dialogue.examples`. ValueError, with the record's number,
    for a record of another form or with nothing to write, and if no example is left.
    """
    if length < 2:
        raise ValueError(f"length={length} must be at least 2: a prompt and something to write")
    if not len(records):
        raise ValueError("there are no records to make examples of; give a dataset with at least one")
    tell = partial(_pair, tokenizer, template) if template else partial(_chat, ChatTemplate(tokenizer), each_turn)
    tokens, target, too_long = [], [], []
    for number, record in enumerate(records["record"][:], 1):
        try:
            examples = tell(json.loads(record))
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


def _pair(tokenizer: TextTokenizer, template: Template, record: dict[str, Any]) -> list[Example]:
    prompt, target = template.fill_prompt(record), template.fill_target(record)
    if not target.strip():
        raise ValueError(f"nothing is to be written: the target {template.target!r} is empty; leave the record out")
    given = [tokenizer.start_token_id, *tokenizer.encode(prompt)]
    written = [*tokenizer.encode(target, continues=bool(prompt)), tokenizer.end_token_id]
    return [Example(given + written, [False] * len(given) + [True] * len(written))]


def _chat(dialogue: ChatTemplate, each_turn: bool, record: dict[str, Any]) -> list[Example]:
    return dialogue.examples(_messages(record), each_turn=each_turn)


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record as a chat. ValueError if it has none of the known forms."""
    for field in CHATS:
        if isinstance(record.get(field), list):
            return [_message(message) for message in record[field]]
    for question, answer in PAIRS:
        if record.get(question) is None or record.get(answer) is None:
            continue
        more = record.get("input") if question == "instruction" else None
        asked = [record[question], more] if more else [record[question]]
        for text in (*asked, record[answer]):
            if not isinstance(text, str):
                raise ValueError(f"{question} and {answer} must be strings, not {str(text)[:40]}; or give a template")
        return [{"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": record[answer]}]
    fields = list(record) or ["question", "answer"]
    raise ValueError(
        f"fields {', '.join(record) or 'none'} are neither a chat nor a known pair; give a template of prompt and "
        f"target, as '{{{fields[0]}}}\\nAnswer:' and ' {{{fields[-1]}}}'"
    )


def question(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record as a chat that ends with a question; a pair may lack its answer. ValueError as `make_examples`'."""
    fields = [answer for asked, answer in PAIRS if isinstance(record.get(asked), str)]
    messages = _messages(dict.fromkeys(fields, "") | {k: v for k, v in record.items() if v is not None})
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    return messages


def _message(message: Any) -> dict[str, Any]:
    """A message with `role` and `content`; ShareGPT says `from` and `value`."""
    if not isinstance(message, dict):
        raise ValueError(f'{str(message)[:40]} is no message; write {{"role": "user", "content": "Hello"}}')
    if message.get("from") is not None and "value" in message:
        return {"role": _SPEAKERS.get(str(message["from"]), message["from"]), "content": message["value"]}
    return message


def _pieces(text: str) -> list[tuple[str, str | None]]:
    """A template cut into plain text and the field behind it, if there is one."""
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"template {text!r}: {error}; braces that are no field are written twice") from error
    for _, field, spec, conversion in parsed:
        if field == "" or spec or conversion:
            raise ValueError(f"template {text!r}: write a field's bare name, {{name}}; other braces are written twice")
    return [(plain, field) for plain, field, _, _ in parsed]


def _fill(text: str, record: dict[str, Any]) -> str:
    filled = ""
    for plain, field in _pieces(text):
        filled += plain
        if field is not None:
            if record.get(field) is None:
                raise ValueError(f'there is no field "{field}" for template {text!r}; fields: {", ".join(record)}')
            value = record[field]
            filled += value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return filled
