"""Requests as OpenAI's clients and editors send them, on a running server."""

import json
import re
from typing import Any

import httpx
import openai
import pytest

from tests.serving.models import tiny_models

MODELS = ["infiller", "left-to-right"]
USER = {"role": "user", "content": "Is the cat done?"}


def post(server: str, path: str, **body: Any) -> dict[str, Any]:
    """The JSON of a response."""
    model = {"model": "left-to-right", "temperature": 0}
    return httpx.post(f"{server}/v1/{path}", json=model | body, timeout=60).json()


def complete(server: str, **body: Any) -> dict[str, Any]:
    """The first choice of a completion, with the usage."""
    answer = post(server, "completions", **({"prompt": "The cat", "max_tokens": 12} | body))
    return answer["choices"][0] | {"usage": answer["usage"]}


def chat(server: str, *messages: dict[str, Any], **body: Any) -> dict[str, Any]:
    """The first choice of a chat."""
    return post(server, "chat/completions", **({"messages": messages or [USER], "max_tokens": 12} | body))["choices"][0]


def error(server: str, path: str, **body: Any) -> str:
    """The message of an error."""
    return post(server, path, **body)["error"]["message"]


# B13, B14
@pytest.mark.parametrize("name", MODELS)
def test_echo_gives_the_log_probabilities_of_the_prompt(server: str, name: str) -> None:
    """They are those of /v1/score, and the first is null. Generated tokens follow; with max_tokens 0 there are none."""
    lm = tiny_models()[name]
    text = "The cat sat on é mat"
    prompt = [lm.tokenizer.start_token_id, *lm.tokenizer.encode(text)]
    body = {"model": name, "prompt": prompt, "echo": True, "logprobs": 2, "seed": 1}
    alone, more = complete(server, **body, max_tokens=0), complete(server, **body, max_tokens=1)
    exact = httpx.post(f"{server}/v1/score", json={"model": name, "text": text, "measure": "exact"}).json()
    log_probs = alone["logprobs"]["token_logprobs"]
    assert log_probs[0] is None and alone["logprobs"]["top_logprobs"][0] is None
    assert log_probs[1:] == pytest.approx([token["logprob"] for token in exact["tokens"]], abs=1e-4)
    assert alone["text"] == text and alone["finish_reason"] == "length"
    assert alone["usage"]["prompt_tokens"] == len(prompt) == len(log_probs)
    assert alone["usage"]["completion_tokens"] == 0
    assert more["logprobs"]["token_logprobs"][: len(prompt)] == log_probs and len(
        more["logprobs"]["tokens"]
    ) == 1 + len(prompt)
    assert more["text"].startswith(text)
    check_tokens(more["text"], more["logprobs"])
    for log_prob, top in zip(log_probs[1:], alone["logprobs"]["top_logprobs"][1:], strict=True):
        assert len(top) == 2 and log_prob <= max(top.values())


@pytest.mark.parametrize("name", MODELS)
def test_echo_of_a_prompt_of_one_token(server: str, name: str) -> None:
    logprobs = complete(server, model=name, prompt="", echo=True, logprobs=1, max_tokens=0)["logprobs"]
    assert logprobs["token_logprobs"] == logprobs["top_logprobs"] == [None]


def test_fields_override_a_preset(server: str) -> None:
    assert complete(server, preset="fast", steps=4) == complete(server, steps=4)


def check_tokens(text: str, logprobs: dict[str, Any]) -> None:
    """The tokens of a completion are its text, and each stands at its offset."""
    escaped = [
        token.encode() if not token.startswith("bytes:") else escaped_bytes(token) for token in logprobs["tokens"]
    ]
    assert b"".join(escaped).decode(errors="replace") == text
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)


def escaped_bytes(token: str) -> bytes:
    return bytes(int(digits, 16) for digits in re.findall(r"\\x([0-9a-f]{2})", token))


def test_echo_of_several_prompts_and_copies(server: str) -> None:
    body = {"prompt": ["The cat", "A dog is so"], "n": 2, "echo": True, "logprobs": 0}
    whole = post(server, "completions", **body, max_tokens=3)
    alone = post(server, "completions", **body, max_tokens=0)
    assert [choice["text"] for choice in alone["choices"]] == ["The cat", "The cat", "A dog is so", "A dog is so"]
    for longer, shorter in zip(whole["choices"], alone["choices"], strict=True):
        known = shorter["logprobs"]["token_logprobs"]
        assert longer["logprobs"]["token_logprobs"][1 : len(known)] == pytest.approx(known[1:], abs=1e-4)
        check_tokens(longer["text"], longer["logprobs"])
    assert post(server, "completions", prompt="The cat", max_tokens=0)["choices"][0]["text"] == ""


# B15, B19
def test_nulls_are_left_out_and_harmless_fields_accepted(server: str) -> None:
    names = ["top_p", "n", "stream", "presence_penalty", "frequency_penalty", "stop", "seed", "user", "logit_bias"]
    nulls: dict[str, Any] = dict.fromkeys(names)
    assert complete(server, **nulls, echo=None, suffix=None, best_of=None)["text"] == complete(server)["text"]
    plain = chat(server)["message"]
    assert chat(server, **nulls, tools=None, tool_choice=None, functions=None, audio=None)["message"] == plain
    harmless = {
        "reasoning_effort": "low", "verbosity": "low", "modalities": ["text"], "safety_identifier": "x",
        "prompt_cache_key": "x", "parallel_tool_calls": False, "tools": [], "tool_choice": "auto", "store": False,
        "prediction": {"type": "content", "content": "x"}, "service_tier": "auto", "metadata": {"a": "b"},
        "response_format": {"type": "text"}, "stream_options": {"include_obfuscation": False},
    }  # fmt: skip
    assert chat(server, **harmless)["message"] == plain
    assert post(server, "completions", prompt="x", temperature=None)["object"] == "text_completion"


def test_fields_that_would_change_the_answer_are_refused(server: str) -> None:
    body = {"messages": [USER]}
    assert error(server, "chat/completions", **body, treshold=None).startswith('"treshold" is not known; did you mean')
    assert (
        error(server, "chat/completions", **body, audio={})
        == '"audio" is not supported; this server takes and gives text'
    )
    assert error(server, "chat/completions", **body, **{"a-b": 1}).startswith('"a-b" is not known')
    assert "send tools" in error(server, "chat/completions", **body, functions=[{"name": "f"}])
    assert "modalities.0" in error(server, "chat/completions", **body, modalities=["audio"])
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    assert "leave out parts" in error(server, "chat/completions", messages=[USER | {"content": [part]}])
    assert error(server, "chat/completions", messages=[USER | {"content": None}]).endswith("user has no content")


# B16
@pytest.mark.parametrize("name", MODELS)
def test_json_objects(server: str, name: str) -> None:
    body = {"model": name, "response_format": {"type": "json_object"}, "temperature": 1.0, "seed": 3, "max_tokens": 12}
    answer = post(server, "chat/completions", messages=[USER], n=3, **body)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert all(isinstance(json.loads(text), dict) for text in texts) and len(set(texts)) > 1


# B20
@pytest.mark.parametrize("name", MODELS)
def test_an_assistants_message_at_the_end_is_continued(server: str, name: str) -> None:
    lm = tiny_models()[name]
    messages = [USER, {"role": "assistant", "content": "The quick"}]
    ids = lm.chat_template.prompt([USER])
    assert lm.chat_template.prompt(messages) == [*ids, *lm.tokenizer.encode(" The quick", continues=True)]
    answer = chat(server, *messages, model=name)["message"]
    assert answer["content"].strip() == lm.chat(messages, 12).text
    assert answer["content"] != chat(server, model=name)["message"]["content"]


# B21
@pytest.mark.parametrize("name", MODELS)
def test_copies_share_their_prompt(server: str, name: str) -> None:
    usages = [complete(server, model=name, n=n)["usage"]["prompt_tokens"] for n in (1, 3)]
    assert usages[0] == usages[1] > 0
    two = post(server, "completions", model=name, prompt=["The cat", "The cat"], n=2, max_tokens=2)
    assert two["usage"]["prompt_tokens"] == 2 * usages[0]


# B22
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_everything_ends_with_the_token_that_completes_a_stop(server: str, name: str, length: int) -> None:
    free = complete(server, model=name, logprobs=1, seed=7, temperature=1, max_tokens=16)
    at = next(n for n in range(5, len(free["text"])) if "\ufffd" not in free["text"][n : n + length])
    stop = free["text"][at : at + length]
    answer = complete(server, model=name, logprobs=1, seed=7, temperature=1, max_tokens=16, stop=stop)
    assert answer["text"] == free["text"][: free["text"].index(stop)] and answer["finish_reason"] == "stop"
    tokens = answer["logprobs"]["tokens"]
    assert tokens == free["logprobs"]["tokens"][: len(tokens)]
    joined = [join(tokens[:n]) for n in (len(tokens), len(tokens) - 1)]
    assert stop in joined[0] and stop not in joined[1]
    assert answer["usage"]["completion_tokens"] == len(tokens)


def join(tokens: list[str]) -> str:
    data = [escaped_bytes(token) if token.startswith("bytes:") else token.encode() for token in tokens]
    return b"".join(data).decode(errors="replace")


# B23
def test_parts_of_a_content_are_joined_by_line_breaks(server: str) -> None:
    parts = [{"type": "text", "text": "Is the cat"}, {"type": "text", "text": "done?"}]
    joined = chat(server, USER | {"content": "Is the cat\ndone?"})["message"]
    assert chat(server, USER | {"content": parts})["message"] == joined != chat(server)["message"]


# B24
def test_the_bytes_of_tokens(server: str) -> None:
    """Also of tokens that are a part of a character; joined they are the text."""
    message = chat(server, regex="é{2}", logprobs=True, top_logprobs=2, max_tokens=8)
    assert message["message"]["content"] == "éé"
    records = message["logprobs"]["content"]
    assert [record["bytes"] for record in records] == [[0xC3], [0xA9]] * 2
    assert records[0]["token"] == "bytes:\\xc3"
    logprobs = complete(server, regex="é{2}", logprobs=2, max_tokens=8)["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"] * 2 and logprobs["text_offset"] == [0, 0, 1, 1]


# B25, B26, B27
def test_fim_as_editors_send_it(server: str) -> None:
    body = {
        "model": "infiller", "prompt": "x = 5  # five\n" * 20 + "return ", "suffix": "\n", "max_tokens": 2048,
        "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "stop": [f"stop {n}" for n in range(19)],
        "random_seed": 3, "min_tokens": None, "stream": False,
    }  # fmt: skip
    answer = post(server, "fim/completions", **body)
    assert answer["object"] == "chat.completion" and answer["choices"][0]["message"]["content"]
    assert answer["usage"]["total_tokens"] <= 320
    seeds = [body | {"random_seed": 4}, body | {"random_seed": None, "seed": 4}]
    texts = [post(server, "fim/completions", **each | {"max_tokens": 6, "temperature": 1}) for each in seeds]
    assert texts[0]["choices"] == texts[1]["choices"]


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([""], "stop: a stop string has 0 characters; it needs 1 to 1000"),
        ("", "stop: a stop string has 0 characters; it needs 1 to 1000"),
        (["x"] * 65, "stop: 65 stop strings exceed the limit of 64"),
        (5, "stop: Input should be a valid string"),
    ],
)
def test_stops_out_of_bounds(server: str, stop: Any, message: str) -> None:
    for path in ("completions", "fim/completions"):
        assert error(server, path, prompt="x", stop=stop) == message


@pytest.mark.parametrize("prompt", ["x", [1]], ids=str)
def test_too_many_prompts(server: str, prompt: Any) -> None:
    message = "body: 129 prompts with n=1 exceed the limit of 128 texts"
    assert error(server, "completions", prompt=[prompt] * 129) == message


# B28
@pytest.mark.parametrize(
    ("content_type", "content", "message"),
    [
        (
            "text/plain",
            '{"model": "infiller"}',
            'the request has the Content-Type "text/plain"; send JSON as application/json',
        ),
        (
            "application/json",
            "{",
            "the body is not valid JSON: Expecting property name enclosed in double quotes at character 1",
        ),
        ("application/json", "[]", "body: Input should be a valid dictionary or object to extract fields from"),
    ],
)
def test_bodies_that_are_no_json(server: str, content_type: str, content: str, message: str) -> None:
    """JSON of another type is not read, because web pages may send such requests to any server without asking it."""
    answer = httpx.post(f"{server}/v1/completions", content=content, headers={"Content-Type": content_type})
    assert answer.status_code == 400 and answer.json()["error"]["message"] == message


# B29
@pytest.mark.parametrize("name", MODELS)
def test_requests_beyond_the_context_are_cut_to_it(server: str, name: str) -> None:
    prompts = [[5] * 310, [5] * 315]
    answer = post(server, "completions", model=name, prompt=prompts, max_tokens=9999, logit_bias={"0": -100})
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["usage"]["completion_tokens"] == 15
    long = USER | {"content": "x" * 280}
    answer = chat(server, long, model=name, max_tokens=9999, logit_bias={"0": -100, "1": -100}, logprobs=True)
    used = len(tiny_models()[name].chat_template.prompt([long]))
    assert answer["finish_reason"] == "length" and len(answer["logprobs"]["content"]) == 320 - used
    assert "the model's context is 320; shorten the prompt" in error(
        server, "completions", model=name, prompt=[5] * 320
    )


def test_the_openai_client_sends_what_it_documents(server: str) -> None:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="left-to-right", messages=[{"role": "user", "content": "So?"}], max_completion_tokens=8,
            temperature=None, reasoning_effort="minimal", verbosity="low", modalities=["text"],
            response_format={"type": "json_object"},
        )  # fmt: skip
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
