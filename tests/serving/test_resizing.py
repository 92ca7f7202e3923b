"""Masked spans that change their length while a client watches."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from torch import nn

from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.diffusion.length_tokens import LengthTokens
from diffusify.diffusion.policies import Unmask
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.serving.api.app import Limits, create_app
from tests.serving.models import running, tiny_lm
from tests.serving.test_infill import events, post

TEXT = "The [[...]] sat on [[2]] mat."
SEEDS = range(2)


def favour(lm: DiffusionLM, ids: list[int], bias: float = 12.0) -> None:
    """Make a model more likely to write some tokens."""
    network: Any = lm.denoiser.network
    head = nn.Linear(network.lm_head.in_features, network.lm_head.out_features)
    with torch.no_grad():
        head.weight.copy_(network.lm_head.weight)
        head.bias.zero_()
        head.bias[ids] = bias
    network.lm_head = head.eval().requires_grad_(False)


def resizing_lm() -> DiffusionLM:
    """A random model that likes to write the length tokens, which are two letters here."""
    lm = tiny_lm(infills=True)
    ids = [lm.tokenizer.encode(letter)[-1] for letter in "qz"]
    favour(lm, ids)
    lm.denoiser.diffusion_config = replace(lm.config, length_tokens=LengthTokens(*ids))
    return lm


def span_lm(bias: float = 12.0) -> DiffusionLM:
    """A random block model that fills spans from left to right, and likes to end them."""
    lm = tiny_lm(infills=True)
    favour(lm, [lm.tokenizer.end_token_id], bias)
    lm.denoiser.diffusion_config = replace(
        lm.config, attention=BlockCausal(4), infilling=BlockCausal(4, sides="both"), policy=Unmask()
    )
    return lm


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with (
        running(create_app({"infiller": resizing_lm(), "spans": span_lm(), "greedy": span_lm(3.0)})) as address,
        httpx.Client(base_url=f"{address}/v1", timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize(
    "more",
    [{}, {"policy": "Rdm"}, {"policy": "ReMdm"}, {"policy": "Wino"}, {"window": 4, "cache": "dual"}],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_events_lead_to_the_answer(client: httpx.Client, more: dict[str, Any]) -> None:
    """Expanded and deleted positions are executed first, then what is erased and written counts in the new text."""
    lm, resized = resizing_lm(), 0
    for seed in SEEDS:
        body = {"model": "infiller", "text": TEXT, "temperature": 1.5, "seed": seed, **more}
        found = events(client, "infill", **body)
        tokens = [token["id"] for token in next(data for name, data in found if name == "canvas")["tokens"]]
        for name, step in found:
            if name != "denoise":
                continue
            doubled, gone = step.get("expand", []), step.get("delete", [])
            resized += len(doubled) + len(gone)
            tokens = [t for i, t in enumerate(tokens) if i not in gone for _ in range(1 + (i in doubled))]
            for position in step["erase"]:
                tokens[position] = None
            for one in step["write"]:
                tokens[one["position"]] = one["id"]
        choice = next(data for name, data in found if not name)["choices"][0]
        assert tokens == [token["id"] for token in choice["tokens"]]
        fields = {name: value for name, value in more.items() if name != "policy"}
        config = SamplingConfig(temperature=1.5, seed=seed, **fields)
        if "policy" not in more:
            assert choice["spans"] == list(lm.prepare_infilling([TEXT], config).results()[0].spans or ())
    assert resized > 4


@pytest.mark.parametrize(("model", "bias", "temperature"), [("spans", 12.0, 1.5), ("greedy", 3.0, 0.0)])
def test_spans_that_end_lead_to_the_answer(client: httpx.Client, model: str, bias: float, temperature: float) -> None:
    lm, shortened, unwritten = span_lm(bias), 0, 0
    for seed in range(4):
        body = {"model": model, "text": TEXT, "temperature": temperature, "seed": seed}
        found = events(client, "infill", **body)
        tokens = [token["id"] for token in next(data for name, data in found if name == "canvas")["tokens"]]
        for name, step in found:
            if name == "denoise":
                shortened += len(step.get("delete", []))
                unwritten += sum(tokens[position] is not None for position in step.get("delete", []))
                tokens = [token for i, token in enumerate(tokens) if i not in step.get("delete", [])]
                for one in step["write"]:
                    tokens[one["position"]] = one["id"]
        choice = next(data for name, data in found if not name)["choices"][0]
        assert tokens == [token["id"] for token in choice["tokens"]]
        (alone,) = lm.prepare_infilling([TEXT], SamplingConfig(temperature=temperature, seed=seed)).results()
        assert choice["spans"] == list(alone.spans or ())
        plain: dict[str, Any] = {"model": model, "prompt": "The cat", "suffix": " mat", "max_tokens": 24}
        plain |= {"temperature": temperature, "seed": seed}
        whole = post(client, "completions", **plain)
        found = events(client, "completions", **plain)
        parts = [choice for name, data in found if not name and data != "[DONE]" for choice in data["choices"]]
        text, count = whole["choices"][0]["text"], whole["usage"]["completion_tokens"]
        assert "".join(choice["text"] for choice in parts) == text and count <= 24
        reason = "stop" if count < 24 else "length"  # as after an end token
        assert whole["choices"][0]["finish_reason"] == parts[-1]["finish_reason"] == reason
    assert shortened > 20 and (unwritten > 0) == (temperature == 0)  # what stands behind the likeliest end goes


def test_streamed_suffix_completions_add_up(client: httpx.Client) -> None:
    lengths, tokens = set(), resizing_lm().config.length_tokens
    assert tokens is not None
    bias = {str(i): -6.0 for i in tokens.ids}  # a little less resizing, so that not all bounds are reached
    for seed in SEEDS:
        body: dict[str, Any] = {"model": "infiller", "prompt": "The cat", "suffix": " mat", "max_tokens": 24}
        body |= {"seed": seed, "logit_bias": bias}
        whole = post(client, "completions", **body)
        found = events(client, "completions", **body)
        parts = [c["text"] for name, data in found if not name and data != "[DONE]" for c in data["choices"]]
        assert "".join(parts) == whole["choices"][0]["text"] and len(parts) > 1
        lengths.add(whole["usage"]["completion_tokens"])
        assert 1 <= whole["usage"]["completion_tokens"] <= 24
        fim = {name: value for name, value in body.items() if name != "seed"} | {"random_seed": seed}
        assert post(client, "fim/completions", **fim)["choices"][0]["message"]["content"] == "".join(parts)
    assert len(lengths) > 1
    with_logprobs = post(client, "completions", **body, logprobs=2)["choices"][0]  # tries several lengths
    assert all(len(top) == 2 for top in with_logprobs["logprobs"]["top_logprobs"])


def test_reranked_candidates_are_those_of_the_model() -> None:
    """Candidates of different lengths, of which the one is kept that the AR half finds likeliest."""
    lm = resizing_lm()
    lm.denoiser.diffusion_config = replace(lm.config, attention=BlockCausal(4), infilling=Bidirectional())
    config = SamplingConfig(temperature=1.0, seed=3, rerank=3)
    with running(create_app({"both": lm})) as address, httpx.Client(base_url=f"{address}/v1", timeout=60) as client:
        body = {"model": "both", "temperature": 1.0, "seed": 3, "rerank": 3}
        choice = post(client, "infill", text=TEXT, **body)["choices"][0]
        assert choice["spans"] == list(lm.prepare_infilling([TEXT], config).results()[0].spans or ())
        filled = post(client, "completions", prompt="The cat", suffix=" mat", max_tokens=24, **body)["choices"][0]
        (alone,) = lm.prepare_infilling([["The cat", range(1, 25), " mat"]], config).results()
        assert (filled["text"],) == alone.spans


@pytest.mark.parametrize("more", [{"n": 2}, {"rerank": 2}], ids=str)
def test_several_fillings_are_cut_to_the_budget(more: dict[str, int]) -> None:
    with (
        running(create_app({"m": span_lm(0.0)}, Limits(tokens=100))) as address,
        httpx.Client(base_url=f"{address}/v1", timeout=60) as client,
    ):
        filled = post(client, "completions", model="m", prompt="The cat", suffix=" mat", max_tokens=999, **more)
    assert len(filled["choices"]) == more.get("n", 1) and filled["usage"]["total_tokens"] <= 100
