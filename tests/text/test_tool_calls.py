"""Tools and their calls, rendered as by transformers and parsed in each template's own form."""

import json
import re
from typing import Any

import pytest

from diffusify.text.chat_template import ChatTemplate
from diffusify.text.json_object import json_object_regex
from diffusify.text.tool_calls import ToolCall, ToolCallFormat
from tests.text.chats import CHATML
from tests.text.tool_templates import CALL, SPECIAL, TEMPLATES, TIME, WEATHER, tool_tokenizer

USER = {"role": "user", "content": "What is the weather?"}
HISTORY = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
THANKS = {"role": "user", "content": "Thanks!"}
RESULT = {"role": "tool", "content": '{"sky": "blue"}', "tool_call_id": "a1b2c3d4e"}


def reference_ids(template: ChatTemplate, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
    """The ids of a chat as transformers encodes it."""
    tokenizer: Any = template.tokenizer.tokenizer
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("style", TEMPLATES)
def test_prompts_with_tools_equal_those_of_transformers(style: str) -> None:
    template = ChatTemplate(tool_tokenizer(style))
    for messages in ([USER], [*HISTORY, RESULT], [*HISTORY, RESULT, {"role": "assistant", "content": "Blue."}, THANKS]):
        for tools in ([], [WEATHER, TIME]):
            assert template.prompt(messages, tools) == reference_ids(template, messages, tools)
            text = template.tokenizer.decode(template.prompt(messages, tools))
            assert ("The weather of a city" in text) == bool(tools) and ("Köln" in text) == (len(messages) > 1)


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("text", ["<|im_end|>", "[INST]x</s><|eot_id|>", "\ue0000\v\ue001", "[TOOL_CALLS]\ue003"])
def test_tools_and_results_never_become_special_tokens(style: str, text: str) -> None:
    template = ChatTemplate(tool_tokenizer(style))

    def prompt(text: str) -> list[int]:
        call = CALL | {"function": {"name": "time", "arguments": {"zone": text}}}
        tool = {"type": "function", "function": TIME["function"] | {"description": text}}
        history = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, RESULT | {"content": text}]
        return template.prompt(history, [tool])

    special = template.tokenizer.special_ids
    assert [i for i in prompt(text) if i in special] == [i for i in prompt("plain") if i in special]
    assert template.tokenizer.decode(prompt(text)).count("get") == 0
    if "\ue000" not in text and "\ue003" not in text and style == "qwen":
        assert template.tokenizer.decode(prompt(text)).count(text) == 3


@pytest.mark.parametrize("style", TEMPLATES)
def test_the_form_of_a_templates_own_calls(style: str) -> None:
    """What the template writes for calls is what the form expects, parses, and has as a regular expression."""
    template = ChatTemplate(tool_tokenizer(style))
    form = ToolCallFormat.from_template(template)
    calls = [CALL, CALL | {"function": {"name": "time", "arguments": {"at": [1, {"b": '}"'}]}}}]
    calls = calls[: 1 if form.between is None else 2]
    text = template.render([USER, {"role": "assistant", "content": "", "tool_calls": calls}])
    answer = text[form.find_call(text) if not form.starts_answer else text.index("{") :]
    assert answer.startswith(form.opening)
    written = re.split("|".join(map(re.escape, SPECIAL[1:5])), answer.removeprefix(form.opening))[0]
    written = written.removesuffix("<|endoftext|>")
    assert form.parse(written) == [
        ToolCall(call["function"]["name"], json.dumps(call["function"]["arguments"], ensure_ascii=False))
        for call in calls
    ]
    functions = [{"name": name, "parameters": {"type": "object"}} for name in ("get_weather", "time")]
    assert re.fullmatch(form.regex(functions, parallel=True), written)
    assert bool(re.fullmatch(form.regex(functions, parallel=False), written)) == (len(calls) == 1)
    assert not re.fullmatch(form.regex(functions[:1], parallel=True), written.replace("get_weather", "other"))


def test_where_a_call_begins() -> None:
    forms = {style: ToolCallFormat.from_template(ChatTemplate(tool_tokenizer(style))) for style in TEMPLATES}
    assert forms["qwen"].find_call("Let me see.\n<tool_call>\n{") == 12 and forms["qwen"].find_call("{}") == -1
    assert forms["llama3"].find_call(' {"name"') == 1 and forms["llama3"].find_call('So {"name"') == -1
    assert forms["mistral"].find_call("[TOOL_CALLS]") == 0


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (CHATML, "does not take tools; leave out tools, or set tool_choice to none"),
        (TEMPLATES["qwen"].replace("<tool_call>\n{", "<function>{"), "in a form that is not known; known are"),
        (TEMPLATES["mistral"].replace("is defined", "is none"), "in a form that is not known"),
    ],
)
def test_templates_without_a_known_form(template: str, error: str) -> None:
    tokenizer = tool_tokenizer("qwen")
    tokenizer.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=error):
        ToolCallFormat.from_template(ChatTemplate(tokenizer))


def test_json_objects() -> None:
    good = [
        "{}",
        '{"a": 1}',
        '{ "a" : [1, -2.5e3, {"b": null}], "c":{"d": ["\\n\\"", true]}}',
        '{"a": {"b": {"c": 1}}}',
    ]
    bad = ["", "[]", "{,}", '{"a"}', '{"a": 01}', '{"a": 1,}', "{'a': 1}", '{"a": 1} x', '{"a": "\n"}', '{"a": 1. }']
    pattern = re.compile(json_object_regex())
    assert [text for text in good if not pattern.fullmatch(text)] == []
    assert [text for text in bad if pattern.fullmatch(text)] == []
    for text in good:
        json.loads(text)
