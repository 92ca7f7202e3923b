"""The `openai` client against a running server."""

import json
import re
from collections.abc import Iterator

import httpx
import jsonschema
import openai
import pytest

from diffusify.serving.api.app import create_app
from diffusify.serving.api.responses import sse_event
from tests.serving.models import running, tiny_lm, tiny_models

MODELS = ["infiller", "left-to-right"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 2}, "big": {"type": "boolean"}},
    "required": ["name", "big"],
}


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == MODELS
    assert client.models.retrieve("infiller").object == "model"


@pytest.mark.parametrize("name", MODELS)
def test_completions_are_those_of_the_model(client: openai.OpenAI, name: str) -> None:
    answer = client.completions.create(model=name, prompt=["The cat", "A dog is"], max_tokens=16, temperature=0.0)
    alone = [tiny_models()[name].generate(prompt, 16) for prompt in ("The cat", "A dog is")]
    assert [choice.text for choice in answer.choices] == [generation.completion for generation in alone]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None and answer.usage.completion_tokens == sum(generation.tokens for generation in alone)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("more", [{}, {"n": 3}, {"echo": True}, {"extra_body": {"threshold": 0.2}}])
def test_streams_add_up_to_the_whole(client: openai.OpenAI, name: str, more: dict) -> None:
    body = {"model": name, "prompt": "The cat", "max_tokens": 16, "seed": 7} | more
    whole, deltas = client.completions.create(**body), {}
    reasons = {}
    for chunk in client.completions.create(**body, stream=True):
        for choice in chunk.choices:
            deltas[choice.index] = deltas.get(choice.index, "") + choice.text
            reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert [deltas[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [reasons[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    if "n" in more:
        assert len({choice.text for choice in whole.choices}) == 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 3])
def test_stops(client: openai.OpenAI, name: str, length: int) -> None:
    """A text ends before its stop string, streamed or not, and no part of that string is sent."""
    body = {"model": name, "prompt": "The cat", "max_tokens": 16, "seed": 7}
    free = client.completions.create(**body).choices[0].text
    stop = free[len(free) // 2 :][:length]
    answer = client.completions.create(**body, stop=["not in the text", stop]).choices[0]
    assert (answer.text, answer.finish_reason) == (free[: free.index(stop)], "stop")
    chunks = list(client.completions.create(**body, stop=stop, stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == answer.text


def test_seeds(client: openai.OpenAI) -> None:
    def complete(**more) -> str:
        body = {"model": "left-to-right", "prompt": "The cat", "max_tokens": 12} | more
        return client.completions.create(**body).choices[0].text

    assert complete(seed=5) == complete(seed=5) != complete(seed=6)
    assert len({complete() for _ in range(3)}) > 1


def test_a_suffix_conditions_the_completion(client: openai.OpenAI) -> None:
    """The completion depends on the suffix."""

    def fill(suffix: str) -> str:
        answer = client.completions.create(
            model="infiller", prompt="The cat sat ", suffix=suffix, max_tokens=6, temperature=0
        )
        return answer.choices[0].text

    assert fill("on the mat.") != fill("in 5 4 3 2 1") != ""
    with pytest.raises(openai.BadRequestError, match="does not attend to the text after a masked span"):
        client.completions.create(model="left-to-right", prompt="The", suffix="end")


def test_a_space_before_a_span_is_that_of_its_own_prompt(server: str) -> None:
    body = {"model": "infiller", "prompt": ["The cat ", "The cat"], "suffix": " mat", "regex": " [a-z]{2}"}
    choices = httpx.post(f"{server}/v1/completions", json=body | {"max_tokens": 3}).json()["choices"]
    assert [len(choice["text"]) for choice in choices] == [2, 3]


def test_a_model_of_the_hub_is_described_alike_before_and_after_a_chat() -> None:
    with running(create_app({"org/name": tiny_lm(infills=False)})) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            before = client.models.retrieve("org/name")
            client.chat.completions.create(model="org/name", messages=[{"role": "user", "content": "x"}], max_tokens=2)
            assert client.models.retrieve("org/name") == before
        listed = [httpx.get(f"{address}/v1/models{slash}", follow_redirects=True).json() for slash in ("", "/")]
    assert before.to_dict()["diffusion"]["chats"] is False  # pyright: ignore[reportIndexIssue]
    assert listed[0] == listed[1] == {"object": "list", "data": [before.to_dict()]}


def test_an_event_is_one_line_for_every_client() -> None:
    """Some split lines at more characters than the standard of server-sent events names."""
    data = {"text": "a\u2028b\u2029c\x85d\ne"}
    event = sse_event("x", data).splitlines()
    assert event[0] == "event: x" and json.loads(event[1].removeprefix("data: ")) == data and len(event) == 3


def test_fim_for_editors(server: str) -> None:
    body = {"model": "infiller", "prompt": "The cat [[", "suffix": " mat", "max_tokens": 5, "temperature": 0}
    answer = httpx.post(f"{server}/v1/fim/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] and answer["object"] == "chat.completion"
    assert httpx.post(f"{server}/v1/fim/completions", json=body | {"suffix": ""}).status_code == 200


@pytest.mark.parametrize("name", MODELS)
def test_chats(client: openai.OpenAI, name: str) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Is the cat done?"}]
    body = {"model": name, "messages": messages, "max_completion_tokens": 20, "temperature": 0.0, "seed": 1}
    answer = client.chat.completions.create(**body)
    alone = tiny_models()[name].chat([{"role": "system", "content": "Be brief."}, messages[1]], 20)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == alone.text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == answer.usage


def test_log_probabilities(client: openai.OpenAI) -> None:
    """The most likely token has the log-probability with which it was generated, in both formats."""
    body = {"model": "left-to-right", "prompt": "The", "max_tokens": 8, "temperature": 0}
    answer = client.completions.create(**body, logprobs=3).choices[0].logprobs
    assert answer is not None and answer.tokens and answer.top_logprobs and answer.token_logprobs and answer.text_offset
    for token, log_prob, top in zip(answer.tokens, answer.token_logprobs, answer.top_logprobs, strict=True):
        assert len(top) <= 3 and max(top.values()) == pytest.approx(log_prob, abs=1e-3) and token in top
    chat = client.chat.completions.create(
        model="infiller", messages=[{"role": "user", "content": "So?"}], max_tokens=8, logprobs=True, top_logprobs=2
    )
    record = chat.choices[0].logprobs
    assert record is not None and record.content and all(len(one.top_logprobs) == 2 for one in record.content)
    lossless = client.completions.create(**body, logprobs=3, extra_body={"tolerance": 0.0}).choices[0].logprobs
    assert lossless is not None and (lossless.tokens, lossless.token_logprobs) == (answer.tokens, answer.token_logprobs)
    assert lossless.top_logprobs == answer.top_logprobs


def test_biases_and_penalties(client: openai.OpenAI) -> None:
    body = {"model": "left-to-right", "prompt": "The", "max_tokens": 12, "temperature": 0}
    plain = client.completions.create(**body, logprobs=0).choices[0]
    assert plain.logprobs and plain.logprobs.tokens
    tokenizer = tiny_models()["left-to-right"].tokenizer
    banned = str(tokenizer.encode(plain.logprobs.tokens[0], continues=True)[0])
    other = client.completions.create(**body, logprobs=0, logit_bias={banned: -100}).choices[0]
    assert other.logprobs and other.logprobs.tokens and plain.logprobs.tokens[0] not in other.logprobs.tokens
    varied = client.completions.create(**body, logprobs=0, presence_penalty=2, frequency_penalty=2).choices[0]
    assert varied.logprobs and varied.logprobs.tokens
    assert len(set(varied.logprobs.tokens)) >= len(set(plain.logprobs.tokens))


@pytest.mark.parametrize("name", MODELS)
def test_json_of_a_schema(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": "A cat?"}],
        max_tokens=32,
        n=4,
        seed=0,
        response_format={"type": "json_schema", "json_schema": {"name": "cat", "schema": SCHEMA}},
    )
    assert len(answer.choices) == 4
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    answer = client.completions.create(
        model=name, prompt="On ", max_tokens=16, extra_body={"regex": "[0-9]{2}-[0-9]{2}"}
    )
    assert re.fullmatch("[0-9]{2}-[0-9]{2}", answer.choices[0].text)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"model": "infillr"}, openai.NotFoundError, 'did you mean "infiller"'),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"prompt": [400]}, openai.BadRequestError, "token 400 is outside the vocabulary of 320"),
        ({"extra_body": {"treshold": 1}}, openai.BadRequestError, 'did you mean "threshold"'),
        ({"extra_body": {"threshold": 0.5, "tolerance": 0}}, openai.BadRequestError, "leave out threshold"),
        ({"extra_body": {"policy": "Unmsk"}}, openai.BadRequestError, "policy"),
        ({"extra_body": {"regex": "("}}, openai.BadRequestError, "cannot be compiled"),
        ({"best_of": 2}, openai.BadRequestError, "best_of"),
        ({"n": 129}, openai.BadRequestError, "n:"),
        ({"prompt": "x" * 90_000}, openai.BadRequestError, "context length of 320 tokens"),
    ],
)
def test_errors_say_what_is_wrong(client: openai.OpenAI, more: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        client.completions.create(**({"model": "infiller", "prompt": "The", "max_tokens": 4} | more))
    with pytest.raises(error, match=re.escape(message)):
        list(
            client.completions.create(
                **({"model": "infiller", "prompt": "The", "max_tokens": 4, "stream": True} | more)
            )
        )
