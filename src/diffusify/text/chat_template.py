"""Chats to token ids, with the tokenizer's own chat template."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError

from diffusify.text.tokenizer import TextTokenizer

ROLES = ("system", "user", "assistant", "tool")
# For tokenizers without a chat template; start and end tokens are those of TextTokenizer.
PLAIN_TEMPLATE = (
    "{{ bos_token or cls_token or eos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or sep_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# A placeholder for the content of message N in a rendered template; missing white space means that it is trimmed.
_PLACEHOLDER = re.compile("(\v?)\ue000([0-9]+)\ue001(\v?)")


class Example(NamedTuple):
    """A training example: its tokens, and which of them are target. The others are prompt and are never masked."""

    tokens: list[int]
    target: list[bool]


class _ContentSlot(NamedTuple):
    """The place of a message's content in a layout, and whether the template trims it."""

    message: int
    trim_left: bool
    trim_right: bool


class _AnswerSpan(NamedTuple):
    """The span of an assistant's answer in a row, including its end-of-turn token."""

    start: int
    stop: int


@dataclass(frozen=True)
class ChatTemplate:
    """Chats to token ids and back, with the tokenizer's own chat template.

    Contents are encoded as plain text: `<|im_end|>` in a message is not a special token, and the template is rendered
    with placeholders instead of contents. A tokenizer without a template gets a plain one, which is saved with it.
    Spaces that a template puts right before an answer belong to the answer, since most tokenizers join a space to the
    word after it.
    """

    tokenizer: TextTokenizer

    def __post_init__(self) -> None:
        if not self.tokenizer.tokenizer.chat_template:
            self.tokenizer.tokenizer.chat_template = PLAIN_TEMPLATE

    @cached_property
    def end_token_id(self) -> int:
        """The token that ends an answer: the first special token after it in the template, else the end token."""
        parts = self._layout(("user", "assistant"))
        answer = next(n for n, part in enumerate(parts) if isinstance(part, _ContentSlot) and part.message == 1)
        return next(part for part in parts[answer:] if isinstance(part, int))

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of a chat up to the start of the assistant's next answer. ValueError if it ends with an answer."""
        _check(messages)
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message is the assistant's; end the chat with a message to answer")
        tokens, answers = self._encode_chat([*messages, {"role": "assistant", "content": ""}])
        return tokens[: answers[-1].start]

    def examples(self, messages: list[dict[str, Any]], *, each_turn: bool) -> list[Example]:
        """The training examples of a chat: the assistant's answers, each with exactly one end-of-turn token.

        If `each_turn`, every answer is target in a single row, which suits models in which no token attends to later
        tokens, or to later blocks. Otherwise there is one row per answer: the chat up to it, the answer, nothing after.
        ValueError for a chat without an answer or with an empty one.
        """
        _check(messages)
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ValueError("the chat has no message of the assistant, so there is nothing to train on; leave it out")
        for n in answers:
            if not messages[n]["content"].strip():
                raise ValueError(f"message {n + 1}: the assistant's content is empty; leave the chat out")
        if each_turn:
            return [_example(*self._encode_chat(messages[: answers[-1] + 1]))]
        rows = [self._encode_chat(messages[: n + 1]) for n in answers]
        return [_example(tokens, spans[-1:]) for tokens, spans in rows]

    def decode_answer(self, ids: Iterable[int]) -> str:
        """The text of an answer up to the first token that ends it, without surrounding white space."""
        ends = (self.end_token_id, self.tokenizer.end_token_id)
        return self.tokenizer.decode(takewhile(lambda i: i not in ends, map(int, ids)), continues=True).strip()

    def _encode_chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[_AnswerSpan]]:
        """The ids of a chat, and the spans of its answers."""
        tokens: list[int] = []
        answers: list[_AnswerSpan] = []
        text, continues, start = "", False, None
        for part in self._layout(tuple(message["role"] for message in messages)):
            if isinstance(part, int):
                tokens += [*self._encode(text, continues), part]
                text, continues = "", not self._restarts_after_special
                if start is not None:
                    answers.append(_AnswerSpan(start, len(tokens)))
                    start = None
            elif isinstance(part, str):
                text += part
            else:
                content = messages[part.message]["content"]
                content = content.lstrip() if part.trim_left else content
                content = content.rstrip() if part.trim_right else content
                if messages[part.message]["role"] == "assistant":
                    prompt = text.rstrip(" ")
                    tokens += self._encode(prompt, continues)
                    text, continues, start = text[len(prompt) :], continues or bool(prompt), len(tokens)
                text += content
        return tokens + self._encode(text, continues), answers

    def _encode(self, text: str, continues: bool) -> list[int]:
        return self.tokenizer.encode(text, continues=continues) if text else []

    def _layout(self, roles: tuple[str, ...]) -> list[int | str | _ContentSlot]:
        """The rendered template for messages with these roles: special tokens, plain text, and slots for contents.

        There is always a special token between the slot of an answer and the next slot.
        """
        if roles not in self._layouts:
            self._layouts[roles] = self._render(roles)
        return self._layouts[roles]

    def _render(self, roles: tuple[str, ...]) -> list[int | str | _ContentSlot]:
        messages = [{"role": role, "content": f"\v\ue000{n}\ue001\v"} for n, role in enumerate(roles)]
        try:
            rendered = self.tokenizer.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses {', '.join(roles)}: {error}") from error
        assert isinstance(rendered, str), "tokenize=False"
        # Text, then for each slot the three groups of _PLACEHOLDER and the text after it.
        first, *rest = _PLACEHOLDER.split(rendered)
        parts: list[int | str | _ContentSlot] = self._split_special(first)
        for left, number, right, text in zip(*(rest[n::4] for n in range(4)), strict=True):
            slot, following = _ContentSlot(int(number), not left, not right), self._split_special(text)
            if roles[slot.message] == "assistant" and not any(isinstance(part, int) for part in following):
                following = [self.tokenizer.end_token_id, *following]
            parts += [slot, *following]
        messages_shown = [part.message for part in parts if isinstance(part, _ContentSlot)]
        for n, role in enumerate(roles):
            if n not in messages_shown or (role == "assistant" and messages_shown.count(n) > 1):
                raise ValueError(f"the tokenizer's chat template leaves out or repeats message {n + 1}, of the {role}")
        if "u000b" in rendered:
            raise ValueError(f"the tokenizer's chat template rewrites contents of {', '.join(roles)} (as JSON)")
        return parts

    def _split_special(self, text: str) -> list[int | str | _ContentSlot]:
        """Text of the template itself, split at its special tokens."""
        parts: list[int | str | _ContentSlot] = []
        position = 0
        for match in self._special_pattern.finditer(text):
            token_id = self.tokenizer.tokenizer.convert_tokens_to_ids(match[0].strip())
            assert isinstance(token_id, int), "one token, one id"
            parts += [text[position : match.start()], token_id]
            position = match.end()
        return [*parts, text[position:]]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """A pattern for any special token, with the white space that some of them strip (`lstrip`, `rstrip`)."""
        tokens = [token for token in self.tokenizer.tokenizer.added_tokens_decoder.values() if token.special]
        tokens.sort(key=lambda token: -len(token.content))
        return re.compile(
            "|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in tokens) or "(?!)"
        )

    @cached_property
    def _restarts_after_special(self) -> bool:
        """Whether text right after a special token is encoded like the start of a text."""
        token = self.tokenizer.tokenizer.convert_ids_to_tokens(self.tokenizer.end_token_id)
        ids = self.tokenizer.tokenizer(f"{token}x", add_special_tokens=False)["input_ids"]
        return list(ids)[1:] == self.tokenizer.encode("x")

    @cached_property
    def _layouts(self) -> dict[tuple[str, ...], list[int | str | _ContentSlot]]:
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
            raise ValueError(f"message {n}: the content is not a string but {str(message['content'])[:40]}")
        if message.get("tool_calls"):
            raise ValueError(f"message {n}: tool calls are not supported; write them into the content")


def _example(tokens: list[int], answers: list[_AnswerSpan]) -> Example:
    """The example of some answers: the tokens up to the end of the last of them."""
    tokens = tokens[: answers[-1].stop]
    target = [False] * len(tokens)
    for start, stop in answers:
        target[start:stop] = [True] * (stop - start)
    return Example(tokens, target)
