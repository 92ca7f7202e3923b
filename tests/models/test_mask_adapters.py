"""Adapters for masks leave every other row exactly as the base computes it: in training, in decoding and in files."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Noised, noised
from diffusify.evaluation.bench import greedy_ar
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_inference import optimize_for_inference
from diffusify.models.loading import load_base
from diffusify.models.lora import Lora, adapter_base, add_lora, merge_lora
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.mask_adapters import find_mask_rows
from diffusify.models.recipes import ar, block, mlm
from diffusify.models.saving import load_denoiser, merge_adapters, open_base, save_denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.speculative import Speculative
from tests.families import CAUSAL, MASK, tiny_network
from tests.sampling.test_speculative import ROWS, greedy
from tests.text import makers

RECIPE = block(4, adapters="masks")
TEXT = torch.randint(3, 20, (3, 40), generator=torch.Generator().manual_seed(0))
TOKENIZER = makers.byte_level()


def base_network(family: str) -> PreTrainedModel:
    """The base of a family, with sliding windows where it has some."""
    windows = {"sliding_window": 5} if family in ("mistral", "gemma3_text") else {}
    return tiny_network(family, kernel="eager" if family == "gemma2" else "sdpa", **windows)


def adapted(family: str = "llama") -> Denoiser:
    """A denoiser with random adapters that change the logits of masks."""
    network = base_network(family)
    add_lora(network, Lora(4), MASK, "some/base", "masks")
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return Denoiser(network, RECIPE.diffusion_config(type(network).__name__, MASK, "some/base")).eval()


def batch(denoiser: Denoiser) -> Noised:
    """A training batch of packed documents."""
    document = torch.ones_like(TEXT)
    document[1, 17:] = 2
    clean = denoiser.predictable(Canvas.clean(TEXT, document))
    return noised(clean, RECIPE.time, RECIPE.schedule, MASK, generator=torch.Generator().manual_seed(0))


def predict(denoiser: Denoiser, given: Noised) -> tuple[Tensor, Tensor]:
    """The logits of the masks and the AR half's logits, without those that are -inf."""
    canvas = given.canvas
    prediction = denoiser(canvas, given.text, positions=canvas.open, ar_positions=canvas.editable)
    return prediction.logits[:, :MASK], prediction.ar_logits[:, :MASK]


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_clean_text_is_computed_as_by_the_base(family: str) -> None:
    denoiser, base = adapted(family), Denoiser(base_network(family), adapted(family).diffusion_config)
    given = batch(denoiser)
    with torch.no_grad():
        assert torch.equal(denoiser.network(input_ids=TEXT).logits, base.network(input_ids=TEXT).logits)
        masks, text = predict(denoiser, given)
        base_masks, base_text = predict(base, given)
    assert torch.equal(text, base_text)
    assert (masks - base_masks).abs().max() > 0.1


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_text_without_gradients_gives_the_same_logits_and_gradients(family: str, monkeypatch) -> None:
    denoiser = adapted(family)
    given, results = batch(denoiser), []
    for split in (True, False):
        monkeypatch.setattr(Denoiser, "_can_split", split)
        denoiser.zero_grad()
        logits = torch.cat(predict(denoiser, given))
        logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients))
    (logits, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    assert set(gradients) == set(expected_gradients) == trained
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert scale > 0
        assert (gradient - expected_gradients[name]).abs().max() < 2e-3 * scale, name


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_lossless_text_is_that_of_the_unadapted_base(family: str) -> None:
    denoiser, base = adapted(family), base_network(family)
    frames = list(Speculative(denoiser)(Canvas.from_tokens(ROWS, noise=MASK, pad=0), noise=MASK))
    for row, tokens in zip(ROWS, frames[-1].canvas.tokens.tolist(), strict=True):
        assert tokens[: len(row)] == greedy(base, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi3"])
@torch.no_grad()
def test_fast_layers_keep_the_adapters(family: str, dtype: torch.dtype) -> None:
    plain = adapted(family)
    plain.to(dtype)
    fast = Denoiser(deepcopy(plain.network), plain.diffusion_config)
    optimize_for_inference(fast.network)
    given = batch(plain)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for ours, expected in zip(predict(fast, given), predict(plain, given), strict=True):
        assert (ours - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("first", [0, 25, 40, None])
@torch.no_grad()
def test_fast_adapters_act_on_masks_wherever_they_are(first: int | None) -> None:
    """On all rows, on the last ones, on none, or on some in between."""
    plain = adapted().network
    fast = deepcopy(plain)
    optimize_for_inference(fast)
    is_mask = (TEXT % 3 == 0) if first is None else (torch.arange(40) >= first).expand(3, -1)
    logits = []
    for network in (plain, fast):
        rows = find_mask_rows(network)
        assert rows is not None
        rows.is_mask = is_mask
        logits.append(network(input_ids=TEXT).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_a_mask_token_in_a_text_is_the_base_s() -> None:
    denoiser, base = adapted(), tiny_network("llama")
    text = torch.tensor([[5, MASK, 7, 9]])
    canvas = Canvas.clean(text, torch.ones_like(text))
    with torch.no_grad():
        logits = denoiser(canvas).logits
        expected = base(input_ids=text).logits
    torch.testing.assert_close(logits[0, 1:, :MASK], expected[0, :-1, :MASK])


def saved_model(folder: Path) -> tuple[Path, Denoiser]:
    """A folder of adapters with its base beside it, and the denoiser that was saved."""
    network = tiny_network("llama", vocab_size=len(TOKENIZER.tokenizer))
    network.save_pretrained(folder / "base")
    TOKENIZER.tokenizer.save_pretrained(folder / "base")
    base = load_base(str(folder / "base"))
    denoiser, _ = make_denoiser(base, RECIPE)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    save_denoiser(folder / "saved", denoiser, base.tokenizer)
    return folder / "saved", denoiser


@torch.no_grad()
def test_a_saved_model_opens_with_the_same_logits(tmp_path: Path) -> None:
    folder, denoiser = saved_model(tmp_path)
    loaded, _ = load_denoiser(folder)
    merge_lora(loaded.network)  # has no effect
    given = batch(denoiser)
    mask = denoiser.diffusion_config.mask_token_id
    for ours, expected in zip(predict(loaded, given), predict(denoiser.eval(), given), strict=True):
        assert torch.equal(ours[:, :mask], expected[:, :mask])
    assert adapter_base(folder) == PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    assert not (folder / "model.safetensors").exists()
    again = open_base(str(folder))
    trained = [name for name, weight in again.network.named_parameters() if weight.requires_grad]
    assert trained and all("mask_" in name for name in trained)


def test_text_of_a_saved_model_equals_that_of_its_base(tmp_path: Path) -> None:
    folder, _ = saved_model(tmp_path)
    lm, base = DiffusionLM.from_pretrained(folder), load_base(str(tmp_path / "base"))
    result = lm.generate("hello", 12)
    expected = greedy_ar(lm, base.network.eval(), "hello", 12)
    assert result.completion == lm.tokenizer.decode(expected)


def test_merging_is_refused(tmp_path: Path) -> None:
    folder, _ = saved_model(tmp_path)
    with pytest.raises(ValueError, match="act on masks only.*use the folder as it is, with its base"):
        merge_adapters(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_adapters_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    folder, _ = saved_model(tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    first = sorted(weights)[0]
    if change == "missing":
        del weights[first]
    else:
        name = first if change == "shape" else first.replace("model.", "nowhere.")
        weights[name] = torch.zeros(3)
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit their base: \d+ tensors differ"):
        load_denoiser(folder)


@pytest.mark.parametrize("settings", [{"ar_weight": 0.5}, {"infilling": 0.25}, {"masked": True}])
def test_recipes_that_train_text_are_refused(settings) -> None:
    with pytest.raises(ValueError, match=r"adapters='masks' keeps the AR half.*or adapters='all'"):
        block(4, adapters="masks", **settings)


def test_embeddings_of_text_stay_the_base_s() -> None:
    with pytest.raises(ValueError, match="embeddings='all' changes clean text"):
        add_lora(tiny_network("llama"), Lora(4, embeddings="all"), MASK, "base", "masks")


def test_other_recipes_adapt_all_rows() -> None:
    assert {recipe.adapters for recipe in (ar(), mlm(), block(4, masked=True))} == {"all"}
