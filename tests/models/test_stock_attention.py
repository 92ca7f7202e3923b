"""Saved bidirectional models of causal classes attend in both directions when transformers opens them alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import diffusify
from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal, Causal
from diffusify.models.attention_check import allowed_influence, attention_influence, check_attention
from diffusify.models.denoiser import Denoiser
from diffusify.models.loading import load_base
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.saving import load_denoiser, merge_adapters, save_denoiser
from diffusify.models.stock_attention import IGNORES_IS_CAUSAL
from tests.families import CAUSAL, FAMILIES, llama_like, tiny_network
from tests.text import makers

EXTRA = {"stablelm": llama_like, "nemotron": llama_like}


def saved(
    family: str,
    attention: AttentionPattern,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    shift: int = 1,
    **changes: Any,
) -> Path:
    """The folder of a tiny model."""
    if family in EXTRA:
        monkeypatch.setitem(CAUSAL, family, EXTRA[family])
        monkeypatch.setitem(FAMILIES, family, EXTRA[family])
    kernel = "eager" if family == "gemma2" else "sdpa"  # its default
    tokenizer = makers.byte_level()
    network = tiny_network(family, kernel, vocab_size=len(tokenizer.tokenizer), **changes)
    config = DiffusionConfig(tokenizer.mask_token_id, shift, attention, type(network).__name__)
    save_denoiser(folder, Denoiser(network, config), tokenizer.tokenizer)
    return folder


def is_bidirectional(network: PreTrainedModel) -> bool:
    """Whether another last token changes the logits at the first position, in a plain forward pass."""
    tokens = torch.arange(20, 26).repeat(2, 1)
    tokens[1, -1] = 60
    first, other = network(input_ids=tokens).logits[:, 0]
    return bool((first - other).abs().max() > 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", [*CAUSAL, *EXTRA])
@pytest.mark.parametrize("shift", [0, 1])
def test_transformers_alone_gives_the_logits_of_diffusify(
    family: str, shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(family, Bidirectional(), tmp_path, monkeypatch, shift)
    network = AutoModelForCausalLM.from_pretrained(folder)
    ignores = type(network).__name__ in IGNORES_IS_CAUSAL
    assert is_bidirectional(network) is not ignores
    assert ('"FOLDER", attn_implementation="eager"' in (folder / "README.md").read_text()) is ignores
    if ignores:
        network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    check_logits(folder, network)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen3", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}),
        ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)
def test_a_sliding_window_is_opened_as_the_card_says(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(family, Bidirectional(), tmp_path, monkeypatch, **changes)
    assert '"FOLDER", sliding_window=3)' in (folder / "README.md").read_text()
    check_logits(folder, AutoModelForCausalLM.from_pretrained(folder, sliding_window=3))


def check_logits(folder: Path, network: PreTrainedModel) -> None:
    """Check that a stock network gives the logits of diffusify, each at the position that it predicts."""
    denoiser, _ = load_denoiser(folder)
    shift = denoiser.diffusion_config.shift
    tokens = torch.arange(20, 30)[None]
    ours = denoiser(Canvas.clean(tokens)).logits[0, shift:]
    plain = network(input_ids=tokens).logits[0, : 10 - shift]
    mask_token_id = denoiser.diffusion_config.mask_token_id
    for logits in (ours, plain):
        logits[:, mask_token_id] = 0  # diffusify never predicts the mask token
    torch.testing.assert_close(plain, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [*CAUSAL, *EXTRA])
def test_diffusify_applies_every_pattern_to_such_a_folder(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, _ = load_denoiser(saved(family, Bidirectional(), tmp_path, monkeypatch))
    assert denoiser.config.is_causal is False
    check_attention(denoiser)
    assert torch.equal(attention_influence(denoiser, Causal()), allowed_influence(denoiser, Causal()))


@pytest.mark.parametrize("family", ["llama", *EXTRA])
def test_activation_checkpointing_changes_no_gradient(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = load_denoiser(saved(family, Bidirectional(), tmp_path, monkeypatch, attention_dropout=0.0))[0].train()
    embeddings = denoiser.network.get_input_embeddings().get_parameter("weight")
    gradients = []
    for enable in (lambda: None, denoiser.activation_checkpointing_enable):
        enable()
        logits = denoiser(Canvas.clean(torch.arange(20, 30)[None])).logits
        (gradient,) = torch.autograd.grad(logits[logits.isfinite()].square().mean(), embeddings)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_a_block_model_made_of_a_bidirectional_one_is_causal_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("llama", Bidirectional(), tmp_path / "ar", monkeypatch)
    base = load_base(str(source))
    denoiser, tokenizer = make_denoiser(base, diffusify.block(3))
    save_denoiser(tmp_path / "block", denoiser, tokenizer.tokenizer)
    assert "is_causal" not in json.loads((tmp_path / "block" / "config.json").read_text())
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "block")
    assert not is_bidirectional(network)  # the AR half
    assert isinstance(load_denoiser(tmp_path / "block")[0].diffusion_config.attention, BlockCausal)


def test_tuned_and_merged_models_are_saved_like_the_first(causal_base: str, corpus: str, tmp_path: Path) -> None:
    small = {"steps": 1, "bf16": False}
    first = diffusify.adapt(
        causal_base, corpus, tmp_path / "ar", recipe=diffusify.ar(), length=32, held_out=64, **small
    )
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"{i} cats", "completion": " sat"}) + "\n" for i in range(20)))
    adapters = diffusify.tune(str(first), str(pairs), tmp_path / "lora", lora=diffusify.Lora(2), length=32, **small)
    assert not (adapters / "config.json").exists()
    whole = merge_adapters(adapters, tmp_path / "whole")
    for folder in (first, whole):
        assert is_bidirectional(AutoModelForCausalLM.from_pretrained(folder))
    text = diffusify.load(adapters).generate("3 cats", max_new_tokens=4).text
    assert diffusify.load(whole).generate("3 cats", max_new_tokens=4).text == text
