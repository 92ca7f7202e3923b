"""OpenAI's responses with the `openai` client, beside the chat completions that they are."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving.models import tiny_models

USER: Any = {"role": "user", "content": "Is the cat done?"}
MODELS = ["infiller", "left-to-right"]


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("name", MODELS)
def test_a_response_is_the_answer_to_the_chat(client: Any, name: str) -> None:
    chat = [{"role": "system", "content": "Be brief."}, USER]
    alone = tiny_models()[name].chat(chat, 20).text
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": USER["content"]}]}]
    for given in (USER["content"], [USER], parts):
        answer = client.responses.create(
            model=name, input=given, instructions="Be brief.", max_output_tokens=20, temperature=0
        )
        assert answer.output_text == alone and answer.output[0].type == "message"
        assert answer.status in ("completed", "incomplete") and answer.usage
        assert answer.usage.input_tokens == len(tiny_models()[name].chat_template.prompt(chat))
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_adds_up_to_the_response(client: Any, name: str) -> None:
    body: dict[str, Any] = {"model": name, "input": "So?", "max_output_tokens": 12, "temperature": 0}
    whole, events = client.responses.create(**body), list(client.responses.create(**body, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text and last.response.usage == whole.usage
    with client.responses.stream(**body) as stream:  # the client's own bookkeeping accepts every event
        assert stream.get_final_response().output_text == whole.output_text if whole.status == "completed" else True


def test_a_response_that_is_cut(client: Any) -> None:
    answer = client.responses.create(
        model="left-to-right", input="So?", max_output_tokens=4, extra_body={"regex": "[0-9]{4,9}"}
    )
    assert answer.status == "incomplete" and answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens" and len(answer.output_text) == 4


def test_json_and_log_probabilities(client: Any) -> None:
    schema = {"type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"]}
    answer = client.responses.create(
        model="left-to-right", input="A cat?", max_output_tokens=32, include=["message.output_text.logprobs"],
        text={"format": {"type": "json_schema", "name": "cat", "schema": schema, "strict": True}, "verbosity": "low"},
    )  # fmt: skip
    assert set(json.loads(answer.output_text)) == {"big"}
    content: Any = answer.output[0].content[0]  # type: ignore[union-attr]
    assert b"".join(bytes(record.bytes) for record in content.logprobs).decode() == answer.output_text
    any_object = client.responses.create(
        model="left-to-right", input="A cat?", max_output_tokens=16, text={"format": {"type": "json_object"}}
    )
    assert isinstance(json.loads(any_object.output_text), dict)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"previous_response_id": "resp_1"}, "this server stores no responses; send the whole conversation as input"),
        ({"tools": [{"type": "web_search"}]}, "tools: "),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"extra_body": {"max_tokens": 5}}, '"max_tokens" is not known; did you mean "max_output_tokens"'),
    ],
)
def test_what_is_not_supported_is_refused(client: Any, body: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**({"model": "infiller", "input": "So?"} | body))
    assert message in caught.value.message


def test_harmless_fields_are_accepted(client: Any) -> None:
    body: dict[str, Any] = {"model": "left-to-right", "input": "So?", "max_output_tokens": 6, "temperature": 0}
    harmless: dict[str, Any] = {
        "reasoning": {"effort": "low"}, "store": True, "tools": [], "tool_choice": "auto", "top_p": None, "user": "x",
        "parallel_tool_calls": True, "metadata": {"a": "b"}, "previous_response_id": None, "service_tier": "auto",
    }  # fmt: skip
    assert client.responses.create(**body, **harmless).output_text == client.responses.create(**body).output_text
