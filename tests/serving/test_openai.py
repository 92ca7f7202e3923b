"""The real `openai` client, against a real server."""

import json
import re
from collections.abc import Iterator

import httpx
import jsonschema
import openai
import pytest

from tests.serving.models import tiny_models

MODELS = ["infiller", "left-to-right"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "big": {"type": "boolean"}},
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
def test_completions_are_what_the_model_writes(client: openai.OpenAI, name: str) -> None:
    told = client.completions.create(model=name, prompt=["The cat", "A dog is"], max_tokens=24, temperature=0.0)
    alone = [tiny_models()[name].generate(prompt, 24) for prompt in ("The cat", "A dog is")]
    assert [choice.text for choice in told.choices] == [written.completion for written in alone]
    assert [choice.index for choice in told.choices] == [0, 1]
    assert told.usage is not None and told.usage.completion_tokens == sum(written.tokens for written in alone)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("more", [{}, {"n": 3}, {"echo": True}, {"extra_body": {"threshold": 0.2}}])
def test_streams_add_up_to_the_whole(client: openai.OpenAI, name: str, more: dict) -> None:
    asked = {"model": name, "prompt": "The cat", "max_tokens": 24, "seed": 7} | more
    whole, parts = client.completions.create(**asked), {}
    reasons = {}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + choice.text
            reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert [parts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    assert [reasons[choice.index] for choice in whole.choices] == [choice.finish_reason for choice in whole.choices]
    if "n" in more:
        assert len({choice.text for choice in whole.choices}) == 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 3])
def test_stops(client: openai.OpenAI, name: str, length: int) -> None:
    """A text ends before its stop, streamed or not, and no part of the stop is ever sent."""
    asked = {"model": name, "prompt": "The cat", "max_tokens": 24, "seed": 7}
    free = client.completions.create(**asked).choices[0].text
    stop = free[len(free) // 2 :][:length]
    told = client.completions.create(**asked, stop=["never to be seen", stop]).choices[0]
    assert (told.text, told.finish_reason) == (free[: free.index(stop)], "stop")
    chunks = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == told.text


def test_seeds(client: openai.OpenAI) -> None:
    def write(**more) -> str:
        asked = {"model": "left-to-right", "prompt": "The cat", "max_tokens": 20} | more
        return client.completions.create(**asked).choices[0].text

    assert write(seed=5) == write(seed=5) != write(seed=6)
    assert len({write() for _ in range(3)}) > 1


def test_a_suffix_is_meant(client: openai.OpenAI) -> None:
    """What is written depends on what stands behind it, and fits between."""

    def between(suffix: str) -> str:
        told = client.completions.create(
            model="infiller", prompt="The cat sat ", suffix=suffix, max_tokens=6, temperature=0
        )
        return told.choices[0].text

    assert between("on the mat.") != between("in 5 4 3 2 1") != ""
    with pytest.raises(openai.BadRequestError, match="without seeing the text behind it"):
        client.completions.create(model="left-to-right", prompt="The", suffix="end")


def test_fim_for_editors(server: str) -> None:
    asked = {"model": "infiller", "prompt": "The cat [[", "suffix": " mat", "max_tokens": 5, "temperature": 0}
    told = httpx.post(f"{server}/v1/fim/completions", json=asked).json()
    assert told["choices"][0]["message"]["content"] and told["object"] == "chat.completion"
    assert httpx.post(f"{server}/v1/fim/completions", json=asked | {"suffix": ""}).status_code == 200


@pytest.mark.parametrize("name", MODELS)
def test_chats(client: openai.OpenAI, name: str) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Is the cat done?"}]
    asked = {"model": name, "messages": messages, "max_completion_tokens": 20, "temperature": 0.0, "seed": 1}
    told = client.chat.completions.create(**asked)
    alone = tiny_models()[name].chat([{"role": "system", "content": "Be brief."}, messages[1]], 20)
    assert told.choices[0].message.content == alone.text
    assert told.choices[0].message.role == "assistant"
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.delta.content or "" for part in parts for c in part.choices) == alone.text
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].usage == told.usage


def test_log_probabilities(client: openai.OpenAI) -> None:
    """The likeliest token has the probability that it was written with; streamed or not, columns or not."""
    asked = {"model": "left-to-right", "prompt": "The", "max_tokens": 8, "temperature": 0}
    told = client.completions.create(**asked, logprobs=3).choices[0].logprobs
    assert told is not None and told.tokens and told.top_logprobs and told.token_logprobs and told.text_offset
    for token, sure, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) <= 3 and max(top.values()) == pytest.approx(sure, abs=1e-3) and token in top
    chat = client.chat.completions.create(
        model="infiller", messages=[{"role": "user", "content": "So?"}], max_tokens=8, logprobs=True, top_logprobs=2
    )
    record = chat.choices[0].logprobs
    assert record is not None and record.content and all(len(one.top_logprobs) == 2 for one in record.content)
    lossless = client.completions.create(**asked, logprobs=0, extra_body={"tolerance": 0.0}).choices[0].logprobs
    assert lossless is not None and lossless.token_logprobs and max(lossless.token_logprobs) <= 0
    with pytest.raises(openai.BadRequestError, match="tells no alternatives"):
        client.completions.create(**asked, logprobs=2, extra_body={"tolerance": 0.0})


def test_biases_and_penalties(client: openai.OpenAI) -> None:
    asked = {"model": "left-to-right", "prompt": "The", "max_tokens": 12, "temperature": 0}
    plain = client.completions.create(**asked, logprobs=0).choices[0]
    assert plain.logprobs and plain.logprobs.tokens
    tokenizer = tiny_models()["left-to-right"].tokenizer
    banned = str(tokenizer.encode(plain.logprobs.tokens[0], continues=True)[0])
    other = client.completions.create(**asked, logprobs=0, logit_bias={banned: -100}).choices[0]
    assert other.logprobs and other.logprobs.tokens and plain.logprobs.tokens[0] not in other.logprobs.tokens
    varied = client.completions.create(**asked, logprobs=0, presence_penalty=2, frequency_penalty=2).choices[0]
    assert varied.logprobs and varied.logprobs.tokens
    assert len(set(varied.logprobs.tokens)) >= len(set(plain.logprobs.tokens))


@pytest.mark.parametrize("name", MODELS)
def test_json_of_a_schema(client: openai.OpenAI, name: str) -> None:
    for seed in range(4):
        told = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "A cat?"}],
            max_tokens=64,
            seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "cat", "schema": SCHEMA}},
        )
        jsonschema.validate(json.loads(told.choices[0].message.content or ""), SCHEMA)
    told = client.completions.create(model=name, prompt="On ", max_tokens=16, extra_body={"regex": "[0-9]{2}-[0-9]{2}"})
    assert re.fullmatch("[0-9]{2}-[0-9]{2}", told.choices[0].text)


@pytest.mark.parametrize(
    ("more", "kind", "complaint"),
    [
        ({"model": "infillr"}, openai.NotFoundError, 'did you mean "infiller"'),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 9999}, openai.BadRequestError, "the model can see 320"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"prompt": [400]}, openai.BadRequestError, "token 400 is beyond the 320"),
        ({"extra_body": {"treshold": 1}}, openai.BadRequestError, 'did you mean "threshold"'),
        ({"extra_body": {"threshold": 0.5, "tolerance": 0}}, openai.BadRequestError, "leave out threshold"),
        ({"extra_body": {"policy": "Unmsk"}}, openai.BadRequestError, "policy"),
        ({"extra_body": {"regex": "("}}, openai.BadRequestError, "cannot be followed"),
        ({"best_of": 2}, openai.BadRequestError, "best_of"),
        ({"n": 129}, openai.BadRequestError, "n:"),
        ({"prompt": "x" * 90_000}, openai.BadRequestError, "more than the 320 tokens"),
    ],
)
def test_errors_say_what_is_wrong(client: openai.OpenAI, more: dict, kind: type, complaint: str) -> None:
    with pytest.raises(kind, match=re.escape(complaint)):
        client.completions.create(**({"model": "infiller", "prompt": "The", "max_tokens": 4} | more))
    with pytest.raises(kind, match=re.escape(complaint)):
        list(
            client.completions.create(
                **({"model": "infiller", "prompt": "The", "max_tokens": 4, "stream": True} | more)
            )
        )
