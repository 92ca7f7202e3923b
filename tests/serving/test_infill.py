"""Infilling, alternatives, scores, and the events of every step."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from diffusify.diffusion.attention import Bidirectional
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.serving.api.app import create_app
from diffusify.serving.api.infill import Alternatives, AlternativesBody
from tests.families import tiny_network
from tests.serving.models import running, tiny_lm, tiny_models

TEXT = "The [[3]] sat on [[2]] mat."


@pytest.fixture(scope="module")
def models() -> dict[str, DiffusionLM]:
    return tiny_models()


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server}/v1", timeout=60) as client:
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: httpx.Client, path: str, **body: Any) -> list[tuple[str, Any]]:
    """The names and data of a stream's events."""
    found, name = [], ""
    with client.stream("POST", path, json=body | {"stream": True, "denoise": True}) as stream:
        for line in stream.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                found.append((name, value if value == "[DONE]" else json.loads(value)))
            else:
                name = ""
    return found


def test_infilling_is_that_of_the_model(client: httpx.Client, models: dict[str, DiffusionLM]) -> None:
    choice = post(client, "infill", model="infiller", text=TEXT)["choices"][0]
    alone = models["infiller"].infill(TEXT)
    assert (choice["text"], tuple(choice["spans"])) == (alone.text, alone.spans)
    assert "".join(token["text"] for token in choice["tokens"] if "\ufffd" not in token["text"]) != ""
    assert [token["kind"] for token in choice["tokens"]].count("written") == 5
    assert all((token["confidence"] is None) == (token["kind"] == "given") for token in choice["tokens"])


def test_one_model_continues_in_blocks_and_infills() -> None:
    lm = tiny_lm(infills=False)
    lm.denoiser.diffusion_config = replace(lm.config, infilling=Bidirectional())
    with running(create_app({"both": lm})) as address, httpx.Client(base_url=f"{address}/v1", timeout=60) as client:
        for preset in ("balanced", "quality"):
            choice = post(client, "infill", model="both", text=TEXT, preset=preset)["choices"][0]
            alone = lm.prepare_infilling([TEXT], SamplingConfig.preset(preset, lm.config.infiller)).results()[0]
            assert choice["spans"] == list(alone.spans or ())
            body = {"model": "both", "prompt": "The cat", "max_tokens": 9, "preset": preset, "temperature": 0}
            text = post(client, "completions", **body)["choices"][0]["text"]
            config = SamplingConfig.preset(preset, lm.config)
            assert text == lm.prepare_generation(["The cat"], 9, config).results()[0].completion
        with_suffix = {"model": "both", "prompt": "The cat", "suffix": " mat", "max_tokens": 3, "preset": "balanced"}
        assert len(post(client, "completions", **with_suffix)["choices"]) == 1
        ids = [token["id"] for token in post(client, "tokenize", model="both", text="The cat sat")["tokens"]]
        assert len(post(client, "alternatives", model="both", tokens=ids, position=1, top=3)["alternatives"]) == 3


def test_the_most_confident_length_is_kept(client: httpx.Client, models: dict[str, DiffusionLM]) -> None:
    choice = post(client, "infill", model="infiller", text="The [[2-6]] mat.")["choices"][0]
    assert choice["spans"] == list(models["infiller"].infill("The [[2-6]] mat.").spans or ())
    assert 0 <= choice["candidate"] < 5


def test_returned_tokens_can_be_sent_again(client: httpx.Client) -> None:
    """With some of them replaced by null, the others stay."""
    tokens = post(client, "tokenize", model="infiller", text=TEXT)["tokens"]
    assert [token["id"] for token in tokens].count(None) == 5
    first = post(client, "infill", model="infiller", text=TEXT)["choices"][0]
    second = post(client, "infill", model="infiller", tokens=[token["id"] for token in tokens])["choices"][0]
    assert first["text"] == second["text"]
    ids = [token["id"] for token in first["tokens"]]
    again = post(client, "infill", model="infiller", tokens=[None if i == 1 else token for i, token in enumerate(ids)])
    kept = [token["id"] for token in again["choices"][0]["tokens"]]
    assert [a == b for a, b in zip(ids, kept, strict=True)].count(False) <= 1


def test_ar_models_continue_tokens(client: httpx.Client) -> None:
    ids = [token["id"] for token in post(client, "tokenize", model="left-to-right", text="The cat")["tokens"]]
    choice = post(client, "infill", model="left-to-right", tokens=[*ids, None, None, None])["choices"][0]
    plain = post(client, "completions", model="left-to-right", prompt="The cat", max_tokens=3, temperature=0)
    assert choice["text"] == "The cat" + plain["choices"][0]["text"]
    assert choice["finish_reason"] == plain["choices"][0]["finish_reason"] == "length"
    for tokens in ([None, *ids], ids):
        answer = client.post("infill", json={"model": "left-to-right", "tokens": tokens})
        assert answer.status_code == 400 and "all nulls at the end" in answer.json()["error"]["message"]


@pytest.mark.parametrize("more", [{}, {"policy": "Rdm", "steps": 6}, {"policy": "ReMdm"}, {"policy": "Wino"}])
def test_events_lead_to_the_answer(client: httpx.Client, more: dict[str, Any]) -> None:
    """Applied in order, the steps give the answer's tokens, also if some tokens are masked again."""
    found = events(client, "infill", model="infiller", text=TEXT, temperature=1, seed=4, **more)
    tokens = [token["id"] for token in next(data for name, data in found if name == "canvas")["tokens"]]
    steps = [data for name, data in found if name == "denoise"]
    for step in steps:
        for one in step["write"]:
            tokens[one["position"]] = one["id"]
        for position in step["erase"]:
            tokens[position] = None
    answer = next(data for name, data in found if not name)
    assert tokens == [token["id"] for token in answer["choices"][0]["tokens"]]
    assert found[-1] == ("", "[DONE]") and answer["usage"]["forwards"] == steps[-1]["forwards"]
    assert [step["step"] for step in steps] == sorted(step["step"] for step in steps)


def test_sent_text_never_changes(client: httpx.Client) -> None:
    """Also with a sampler that masks tokens again, the deltas add up to the final text."""
    body = {
        "model": "infiller",
        "prompt": "The",
        "max_tokens": 12,
        "window": 4,
        "steps": 24,
        "policy": "ReMdm",
        "seed": 3,
    }
    found = events(client, "completions", **body)
    sent = "".join(c["text"] for name, data in found if not name and data != "[DONE]" for c in data["choices"])
    assert sent == post(client, "completions", **body)["choices"][0]["text"]
    assert any(data["erase"] for name, data in found if name == "denoise")


def test_alternatives(client: httpx.Client, models: dict[str, DiffusionLM]) -> None:
    """They depend on the tokens around a position, not on the token at it."""
    ids: list[Any] = [token["id"] for token in post(client, "tokenize", model="infiller", text="The cat sat")["tokens"]]
    found = post(client, "alternatives", model="infiller", tokens=ids, position=1, top=100)["alternatives"]
    assert 0.5 < sum(one["probability"] for one in found) < 1 and len(found) == 100
    hidden = post(client, "alternatives", model="infiller", tokens=[ids[0], None, *ids[2:]], position=1, top=5)
    assert hidden["alternatives"] == found[:5]
    best = post(client, "infill", model="infiller", tokens=[ids[0], None, *ids[2:]])["choices"][0]["tokens"][1]
    assert best["id"] == found[0]["id"] and best["confidence"] == pytest.approx(found[0]["probability"], abs=1e-3)
    ltr = [post(client, "alternatives", model="left-to-right", tokens=ids[:n], position=1) for n in (2, 3)]
    assert ltr[0] == ltr[1]  # later tokens are not attended to
    answer = client.post("alternatives", json={"model": "infiller", "tokens": ids, "position": 99})
    assert answer.status_code == 400 and "position=99 is beyond" in answer.json()["error"]["message"]


def test_alternatives_are_tokens_of_the_tokenizer() -> None:
    """The network has more embeddings."""
    lm = tiny_lm(infills=True)
    network = tiny_network("llama", vocab_size=400, max_position_embeddings=64)
    larger = DiffusionLM(Denoiser(network, lm.config), lm.tokenizer)
    work = Alternatives(larger, AlternativesBody(model="infiller", tokens=[5, 6, 7], position=1, top=100))
    assert list(work) == [None] and len(work.found) == 100
    assert lm.tokenizer.token_ids.issuperset(token for token, _ in work.found)


def test_scores(client: httpx.Client) -> None:
    """Exact from left to right, exact one by one, or a bound with its standard error."""
    exact = post(client, "score", model="left-to-right", prompt="The", text=" cat sat on")
    assert exact["measure"] == "left to right" and exact["standard_error"] == 0
    assert math.fsum(token["logprob"] for token in exact["tokens"]) == pytest.approx(exact["log_prob"])
    assert exact["bits_per_byte"] == pytest.approx(-exact["log_prob"] / math.log(2) / 11)
    first = exact["tokens"][0]
    ids = [token["id"] for token in post(client, "tokenize", model="left-to-right", text="The")["tokens"]]
    likely = post(client, "alternatives", model="left-to-right", tokens=[*ids, None], position=len(ids), top=100)
    assert len(likely["alternatives"]) == 100 and first["logprob"] < 0
    one_by_one = post(client, "score", model="infiller", text="The cat sat", measure="exact")
    assert one_by_one["measure"] == "one by one" and len(one_by_one["tokens"]) > 1
    bound = post(client, "score", model="infiller", text="The cat sat")
    assert bound["measure"] == "bound" and bound["standard_error"] > 0
    assert all(token["logprob"] is None for token in bound["tokens"])
    assert bound == post(client, "score", model="infiller", text="The cat sat")
