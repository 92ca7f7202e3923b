"""Tools on a running server: calls in the form of each chat template, with arguments that follow their schema."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from diffusify.serving.api.app import create_app
from tests.serving.models import running, tiny_lm
from tests.text.tool_templates import TEMPLATES, TIME, WEATHER, tool_tokenizer

SCHEMA = WEATHER["function"]["parameters"]
USER = {"role": "user", "content": "What is the weather?"}
SIGNS = {"qwen": "<tool_call>", "llama3": "{", "mistral": "[TOOL_CALLS]"}


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    models = {style: tiny_lm(infills=False, context=2048, tokenizer=tool_tokenizer(style)) for style in TEMPLATES}
    models |= {
        "plain": tiny_lm(infills=False),
        "infiller": tiny_lm(infills=True, context=2048, tokenizer=tool_tokenizer("qwen")),
    }
    with (
        running(create_app(models)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def create(client: Any, model: str, *messages: dict[str, Any], **body: Any) -> Any:
    defaults = {"messages": messages or [USER], "max_tokens": 96, "seed": 1, "tools": [WEATHER, TIME]}
    return client.chat.completions.create(model=model, **(defaults | body))


def check(call: Any) -> None:
    """The arguments follow the schema of their function."""
    assert call.type == "function" and len(call.id) == 9
    schema = {"get_weather": SCHEMA, "time": TIME["function"]["parameters"]}[call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), schema)


# B17
@pytest.mark.parametrize("model", [*TEMPLATES, "infiller"])
def test_a_required_call(client: Any, model: str) -> None:
    length = 96 if model == "mistral" else 64
    answer = create(client, model, tool_choice="required", n=1 if model == "infiller" else 2, max_tokens=length)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert choice.message.tool_calls
        for call in choice.message.tool_calls:
            check(call)
    assert answer.usage.completion_tokens > 0
    named = {"type": "function", "function": {"name": "get_weather"}}
    one = {"tool_choice": named, "parallel_tool_calls": False, "max_tokens": length}
    (call,) = create(client, model, **one).choices[0].message.tool_calls
    check(call)
    assert call.function.name == "get_weather"


def biased(style: str) -> dict[str, float]:
    """A bias with which an answer begins with the sign of a call."""
    tokenizer = tool_tokenizer(style).tokenizer
    return {str(tokenizer.convert_tokens_to_ids(SIGNS[style])): 100.0}


@pytest.mark.parametrize("style", TEMPLATES)
def test_a_call_that_the_model_begins_itself(client: Any, style: str) -> None:
    """Its sign is followed by a call under the constraint, streamed or not."""
    body = {"logit_bias": biased(style), "parallel_tool_calls": False}
    answer = create(client, style, **body)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    check(call)
    chunks = list(create(client, style, **body, stream=True, stream_options={"include_usage": True}))
    deltas = [each.delta for chunk in chunks for each in chunk.choices]
    (streamed,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert streamed.function.model_dump() == call.function.model_dump()
    assert streamed.index == 0 and "".join(delta.content or "" for delta in deltas) == ""
    assert [each.finish_reason for chunk in chunks for each in chunk.choices][-1] == "tool_calls"
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens


def test_an_answer_without_a_call(client: Any) -> None:
    """The tools change the prompt, and nothing else; with tool_choice none not even that."""
    banned = {key: -100.0 for key in biased("qwen")}
    answer = create(client, "qwen", max_tokens=16, temperature=0, logit_bias=banned)
    assert answer.choices[0].message.tool_calls is None and answer.choices[0].message.content
    none = create(client, "qwen", max_tokens=16, temperature=0, logit_bias=banned, tool_choice="none")
    plain = create(client, "qwen", max_tokens=16, temperature=0, logit_bias=banned, tools=[])
    assert none.choices == plain.choices and none.usage == plain.usage != answer.usage


@pytest.mark.parametrize("style", ["mistral", "llama3"])
def test_several_calls_at_a_time(client: Any, style: str) -> None:
    """Never with Llama 3."""
    leftmost = {"policy": {"type": "Unmask", "rank": {"type": "Leftmost"}}}
    answer = create(
        client, style, tools=[TIME], tool_choice="required", max_tokens=120, n=4, extra_body=leftmost
    )  # fmt: skip
    calls = [choice.message.tool_calls for choice in answer.choices]
    for call in sum(calls, []):
        check(call)
    assert (max(map(len, calls)) > 1) == (style == "mistral")
    assert len({call.id for call in sum(calls, [])}) == len(sum(calls, []))


# B18
@pytest.mark.parametrize("style", TEMPLATES)
def test_a_chat_with_calls_and_results_goes_on(client: Any, style: str) -> None:
    """A content of null and an empty one are rendered alike, and the call and its result count."""
    message = create(client, style, tool_choice="required", parallel_tool_calls=False).choices[0].message
    call = message.model_dump(exclude_none=True)["tool_calls"][0]

    def go_on(content: str | None, result: str = "blue", call: dict[str, Any] = call) -> Any:
        asked = {"role": "assistant", "content": content, "tool_calls": [call]}
        told = {"role": "tool", "tool_call_id": call["id"], "content": result}
        return create(client, style, USER, asked, told, temperature=0, tool_choice="none", max_tokens=12, logprobs=True)

    answer = go_on(None)
    assert answer.choices == go_on("").choices and answer.usage.prompt_tokens == go_on("").usage.prompt_tokens
    assert answer.choices != go_on(None, "green").choices
    other = call | {
        "id": "call_0123456789abcdefghij",
        "function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'},
    }
    assert answer.usage.prompt_tokens != go_on(None, call=other).usage.prompt_tokens


@pytest.mark.parametrize(
    ("model", "body", "message"),
    [
        ("plain", {}, "the model's chat template does not take tools; leave out tools, or set tool_choice to none"),
        ("qwen", {"tools": [], "tool_choice": "required"}, "there are no tools"),
        ("qwen", {"tool_choice": {"type": "function", "function": {"name": "x"}}}, 'there is no function "x"'),
        ("qwen", {"response_format": {"type": "json_object"}}, "tools exclude regex and response_format"),
        ("qwen", {"tool_choice": "required", "max_tokens": 5}, "max_tokens=5 is too few for a tool call, which needs"),
        (
            "qwen",
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name: String should",
        ),
        ("qwen", {"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools.0.type: Input should be 'function'"),
        (
            "qwen",
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "array", "contains": {}}}}
                ]
            },
            "tools: the parameters of f: ",
        ),
    ],
)
def test_errors(client: Any, model: str, body: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, model, **body)
    assert message in caught.value.message
    if model == "plain":
        assert create(client, model, tool_choice="none", max_tokens=4).choices[0].message.content is not None
        call = {"id": "a", "type": "function", "function": {"name": "time", "arguments": "{}"}}
        with pytest.raises(openai.BadRequestError, match="leaves out tool calls"):
            create(client, model, USER, {"role": "assistant", "tool_calls": [call]}, USER, tools=[], max_tokens=4)


def test_a_call_that_does_not_fit_ends_by_length(client: Any) -> None:
    answer = create(client, "qwen", logit_bias=biased("qwen"), max_tokens=8)
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.tool_calls is None
