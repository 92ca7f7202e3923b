"""Chats to token ids, with the tokenizer's own chat template."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError

from diffusify.text.tokenizer import TextTokenizer

ROLES = ("system", "user", "assistant", "tool")
# For tokenizers without a chat template; start and end tokens are the tokenizer's own.
PLAIN_TEMPLATE = (
    "{{ bos_token or cls_token or eos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or sep_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# A placeholder for the content of message N in a rendered template. Missing white space at its ends means that it is
# trimmed, and escaped white space that it is written as JSON.
_PLACEHOLDER = re.compile(r"(\v|\\u000b)?\ue000([0-9]+)(\v|\\u000b)\ue001(\v|\\u000b)?")
_SPLIT = "\ue002"  # is put into the names of special tokens where they are plain text
_CALL = "\ue003"  # is put before the names of called functions


class Example(NamedTuple):
    """A training example: its tokens, and which of them are target. The others are prompt and are never masked."""

    tokens: list[int]
    target: list[bool]


class _ContentSlot(NamedTuple):
    """The place of a message's content in a layout, and whether the template trims it or writes it as JSON."""

    message: int
    trim_left: bool
    trim_right: bool
    is_json: bool

    def fill(self, content: str) -> str:
        """The content as it is written in this place."""
        content = content.lstrip() if self.trim_left else content
        content = content.rstrip() if self.trim_right else content
        return json.dumps(content, ensure_ascii=False)[1:-1] if self.is_json else content


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
        parts = self._layout([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
        answer = next(n for n, part in enumerate(parts) if isinstance(part, _ContentSlot) and part.message == 1)
        return next(part for part in parts[answer:] if isinstance(part, int))

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer when it is generated: the end of a turn, and that of a text."""
        return tuple(dict.fromkeys((self.end_token_id, *self.tokenizer.end_token_ids)))

    def prompt(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """The ids of a chat up to the start of the assistant's next answer, or to the end of the beginning of one.

        An assistant's message at the end is the beginning of the answer. `tools` are functions that the template shows
        to the model, and messages may have `tool_calls`, both as in `transformers`. ValueError if the chat ends with a
        tool call, or if the template refuses something.
        """
        _check(messages)
        last = messages[-1]
        if last.get("tool_calls"):
            raise ValueError("the last message is a tool call of the assistant; add a message with the tool's result")
        if last["role"] == "assistant" and last["content"]:
            layout = self._layout(messages, tools)
            end = next(
                n
                for n, part in enumerate(layout, 1)
                if isinstance(part, _ContentSlot) and part.message == len(messages) - 1
            )
            return self._encode_layout(messages, layout[:end])[0]
        messages = messages[:-1] if last["role"] == "assistant" else messages
        messages = [*messages, {"role": "assistant", "content": ""}]
        tokens, answers = self._encode_layout(messages, self._layout(messages, tools))
        return tokens[: answers[-1].start]

    def render(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> str:
        """A chat as text, with all special tokens. ValueError if the template refuses something."""
        try:
            text = self.tokenizer.tokenizer.apply_chat_template(messages, tools=list(tools) or None, tokenize=False)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the tokenizer's chat template refuses {roles}: {error}") from error
        assert isinstance(text, str), "tokenize=False"
        return text

    def encode_markup(self, text: str) -> list[int]:
        """The ids of text of the template itself, in which the names of special tokens are these tokens."""
        return self._encode_layout([], self._split_special(text), continues=True)[0]

    def examples(self, messages: list[dict[str, Any]], *, each_turn: bool) -> list[Example]:
        """The training examples of a chat: the assistant's answers, each with exactly one end-of-turn token.

        If `each_turn`, every answer is target in a single row, which suits models in which no token attends to later
        tokens, or to later blocks; an answer that the template renders in another way once the chat goes on (Qwen3
        shows a thought in the last one only) gets a row of its own. Otherwise there is one row per answer: the chat up
        to it, the answer, nothing after. So every answer is learned after the prompt that `prompt` makes.

        Messages with `train: False` are given, not learned. ValueError for a chat without an answer to learn or with an
        empty one.
        """
        _check(messages)
        answers = [n for n, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
        if not answers:
            raise ValueError("the chat has no message of the assistant, so there is nothing to train on; leave it out")
        for n in answers:
            if messages[n].get("tool_calls"):
                raise ValueError(f"message {n + 1}: tool calls are not supported; write them into the content")
            if not messages[n]["content"].strip():
                raise ValueError(f"message {n + 1}: the assistant's content is empty; leave the chat out")
        together = [n for n in answers if each_turn and self._renders_alike(messages[: answers[-1] + 1], n)]
        rows = [self._encode_chat(messages[: n + 1]) for n in answers if n not in together]
        examples = [_example(tokens, spans[-1:]) for tokens, spans in rows]
        if together:
            tokens, spans = self._encode_chat(messages[: answers[-1] + 1])
            assistant = (n for n, m in enumerate(messages) if m["role"] == "assistant")
            shown = [n for n in assistant if messages[n]["content"] or not messages[n].get("tool_calls")]
            examples.append(_example(tokens, [span for n, span in zip(shown, spans, strict=False) if n in together]))
        return examples

    def _renders_alike(self, messages: list[dict[str, Any]], answer: int) -> bool:
        """Whether the template renders a chat up to the end of an answer as it does when the chat ends there."""
        alone = self._layout(messages[: answer + 1])
        slot = next(n for n, part in enumerate(alone) if isinstance(part, _ContentSlot) and part.message == answer)
        end = next(n for n, part in enumerate(alone) if n > slot and isinstance(part, int))
        return alone[: end + 1] == self._layout(messages)[: end + 1]

    def decode_answer(self, ids: Iterable[int]) -> str:
        """The text of an answer up to the first token that ends it, without surrounding white space."""
        ends = self.end_token_ids
        return self.tokenizer.decode(takewhile(lambda i: i not in ends, map(int, ids)), continues=True).strip()

    def _encode_chat(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[_AnswerSpan]]:
        """The ids of a chat, and the spans of its answers."""
        return self._encode_layout(messages, self._layout(messages))

    def _encode_layout(
        self, messages: list[dict[str, Any]], layout: list[int | str | _ContentSlot], *, continues: bool = False
    ) -> tuple[list[int], list[_AnswerSpan]]:
        tokens: list[int] = []
        answers: list[_AnswerSpan] = []
        text, start = "", None
        for part in layout:
            if isinstance(part, int):
                tokens += [*self._encode(text, continues), part]
                text, continues = "", not self._restarts_after_special
                if start is not None:
                    answers.append(_AnswerSpan(start, len(tokens)))
                    start = None
            elif isinstance(part, str):
                text += part
            else:
                if messages[part.message]["role"] == "assistant":
                    prompt = text.rstrip(" ")
                    tokens += self._encode(prompt, continues)
                    text, continues, start = text[len(prompt) :], continues or bool(prompt), len(tokens)
                text += part.fill(messages[part.message]["content"])
        return tokens + self._encode(text, continues), answers

    def _encode(self, text: str, continues: bool) -> list[int]:
        return self.tokenizer.encode(text, continues=continues) if text else []

    def _layout(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int | str | _ContentSlot]:
        """The rendered template for these messages: special tokens, plain text, and slots for contents.

        There is always a special token between the slot of an answer and the next slot.
        """
        roles = tuple(message["role"] for message in messages)
        if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
            return self._render_layout(messages, tools)
        if roles not in self._layouts:
            self._layouts[roles] = self._render_layout(messages, ())
        return self._layouts[roles]

    def _render_layout(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[int | str | _ContentSlot]:
        roles = [message["role"] for message in messages]
        rendered = self.render([self._with_placeholder(*each) for each in enumerate(messages)], self._as_text(tools))
        # Text, then for each slot the groups of _PLACEHOLDER and the text after it.
        first, *rest = _PLACEHOLDER.split(rendered)
        parts: list[int | str | _ContentSlot] = self._split_special(first)
        for left, number, middle, right, text in zip(*(rest[n::5] for n in range(5)), strict=True):
            slot = _ContentSlot(int(number), not left, not right, middle != "\v")
            following = self._split_special(text)
            if roles[slot.message] == "assistant":
                if slot.is_json:
                    raise ValueError(f"the tokenizer's chat template rewrites contents of {', '.join(roles)} (as JSON)")
                if not any(isinstance(part, int) for part in following):
                    following = [self.tokenizer.end_token_id, *following]
            parts += [slot, *following]
        messages_shown = [part.message for part in parts if isinstance(part, _ContentSlot)]
        for n, message in enumerate(messages):
            left_out = n not in messages_shown and (message["content"] or not message.get("tool_calls"))
            if left_out or (roles[n] == "assistant" and messages_shown.count(n) > 1):
                raise ValueError(
                    f"the tokenizer's chat template leaves out or repeats message {n + 1}, of the {roles[n]}"
                )
        if rendered.count(_CALL) < sum(len(message.get("tool_calls") or ()) for message in messages):
            raise ValueError("the tokenizer's chat template leaves out tool calls; write them into the contents")
        return parts

    def _with_placeholder(self, n: int, message: dict[str, Any]) -> dict[str, Any]:
        """Message n with a placeholder for its content, and what it says about tools as plain text."""
        is_empty = message.get("tool_calls") and not message["content"]
        content = "" if is_empty else f"\v\ue000{n}\v\ue001\v"
        about_tools = {name: message[name] for name in ("tool_calls", "tool_call_id", "name") if message.get(name)}
        about_tools = self._as_text(about_tools)
        for call in about_tools.get("tool_calls", ()):
            call["function"]["name"] = _CALL + call["function"]["name"]
        return {"role": message["role"], "content": content} | about_tools

    def _as_text(self, value: Any) -> Any:
        """A JSON value in which no string has the name of a special token or a placeholder."""
        if isinstance(value, dict):
            return {self._as_text(key): self._as_text(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._as_text(item) for item in value]
        if not isinstance(value, str):
            return value
        return self._special_name.sub(lambda m: m[0][0] + _SPLIT + m[0][1:], re.sub("[\ue000-\ue003]", "", value))

    def _split_special(self, text: str) -> list[int | str | _ContentSlot]:
        """Text of the template itself, split at its special tokens."""
        parts: list[int | str | _ContentSlot] = []
        position = 0
        for match in self._special_pattern.finditer(text):
            token_id = self.tokenizer.tokenizer.convert_tokens_to_ids(match[0].strip())
            assert isinstance(token_id, int), "one token, one id"
            parts += [text[position : match.start()], token_id]
            position = match.end()
        parts.append(text[position:])
        return [re.sub(f"[{_SPLIT}{_CALL}]", "", part) if isinstance(part, str) else part for part in parts]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """A pattern for any special token, with the white space that some of them strip (`lstrip`, `rstrip`)."""
        return re.compile(
            "|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in self._special_tokens)
            or "(?!)"
        )

    @cached_property
    def _special_name(self) -> re.Pattern[str]:
        """A pattern for the name of any special token."""
        return re.compile("|".join(re.escape(token.content) for token in self._special_tokens) or "(?!)")

    @cached_property
    def _special_tokens(self) -> list[Any]:
        """The special tokens, the longest names first."""
        tokens = [token for token in self.tokenizer.tokenizer.added_tokens_decoder.values() if token.special]
        return sorted(tokens, key=lambda token: -len(token.content))

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
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'message {n} is {str(message)[:60]}; write {{"role": "user", "content": "Hello"}}')
        if message["role"] not in ROLES:
            raise ValueError(f'message {n}: role "{message["role"]}" is not known; known: {", ".join(ROLES)}')
        if not isinstance(message["content"], str):
            raise ValueError(f"message {n}: the content is not a string but {str(message['content'])[:40]}")


def _example(tokens: list[int], answers: list[_AnswerSpan]) -> Example:
    """The example of some answers: the tokens up to the end of the last of them."""
    tokens = tokens[: answers[-1].stop]
    target = [False] * len(tokens)
    for start, stop in answers:
        target[start:stop] = [True] * (stop - start)
    return Example(tokens, target)
