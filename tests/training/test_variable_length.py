"""Recipes with variable length and with alignment: training, saving, and filling of spans of unknown length."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffusify
from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Causal
from diffusify.diffusion.corruption import PerText, noised
from diffusify.diffusion.length_tokens import LengthTokens
from diffusify.diffusion.schedules import Linear
from diffusify.evaluation.likelihood import MonteCarlo
from diffusify.evaluation.scoring import score
from diffusify.evaluation.tasks import Infill
from diffusify.models.loading import load_base
from diffusify.models.lora import Lora
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.mask_token import ensure_length_tokens, ensure_mask_token
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import ar, block, mlm
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.reranking import ar_log_likelihood
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.training.adapt import adapt
from diffusify.training.alignment import Alignment
from tests.families import tiny_network
from tests.text import makers

TINY = {"length": 32, "held_out": 64, "per_device_train_batch_size": 2, "bf16": False, "learning_rate": 1e-2}
TEXT = "The cat[[...]] on [[2]] mat"


def eager(lm: DiffusionLM, temperature: float = 2.0, **fields: Any) -> SamplingConfig:
    """Settings that make length tokens likely, where they are possible."""
    ids = torch.tensor([] if lm.config.length_tokens is None else lm.config.length_tokens.ids, dtype=torch.long)

    def favour(logits: torch.Tensor, canvas: Canvas, positions: torch.Tensor) -> torch.Tensor:
        return logits.index_add(1, ids, torch.full((len(logits), len(ids)), 20.0))

    return SamplingConfig(temperature=temperature, logits_processor=favour, **fields)


@pytest.mark.parametrize("lora", [None, Lora(2)], ids=str)
def test_length_tokens_are_trained_saved_and_used(
    lora: Lora | None, causal_base: str, corpus: str, tmp_path: Path
) -> None:
    out = adapt(causal_base, corpus, tmp_path / "run", recipe=ar(variable_length=True), lora=lora, steps=3, **TINY)
    config = DiffusionConfig.load(out)
    base = load_base(causal_base)
    assert config.mask_token_id == ensure_mask_token(base) and config.length_tokens == ensure_length_tokens(base)
    lm = diffusify.load(out)
    assert config.length_tokens is not None
    ids = config.length_tokens.ids
    assert [lm.tokenizer.tokenizer.convert_ids_to_tokens(i) for i in ids] == ["<|expand|>", "<|delete|>"]
    networks: list[Any] = [base.network, lm.denoiser.network]
    start, end = (each.get_output_embeddings().weight[ids] for each in networks)
    assert (start != end).any(1).all()
    run = lm.prepare_infilling([TEXT] * 6, eager(lm))
    lengths = {tuple(frame.canvas.real.sum(1).tolist()) for frame in run}
    assert len(lengths) > 1 and run.num_candidates == 1
    for result, row in zip(run.results(), run.canvas.tokens.tolist(), strict=True):
        assert not set(ids) & set(row) and result.text.startswith("The cat") and result.text.endswith(" mat")
    # Known lengths, continuations and likelihoods are as without the tokens.
    fixed = lm.prepare_infilling(["The[[30]] mat"] * 4, eager(lm, 5.0))
    fixed.results()
    assert fixed.canvas.editable.sum() == 120 and not torch.isin(fixed.canvas.tokens, torch.tensor(ids)).any()
    assert lm.denoiser(fixed.canvas).logits[..., ids].isneginf().all()
    more = adapt(str(out), corpus, tmp_path / "more", steps=1, seed=1, **TINY)
    assert DiffusionConfig.load(more).length_tokens == config.length_tokens
    assert json.loads((more / "run.json").read_text())["recipe"]["length_noise"]["type"] == "LengthNoise"


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_train_the_length_tokens_in_the_head(tied: bool, tmp_path: Path, corpus: str) -> None:
    """Also if the head has weights of its own."""
    network = tiny_network("llama", vocab_size=320, eos_token_id=0, bos_token_id=0, tie_word_embeddings=tied)
    network.save_pretrained(tmp_path / "base")
    makers.byte_level().tokenizer.save_pretrained(tmp_path / "base")
    plain = adapt(str(tmp_path / "base"), corpus, tmp_path / "plain", recipe=ar(), lora=Lora(2), steps=1, **TINY)
    with pytest.raises(ValueError, match="train no length tokens, which variable_length=True needs; start from"):
        adapt(str(plain), corpus, tmp_path / "other", recipe=ar(variable_length=True), steps=1, **TINY)
    recipe = ar(variable_length=True)
    out = adapt(str(tmp_path / "base"), corpus, tmp_path / "run", recipe=recipe, lora=Lora(2), steps=2, **TINY)
    weights = load_file(out / "adapter_model.safetensors")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items() if "token_adapter" in name}
    assert sorted(shapes.values()) == ([(3, 32)] if tied else [(2, 32), (3, 32)])
    lm, base = diffusify.load(out), load_base(str(tmp_path / "base"))
    ids = ensure_length_tokens(base).ids
    networks: list[Any] = [base.network, lm.denoiser.network]
    start, end = (each.get_output_embeddings().weight[ids] for each in networks)
    assert (start != end).any(1).all() and lm.infill(TEXT).text.endswith(" mat")


def test_masked_models_and_block_models_fill_spans_of_unknown_length(
    masked_base: str, causal_base: str, corpus: str, tmp_path: Path
) -> None:
    recipes: list[tuple[str, Recipe]] = [
        (masked_base, mlm(variable_length=True)),
        (causal_base, block(4, infilling=0.5, any_order=True, variable_length=True, alignment=10.0)),
    ]
    for i, (base, recipe) in enumerate(recipes):
        lm = diffusify.load(adapt(base, corpus, tmp_path / str(i), recipe=recipe, steps=4, **TINY))
        run = lm.prepare_infilling(["the cat [[...]] mat"] * 4, eager(lm))
        assert len({frame.canvas.tokens.shape[1] for frame in run}) > 1
        assert not run.canvas.open.any()
        assert lm.generate("the cat", max_new_tokens=5).tokens <= 5
        for span_length in ("told", "unknown"):
            items = [Infill("the cat ", "sat on the", " mat")]
            (scored,) = score(lm, items, MonteCarlo(), SamplingConfig(), span_length=span_length)
            assert 0 <= scored.scores["rouge1"] <= 1
    lm = diffusify.load(tmp_path / "1")
    run = lm.prepare_infilling(["the cat [[...]] mat"], SamplingConfig(rerank=4))
    (result,) = run.results()
    likelihood = ar_log_likelihood(lm.denoiser, run.canvas)
    assert run.num_candidates == 4 and result.text == lm.read(run.canvas[int(likelihood.argmax()) :])
    one = run.canvas[:1, : int(run.canvas.real[0].sum())]
    ar_logits = lm.denoiser(one, attention=Causal()).logits[0, 1:].log_softmax(-1)
    expected = ar_logits.gather(1, one.tokens[0, 1:, None]).sum()
    torch.testing.assert_close(likelihood[0], expected, atol=1e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="rerank=3 needs a model that keeps its AR half"):
        diffusify.load(tmp_path / "0").infill("the [[...]] mat", rerank=3)


def test_alignment_is_zero_for_the_base_and_trains_adapters_only(causal_base: str) -> None:
    recipe = ar(alignment=10.0)
    denoiser, _ = make_denoiser(load_base(causal_base), recipe, lora=Lora(4))
    alignment = Alignment(denoiser, denoiser.device)
    assert sum(
        p.data_ptr() not in {q.data_ptr() for q in denoiser.parameters()} for p in alignment.base.parameters()
    ) <= sum(p.requires_grad for p in denoiser.parameters())
    clean = Canvas.clean(torch.randint(1, 300, (2, 16)))
    mask, generator = denoiser.diffusion_config.mask_token_id, torch.Generator().manual_seed(0)
    denoiser.train()
    for noisy, attention in ((False, Causal()), (True, None)):
        batch = noised(clean, PerText(), Linear(), mask, generator=generator)
        canvas = batch.canvas if noisy else clean
        layers = denoiser(canvas, positions=canvas.open, attention=attention, return_layers=True).layers
        distance = alignment(batch, layers) / alignment.positions(batch).sum()
        assert len(layers) == 2 and (distance > 1e-3) == noisy and distance > -1e-6
    distance.backward()
    assert all((p.grad is not None) == p.requires_grad for p in denoiser.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in denoiser.parameters())
    assert all(p.grad is None for p in alignment.base.parameters())


def test_alignment_compares_the_tokens_of_a_resized_text(causal_base: str) -> None:
    """Positions of a canvas with length tokens are compared with those that the same tokens had in the text."""
    recipe = ar(alignment=10.0, variable_length=True)
    denoiser, _ = make_denoiser(load_base(causal_base), recipe)
    assert recipe.length_noise is not None
    clean, rng = Canvas.clean(torch.randint(1, 300, (3, 40))), torch.Generator().manual_seed(1)
    plain = noised(clean, PerText(), Linear(), 5, generator=rng)
    batch = recipe.length_noise(plain, LengthTokens(318, 319), Linear(), 5, generator=rng)
    assert batch.resized_from is not None
    text, columns = batch.resized_from
    compared = Alignment(denoiser, denoiser.device).positions(batch)
    assert torch.equal(batch.clean[compared], columns.take(text.tokens)[compared])
    assert not torch.isin(batch.clean[compared], torch.tensor([318, 319])).any()
    assert (batch.canvas.real & ~torch.isin(batch.clean, torch.tensor([318, 319])) == compared).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: block(4, variable_length=True), "length_noise=.* is for filling masked spans"),
        (lambda: block(4, alignment=1.0), "alignment=1.0 must be at least 0"),
        (lambda: ar(shift=0, alignment=1.0), "alignment=1.0 must be at least 0"),
        (lambda: diffusify.SamplingConfig(rerank=1), "rerank=1 must be at least 2 candidates"),
    ],
)
def test_settings_that_exclude_each_other(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
