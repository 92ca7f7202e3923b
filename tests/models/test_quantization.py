"""Adapters that are trained on a base with 4-bit weights; the test that trains some needs bitsandbytes."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffusify
from diffusify.models import quantization, saving
from diffusify.models.loading import Base
from diffusify.models.lora import Lora
from diffusify.models.recipes import block, draft
from diffusify.training.adapt import adapt
from diffusify.training.tune import tune
from tests.families import tiny_network
from tests.pretend_accelerator import accelerator
from tests.text import makers


def test_it_is_refused_before_any_work(causal_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    for run in (adapt, tune):
        with pytest.raises(ValueError, match="load_in_4bit=True keeps .* trains adapters; add --lora 16"):
            run(causal_base, "missing.jsonl", tmp_path / "out", recipe=block(4), load_in_4bit=True)
        with pytest.raises(ValueError, match=r"needs bitsandbytes; run: pip install 'diffusify\[quant\]'"):
            run(causal_base, "missing.jsonl", tmp_path / "out", recipe=block(4), load_in_4bit=True, lora=Lora(4))
    with pytest.raises(ValueError, match="needs bitsandbytes"):  # the recipe trains adapters by itself
        adapt(causal_base, "missing.jsonl", tmp_path / "out", recipe=draft(4), load_in_4bit=True)
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="does not work with FSDP; run several processes as DDP, by torchrun"):
        adapt(causal_base, "missing.jsonl", tmp_path / "out", load_in_4bit=True, lora=Lora(4))
    assert not (tmp_path / "out").exists()


def test_the_base_is_loaded_where_the_process_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[dict[str, Any]] = []

    def load(model: str, **arguments: Any) -> Base:
        loaded.append(arguments)
        return Base(tiny_network("llama"), makers.byte_level().tokenizer, model, masked=False)

    monkeypatch.setattr(saving, "load_base", load)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    saving.open_base("some/base")
    saving.open_base("some/base", load_in_4bit=True)
    with accelerator(memory=(1 << 40,) * 2):
        monkeypatch.setenv("LOCAL_RANK", "1")
        saving.open_base("some/base", load_in_4bit=True)
    plain, cpu, cuda = loaded
    assert plain == {} and cpu["device"] == torch.device("cpu") and cuda["device"] == torch.device("cuda", 1)
    assert cpu["quantization"].bnb_4bit_compute_dtype == torch.float32
    assert cuda["quantization"].bnb_4bit_compute_dtype == torch.bfloat16 and cuda["quantization"].load_in_4bit


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (the extra quant)")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # when bitsandbytes is imported
@pytest.mark.parametrize("teacher", ["own", "base"])
def test_adapters_of_a_4_bit_base_open_on_the_plain_one(
    teacher: Any, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are trained on texts that the 4-bit base generates, and trained further; all layers learn."""
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": 16,
    }  # 4-bit weights are blocks of 64
    tiny_network("llama", vocab_size=320, eos_token_id=0, bos_token_id=0, **sizes).save_pretrained(base)
    makers.byte_level().tokenizer.save_pretrained(base)
    options: dict[str, Any] = {"load_in_4bit": True, "length": 32, "held_out": 64, "bf16": False}
    first = adapt(
        str(base),
        f"self:{corpus}",
        tmp_path / "first",
        recipe=block(4, teacher=teacher),
        lora=Lora(4),
        steps=2,
        **options,
    )
    learnt = load_file(first / "adapter_model.safetensors")
    assert len(learnt) == 2 * 7 * 2 + 1 and all(weight.any() for weight in learnt.values())
    second = adapt(str(first), corpus, tmp_path / "second", steps=1, **options)
    for folder in (first, second):
        lm = diffusify.load(folder, device="cpu")
        assert {weight.dtype for weight in lm.denoiser.parameters()} == {torch.float32}
        assert lm.generate("The cat", 8).tokens > 0 and lm.config.base_model == str(base)
