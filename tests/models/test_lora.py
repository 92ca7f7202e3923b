"""New adapters change no outputs, saved ones are restored exactly, and merged ones leave a stock network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from diffusify.models.loading import load_base
from diffusify.models.lora import (
    Lora,
    adapter_base,
    add_lora,
    load_lora,
    merge_lora,
    save_lora,
)
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipes import block, mlm
from diffusify.models.saving import load_denoiser, merge_adapters, save_denoiser
from tests.families import MASK, tiny_network
from tests.text import makers

IDS = torch.arange(6)[None] + 10
TOKENIZERS = {"llama": makers.byte_level(), "bert": makers.word_piece()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def tuned(family: str, lora: Lora) -> PreTrainedModel:
    """A network with random adapters that change its logits."""
    network = tiny_network(family).eval()
    before = network(input_ids=IDS).logits
    add_lora(network, lora, MASK, "some/base")
    assert torch.equal(network(input_ids=IDS).logits, before)
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    assert not torch.allclose(network(input_ids=IDS).logits, before, atol=1e-2)
    return network


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads it
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # of PEFT, for mixtures of experts
@pytest.mark.parametrize("embeddings", ["mask", "all"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "albert", "modernbert", "qwen3_moe"])
def test_saving_and_merging_keep_the_logits(family: str, embeddings, tmp_path: Path) -> None:
    network = tuned(family, Lora(4, embeddings=embeddings))
    logits = network(input_ids=IDS).logits
    save_lora(network, tmp_path)
    assert adapter_base(tmp_path) == "some/base"
    loaded = tiny_network(family).eval()
    load_lora(loaded, tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, logits)
    for _ in range(2):
        merge_lora(loaded)
        torch.testing.assert_close(loaded(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-4)
    assert set(loaded.state_dict()) == set(tiny_network(family).state_dict())
    peft_model = PeftModel.from_pretrained(tiny_network(family).eval(), str(tmp_path))
    torch.testing.assert_close(peft_model(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("lora", [None, Lora(4), Lora(4, embeddings="all")])
@pytest.mark.parametrize("family", ["llama", "bert"])
@torch.no_grad()
def test_a_head_of_its_own_is_kept_though_the_config_ties_it(family: str, lora: Lora | None, tmp_path: Path) -> None:
    """Some merged adapters in the wild have such a config. The mask token is new, so the network grows as well."""
    network = tiny_network(family, vocab_size=len(TOKENIZERS[family].tokenizer) - 1, tie_word_embeddings=False)
    head: Any = network.get_output_embeddings()
    head.weight.normal_()
    expected = network(input_ids=IDS).logits
    network.config.tie_word_embeddings = True
    network.save_pretrained(tmp_path / "base")
    TOKENIZERS[family].tokenizer.save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"))
    denoiser, _ = make_denoiser(base, block(4) if family == "llama" else mlm(), lora=lora)
    assert_close(base.network(input_ids=IDS).logits[..., : expected.shape[-1]], expected)
    for weight in base.network.parameters():
        weight += 0.05 * torch.randn_like(weight) * weight.requires_grad
    trained = base.network(input_ids=IDS).logits
    save_denoiser(tmp_path / "saved", denoiser, base.tokenizer)
    folders = [tmp_path / "saved"]
    if lora is not None:
        folders.append(merge_adapters(tmp_path / "saved", tmp_path / "merged"))
    for folder in folders:
        assert_close(load_denoiser(folder)[0].network(input_ids=IDS).logits, trained)


def test_only_adapters_and_the_mask_token_are_trained() -> None:
    network = tuned("llama", Lora(4))
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "trainable_tokens" in name for name in trained)
    assert sum("trainable_tokens" in name for name in trained) == 1


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_adapters_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    save_lora(tuned("llama", Lora(4)), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    first = sorted(weights)[0]
    if change == "missing":
        del weights[first]
    else:
        weights[first.replace("embed_tokens", "nowhere")] = weights[first].clone()
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="do not fit their base: 1 tensors differ"):
        load_lora(tiny_network("llama"), tmp_path)


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0 must be at least 1"):
        Lora(0)
