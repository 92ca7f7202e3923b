"""Clients that others wrote for OpenAI's API, on a running server: LangChain, LiteLLM and the evaluation harness."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusify.evaluation.harness import DiffusifyLM
from diffusify.models.saving import save_denoiser
from diffusify.serving.api.app import create_app
from tests.serving.models import running, tiny_lm, tiny_models
from tests.text.tool_templates import tool_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def event_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An event loop for clients that would create one and not close it. LiteLLM reads its prices from the package."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    caller = tiny_lm(infills=False, context=2048, tokenizer=tool_tokenizer("qwen"))
    with running(create_app(tiny_models() | {"caller": caller})) as address:
        yield f"{address}/v1"


def test_langchain(address: str) -> None:
    """Answers, streams, calls of a tool, and structured output."""
    langchain_openai = pytest.importorskip("langchain_openai")

    def connect(model: str, **settings: Any) -> Any:
        return langchain_openai.ChatOpenAI(
            model=model, base_url=address, api_key="none", temperature=0, max_retries=0, max_tokens=48, **settings
        )

    alone = tiny_models()["left-to-right"].chat([{"role": "user", "content": "Is it so?"}], 48).text
    assert connect("left-to-right").invoke("Is it so?").content == alone
    assert "".join(chunk.content for chunk in connect("left-to-right").stream("Is it so?")) == alone
    assert connect("left-to-right", use_responses_api=True).invoke("Is it so?").text == alone
    schema = {
        "title": "cat", "description": "A cat", "type": "object", "properties": {"big": {"type": "boolean"}},
        "required": ["big"],
    }  # fmt: skip
    for method in ("function_calling", "json_schema"):
        found = connect("caller").with_structured_output(schema, method=method).invoke("A cat?")
        assert list(found) == ["big"] and isinstance(found["big"], bool)


def test_litellm(address: str) -> None:
    """Answers and streams of chats, completions, and calls of a tool."""
    litellm = pytest.importorskip("litellm")
    common = {"api_base": address, "api_key": "none", "temperature": 0, "max_tokens": 24}
    chat = {"model": "openai/left-to-right", "messages": [{"role": "user", "content": "Is it so?"}]}
    alone = tiny_models()["left-to-right"]
    text = alone.chat(chat["messages"], 24).text  # type: ignore[arg-type]
    assert litellm.completion(**chat, **common).choices[0].message.content == text
    chunks = litellm.completion(**chat, **common, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    written = litellm.text_completion(model="text-completion-openai/left-to-right", prompt="The cat", **common)
    assert written.choices[0].text == alone.generate("The cat", 24).completion
    tool = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
    chat |= {"model": "openai/caller", "tools": [tool], "tool_choice": "required"}
    calls = litellm.completion(**chat, **common | {"max_tokens": 60}).choices[0].message.tool_calls
    assert all(call.function.name == "time" and json.loads(call.function.arguments) == {} for call in calls)


def test_the_harness_measures_the_same_through_the_server(tmp_path: Path) -> None:
    """`local-completions` and `--model diffusify` give the same log-likelihoods and greedy flags."""
    api: Any = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    lm = tiny_lm(infills=False)
    folder = tmp_path / "block"
    save_denoiser(folder, lm.denoiser, lm.tokenizer.tokenizer)
    items = [
        ("The quick brown fox jumps over", [" the lazy dog", " a cat", " it"]),
        ("The cat sat on", [" the mat", " done: 5", " é"]),
        ("Is it so", [" It is!", " no", " 0 1 2 3"]),
    ]
    requests: list[Any] = [
        Instance("loglikelihood", {}, (question, answer), n)
        for n, (question, answers) in enumerate(items)
        for answer in answers
    ]
    greedy = lm.generate("The cat sat on", 3, tolerance=0.0).completion
    requests.append(Instance("loglikelihood", {}, ("The cat sat on", greedy), 9))
    direct = DiffusifyLM(str(folder)).loglikelihood(requests, disable_tqdm=True)
    with running(create_app({"block": lm})) as address:
        client = api.LocalCompletionsAPI(
            model="block", base_url=f"{address}/v1/completions", tokenizer=str(folder), max_length=320, batch_size=2,
            tokenizer_backend="huggingface",
        )  # fmt: skip
        served = client.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in served] == pytest.approx([value for value, _ in direct], abs=1e-4)
    assert [greedy for _, greedy in served] == [greedy for _, greedy in direct]
