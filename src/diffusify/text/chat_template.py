"""Chats to token ids, through the tokenizer's own chat template."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError

from diffusify.text.tokenizer import TextTokenizer

ROLES = ("system", "user", "assistant", "tool")
# For tokenizers without a chat template: start and end token are those of TextTokenizer.
PLAIN_TEMPLATE = (
    "{{ bos_token or cls_token or eos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or sep_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Stands for the content of message N while a template is rendered; the white space shows whether it is trimmed.
_SLOT = re.compile("(\v?)\ue000([0-9]+)\ue001(\v?)")


class Example(NamedTuple):
    """A row to learn from: some of its tokens are to be written, the others are prompt and stay clean."""

    tokens: list[int]
    target: list[bool]


class _Slot(NamedTuple):
    """Where the content of a message goes, and whether the template trims it."""

    message: int
    trim_left: bool
    trim_right: bool


class _Turn(NamedTuple):
    """Where an assistant's answer stands in a row: from its first token to behind its end-of-turn token."""

    start: int
    stop: int


@dataclass(frozen=True)
class ChatTemplate:
    """Chats to token ids and back, through the tokenizer's own chat template.

    Contents are text and nothing but text: `<|im_end|>` in a message stays those letters, and contents are never seen
    by the template. A tokenizer without a template gets a plain one, which is saved with it. Spaces that a template
    puts right before an answer belong to the answer: most tokenizers keep a space at the start of a word.
    """

    tokenizer: TextTokenizer

    def __post_init__(self) -> None:
        if not self.tokenizer.tokenizer.chat_template:
            self.tokenizer.tokenizer.chat_template = PLAIN_TEMPLATE

    @cached_property
    def end_token_id(self) -> int:
        """What ends an answer: the first special token that the template puts behind it, else the end token."""
        parts = self._layout(("user", "assistant"))
        answer = next(n for n, part in enumerate(parts) if isinstance(part, _Slot) and part.message == 1)
        return next(part for part in parts[answer:] if isinstance(part, int))

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of a chat up to where the assistant starts to write its next answer."""
        _check(messages)
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message is the assistant's already; end the chat with a question to be answered")
        tokens, turns = self._write([*messages, {"role": "assistant", "content": ""}])
        return tokens[: turns[-1].start]

    def examples(self, messages: list[dict[str, Any]], *, each_turn: bool) -> list[Example]:
        """What there is to learn from a chat: the assistant's answers, each with exactly one end-of-turn token.

        `each_turn`: one row in which every answer is target. It is right where no token sees what comes behind it, or
        behind its block. Else one row for each answer: the chat so far, the answer, and nothing behind it.
        """
        _check(messages)
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError("the chat has no message of the assistant, so that there is nothing to learn from it")
        for n in answers:
            if not messages[n]["content"].strip():
                raise ValueError(f"message {n + 1}: the assistant's content is empty; leave the chat out")
        if each_turn:
            return [_example(*self._write(messages[: answers[-1] + 1]))]
        rows = [self._write(messages[: n + 1]) for n in answers]
        return [_example(tokens, turns[-1:]) for tokens, turns in rows]

    def read(self, ids: Iterable[int]) -> str:
        """The answer that some ids are, up to the first token that ends it, without the white space around it."""
        ends = (self.end_token_id, self.tokenizer.end_token_id)
        return self.tokenizer.decode(takewhile(lambda i: i not in ends, map(int, ids)), continues=True).strip()

    def _write(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[_Turn]]:
        """The ids of a chat, and where in it the answers are."""
        tokens: list[int] = []
        turns: list[_Turn] = []
        text, continues, answer = "", False, None
        for part in self._layout(tuple(message["role"] for message in messages)):
            if isinstance(part, int):
                tokens += [*self._encode(text, continues), part]
                text, continues = "", not self._starts_anew
                if answer is not None:
                    turns.append(_Turn(answer, len(tokens)))
                    answer = None
            elif isinstance(part, str):
                text += part
            else:
                content = messages[part.message]["content"]
                content = content.lstrip() if part.trim_left else content
                content = content.rstrip() if part.trim_right else content
                if messages[part.message]["role"] == "assistant":
                    prompt = text.rstrip(" ")
                    tokens += self._encode(prompt, continues)
                    text, continues, answer = text[len(prompt) :], continues or bool(prompt), len(tokens)
                text += content
        return tokens + self._encode(text, continues), turns

    def _encode(self, text: str, continues: bool) -> list[int]:
        return self.tokenizer.encode(text, continues=continues) if text else []

    def _layout(self, roles: tuple[str, ...]) -> list[int | str | _Slot]:
        """What the template makes of messages with these roles: special tokens, plain text, and slots for contents.

        Behind the slot of an answer there is always a special token before the next slot.
        """
        if roles not in self._layouts:
            self._layouts[roles] = self._render(roles)
        return self._layouts[roles]

    def _render(self, roles: tuple[str, ...]) -> list[int | str | _Slot]:
        messages = [{"role": role, "content": f"\v\ue000{n}\ue001\v"} for n, role in enumerate(roles)]
        try:
            rendered = self.tokenizer.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses {', '.join(roles)}: {error}") from error
        assert isinstance(rendered, str), "tokenize=False"
        # Text, then for each slot the three groups of _SLOT and the text behind it.
        first, *rest = _SLOT.split(rendered)
        parts: list[int | str | _Slot] = self._parse(first)
        for left, number, right, behind in zip(*(rest[n::4] for n in range(4)), strict=True):
            slot, pieces = _Slot(int(number), not left, not right), self._parse(behind)
            if roles[slot.message] == "assistant" and not any(isinstance(piece, int) for piece in pieces):
                pieces = [self.tokenizer.end_token_id, *pieces]
            parts += [slot, *pieces]
        shown = [part.message for part in parts if isinstance(part, _Slot)]
        for n, role in enumerate(roles):
            if n not in shown or (role == "assistant" and shown.count(n) > 1):
                raise ValueError(f"the tokenizer's chat template leaves out or repeats message {n + 1}, of the {role}")
        if "u000b" in rendered:
            raise ValueError(f"the tokenizer's chat template rewrites contents of {', '.join(roles)} (as JSON)")
        return parts

    def _parse(self, text: str) -> list[int | str | _Slot]:
        """A piece of the template itself, cut at its special tokens."""
        parts: list[int | str | _Slot] = []
        at = 0
        for found in self._special.finditer(text):
            token_id = self.tokenizer.tokenizer.convert_tokens_to_ids(found[0].strip())
            assert isinstance(token_id, int), "one token, one id"
            parts += [text[at : found.start()], token_id]
            at = found.end()
        return [*parts, text[at:]]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Any special token; some swallow the white space around them."""
        tokens = [token for token in self.tokenizer.tokenizer.added_tokens_decoder.values() if token.special]
        tokens.sort(key=lambda token: -len(token.content))
        return re.compile(
            "|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in tokens) or "(?!)"
        )

    @cached_property
    def _starts_anew(self) -> bool:
        """Whether text right behind a special token is encoded like the start of a text."""
        token = self.tokenizer.tokenizer.convert_ids_to_tokens(self.tokenizer.end_token_id)
        ids = self.tokenizer.tokenizer(f"{token}x", add_special_tokens=False)["input_ids"]
        return list(ids)[1:] == self.tokenizer.encode("x")

    @cached_property
    def _layouts(self) -> dict[tuple[str, ...], list[int | str | _Slot]]:
        return {}


def _check(messages: list[dict[str, Any]]) -> None:
    if not messages:
        raise ValueError("the chat has no messages; give at least one")
    for n, message in enumerate(messages, 1):
        if not {"role", "content"} <= message.keys():
            raise ValueError(f'message {n} is {str(message)[:60]}; write {{"role": "user", "content": "Hello"}}')
        if message["role"] not in ROLES:
            raise ValueError(f'message {n}: role "{message["role"]}" is not known; known: {", ".join(ROLES)}')
        if not isinstance(message["content"], str):
            raise ValueError(f"message {n}: the content is no string but {str(message['content'])[:40]}")
        if message.get("tool_calls"):
            raise ValueError(f"message {n}: tool calls cannot be told; write them into the content")


def _example(tokens: list[int], turns: list[_Turn]) -> Example:
    """A row up to the end of its last turn that is to be written."""
    tokens = tokens[: turns[-1].stop]
    target = [False] * len(tokens)
    for start, stop in turns:
        target[start:stop] = [True] * (stop - start)
    return Example(tokens, target)
