"""Tool calls in the form in which a chat template writes them, which is the form that its model has learnt."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffusify.text.chat_template import ChatTemplate
from diffusify.text.grammar import schema_regex
from diffusify.text.json_object import json_object_regex

_PROBE = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "probe", "arguments": {"x": 1}}}
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "A probe", "parameters": {}}}
_NO_TOOLS = "leave out tools, or set tool_choice to none"


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool; `arguments` are JSON as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolCallFormat:
    """The form of tool calls: `opening`, JSON objects with `between` each two of them, and `closing`.

    `sign` is the text that begins a call in a free answer; if `starts_answer`, it does so only at the answer's start.
    `between` is None if there is only one call at a time. `more` is a regular expression for what an object has after
    the arguments.
    """

    sign: str
    opening: str
    closing: str
    between: str | None
    arguments_key: str = "arguments"
    more: str = ""
    starts_answer: bool = False

    @classmethod
    def from_template(cls, template: ChatTemplate) -> "ToolCallFormat":
        """The form in which a template writes calls. ValueError if it takes no tools or has another form."""
        user = {"role": "user", "content": "x"}
        if template.render([user], [_PROBE_TOOL]) == template.render([user]):
            raise ValueError(f"the model's chat template does not take tools; {_NO_TOOLS}")
        text = template.render([user, {"role": "assistant", "content": "", "tool_calls": [_PROBE]}], [_PROBE_TOOL])
        call = r'\{"name": "probe", "arguments": \{"x": 1\}'
        if match := re.search(rf"(<tool_call>\s*){call}\}}(\s*</tool_call>)", text):  # Hermes, Qwen
            opening, closing = match.groups()
            return cls("<tool_call>", opening, closing, f"{closing}\n{opening}")
        if match := re.search(rf'(\[TOOL_CALLS\]\s*\[){call}(, "id": "a1b2c3d4e")?\}}\]', text):  # Mistral
            more = ', "id": "[a-zA-Z0-9]{9}"' if match[2] else ""
            return cls("[TOOL_CALLS]", match[1], "]", ", ", more=more)
        if '{"name": "probe", "parameters": {"x": 1}}' in text:  # Llama 3
            return cls("{", "", "", None, arguments_key="parameters", starts_answer=True)
        raise ValueError(
            "the model's chat template writes tool calls in a form that is not known; known are those of Hermes and "
            f"Qwen (<tool_call> and JSON), Mistral ([TOOL_CALLS] and a list) and Llama 3 (JSON); {_NO_TOOLS}"
        )

    def find_call(self, text: str) -> int:
        """Where the first call begins in an answer, -1 if there is none."""
        at = text.find(self.sign)
        return -1 if self.starts_answer and text[:at].strip() else at

    def regex(self, functions: Sequence[dict[str, Any]], *, parallel: bool) -> str:
        """A regular expression for calls after the opening: one, or with `parallel` any number that the form allows.

        `functions` have a name, and a JSON schema of their parameters. ValueError for a schema that cannot be followed.
        """
        calls = "|".join(self._head(re.escape(each["name"])) + _arguments_regex(each) for each in functions)
        call = rf"({calls}){self.more}\}}"
        several = f"({call}{re.escape(self.between)})*" if parallel and self.between is not None else ""
        # A list of calls has to be closed. Where each call is closed, its end is that of the answer.
        return several + call + (re.escape(self.closing) if self.between == ", " else f"({re.escape(self.closing)})?")

    def parse(self, text: str) -> list[ToolCall]:
        """The calls of a text that matches `regex`."""
        return list(self._calls(text))

    def _calls(self, text: str) -> Iterator[ToolCall]:
        head, position = re.compile(self._head('([^"]+)')), 0
        while match := head.search(text, position):
            _, position = json.JSONDecoder().raw_decode(text, match.end())
            yield ToolCall(match[1], text[match.end() : position])

    def _head(self, name: str) -> str:
        return rf'\{{"name": "{name}", "{self.arguments_key}": '


def _arguments_regex(function: dict[str, Any]) -> str:
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    if schema.keys() <= {"type", "title", "description"} and schema.get("type") == "object":
        return json_object_regex()
    try:
        return f"({schema_regex(schema)})"
    except ValueError as error:
        raise ValueError(f"tools: the parameters of {function['name']}: {error}") from error
