"""Exported models are read by others, and by the import, with the same logits; what has no target is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from typer.testing import CliRunner

import diffusify
from diffusify.canvas import Canvas
from diffusify.cli import app
from diffusify.config import DiffusionConfig, DocumentFrame
from diffusify.diffusion.attention import AttentionPattern, Bidirectional, BlockCausal, Prefix
from diffusify.formats import stored_tensors
from diffusify.formats.exporting import TARGETS, export
from diffusify.formats.importers import import_denoiser
from diffusify.formats.layouts import LAYOUTS
from diffusify.models.denoiser import Denoiser
from diffusify.models.lora import Lora, add_lora
from diffusify.models.recipe import Recipe
from diffusify.models.saving import load_denoiser, merge_adapters, save_denoiser
from tests.families import tiny_network
from tests.text import makers

BIDIRECTIONAL, BLOCKS = Bidirectional(), BlockCausal(4, clean="block")
# The network, the shift, the attention pattern and the mask token of a tiny model of each layout.
MODELS: dict[str, tuple[str, int, AttentionPattern, int]] = {
    "diffugpt": ("gpt2", 1, BIDIRECTIONAL, 2),
    "diffullama": ("llama", 1, BIDIRECTIONAL, 2),
    "dream": ("qwen2", 1, BIDIRECTIONAL, 2),
    "llada": ("llama", 0, BIDIRECTIONAL, 2),
    "llada_moe": ("qwen3_moe", 0, BIDIRECTIONAL, 2),
    "sdar": ("qwen3", 0, BLOCKS, 151669),
    "a2d": ("qwen3", 0, BIDIRECTIONAL, 2),
    "fast_dllm": ("qwen2", 1, BlockCausal(32, clean="block"), 151665),
}
# config.json of JetLM/SDAR-1.7B-Chat as mirrored in github.com/hxhcreate/DARE, models/SDAR-1dot7B-Chat.
RELEASED_SDAR = {
    "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "block_size": 4, "mask_token_id": 151669, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 32768,
    "max_window_layers": 28, "model_type": "sdar", "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def tiny_tokenizer(mask: int) -> PreTrainedTokenizerBase:
    """A tokenizer whose mask token is `mask`: of bytes and merges, or of some words and this token."""
    if mask == 2:
        return makers.byte_level().tokenizer
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(50)} | {"<|mask|>": mask}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2", mask_token="<|mask|>")


def save_tiny(
    folder: Path,
    family: str,
    shift: int,
    attention: AttentionPattern,
    mask: int = 2,
    tokenizer: PreTrainedTokenizerBase | None = None,
    frame: DocumentFrame = DocumentFrame(),
    **changes: Any,
) -> Denoiser:
    """A tiny random diffusion model, saved in `folder`."""
    settings: dict[str, Any] = {"vocab_size": 320, "eos_token_id": 0, "bos_token_id": 0}
    if mask > 320:
        settings |= {"vocab_size": 151936, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    network = tiny_network(family, **(settings | changes))
    config = DiffusionConfig(mask, shift, attention, type(network).__name__, base_model="lab/base", frame=frame)
    denoiser = Denoiser(network, config).eval()
    save_denoiser(folder, denoiser, tokenizer or tiny_tokenizer(mask))
    return denoiser


def logits_of(denoiser: Denoiser) -> torch.Tensor:
    """The logits of a text with masks."""
    tokens = torch.arange(20, 44).view(2, 12)
    is_open = (torch.arange(12) % 3 == 2).expand(2, 12)
    mask = denoiser.diffusion_config.mask_token_id
    canvas = Canvas(torch.where(is_open, mask, tokens), is_open, is_open, torch.ones_like(tokens))
    with torch.no_grad():
        return denoiser(canvas).logits


def test_every_layout_is_tested() -> None:
    assert set(MODELS) == set(LAYOUTS) == set(TARGETS) - {"gguf", "hf"}


@pytest.mark.parametrize("to", MODELS)
def test_export_then_import_gives_equal_logits(to: str, tmp_path: Path) -> None:
    family, shift, attention, mask = MODELS[to]
    denoiser = save_tiny(tmp_path / "model", family, shift, attention, mask)
    out = export(tmp_path / "model", tmp_path / "out", to=to)
    settings = json.loads((out / "config.json").read_text())
    assert settings["architectures"] == [LAYOUTS[to].networks[settings["model_type"]][1]]
    generation = json.loads((out / "generation_config.json").read_text())
    assert settings["mask_token_id"] == generation["mask_token_id"] == mask
    assert settings.get(LAYOUTS[to].block_key) == (attention.size if isinstance(attention, BlockCausal) else None)
    assert not list(out.glob("*.py")) and not (out / "diffusion_config.json").exists()
    given = load_file(tmp_path / "model" / "model.safetensors")
    kept = load_file(out / "model.safetensors")
    assert {LAYOUTS[to].released_name(name) for name in given} == set(kept)
    assert all(torch.equal(kept[LAYOUTS[to].released_name(name)], weight) for name, weight in given.items())
    again, tokenizer = load_denoiser(import_denoiser(str(out), tmp_path / "again", layout=to))
    config = again.diffusion_config
    assert (config.mask_token_id, config.shift, config.attention) == (mask, shift, attention)
    assert torch.equal(logits_of(again), logits_of(denoiser))
    assert tokenizer.mask_token_id == mask
    if mask == 2:
        assert tokenizer.encode("The fox") == tiny_tokenizer(mask).encode("The fox")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_generation_config_of_the_base_is_kept(family: str, tmp_path: Path) -> None:
    """Also sampling values beside greedy decoding, which transformers does not save; masked models have none."""
    save_tiny(tmp_path / "model", family, 0, BIDIRECTIONAL)
    values = {"temperature": 0.9, "top_p": 0.6} if family == "llama" else {}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(values))
    out = export(tmp_path / "model", tmp_path / "out", to="hf")
    assert json.loads((out / "generation_config.json").read_text()).items() >= (values | {"mask_token_id": 2}).items()


def test_a_card_tells_how_to_run_it(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "qwen2", 1, BIDIRECTIONAL)
    readme = tmp_path / "model" / "README.md"
    readme.write_text(readme.read_text().replace("library_name:", "license: mit\nbase_model: lab/base\nlibrary_name:"))
    for to in ("dream", "hf", "gguf"):
        out = export(tmp_path / "model", tmp_path / to, to=to)
        card = metadata_load(out / "README.md") or {}
        assert (card["license"], card["base_model"], card["pipeline_tag"]) == ("mit", "lab/base", "text-generation")
        assert card["library_name"] == {"dream": "transformers", "hf": "diffusify", "gguf": "gguf"}[to]
        assert "diffusion-language-model" in card["tags"]
    assert "trust_remote_code" in (tmp_path / "dream" / "README.md").read_text()
    assert json.loads((tmp_path / "dream" / "config.json").read_text())["auto_map"]["AutoModel"] == (
        "Dream-org/Dream-v0-Instruct-7B--modeling_dream.DreamModel"
    )


def test_an_sdar_config_has_the_fields_of_a_released_one(tmp_path: Path) -> None:
    """Field by field beside a release: the same names, and the same values where the size does not decide them."""
    save_tiny(tmp_path / "model", "qwen3", 0, BLOCKS, 151669)
    out = export(tmp_path / "model", tmp_path / "out", to="sdar", dtype="bfloat16")
    ours = json.loads((out / "config.json").read_text())
    assert set(ours) - set(RELEASED_SDAR) == {"auto_map", "layer_types", "pad_token_id"}
    assert set(RELEASED_SDAR) <= set(ours)
    sizes = {key for key in RELEASED_SDAR if "size" in key or "num_" in key} - {"block_size", "vocab_size"}
    sizes |= {"head_dim", "max_position_embeddings", "bos_token_id", "eos_token_id", "rope_theta", "use_cache"}
    assert {key: ours[key] for key in RELEASED_SDAR.keys() - sizes} == {
        key: value for key, value in RELEASED_SDAR.items() if key not in sizes
    }
    assert all(type(ours[key]) is type(RELEASED_SDAR[key]) for key in sizes - {"rope_theta"})


@pytest.mark.parametrize("to", ["hf", "llada", "gguf"])
def test_adapters_are_merged_while_they_are_read(to: str, tmp_path: Path, causal_base: str, corpus: str) -> None:
    """As by `diffusify merge`, bit for bit; the mask token is new to the base, which gets an embedding more."""
    small: dict[str, Any] = {"steps": 2, "length": 32, "held_out": 64, "bf16": False, "learning_rate": 0.01}
    shift = diffusify.ar(0, shift=0)
    model = diffusify.adapt(causal_base, corpus, tmp_path / "lora", recipe=shift, lora=Lora(2), **small)
    merged = merge_adapters(model, tmp_path / "merged")
    kinds = {"hf": str, "llada": LAYOUTS["llada"].released_name}
    out, whole = (export(folder, tmp_path / f"{folder.name}-{to}" / "out", to=to) for folder in (model, merged))
    if to == "gguf":
        assert (out / "out.gguf").read_bytes() == (whole / "out.gguf").read_bytes()
        return
    expected = load_file(merged / "model.safetensors")
    written = load_file(out / "model.safetensors")
    assert {kinds[to](name) for name in expected} == set(written)
    assert all(torch.equal(written[kinds[to](name)], weight) for name, weight in expected.items())
    if to == "hf":
        assert torch.equal(logits_of(load_denoiser(out)[0]), logits_of(load_denoiser(model)[0]))


@pytest.mark.parametrize(
    ("family", "changes", "recipe"),
    [
        ("llama", {}, diffusify.ar(0, variable_length=True)),
        ("llama", {"tie_word_embeddings": True}, diffusify.ar(0, variable_length=True)),
        ("bert", {}, diffusify.mlm(variable_length=True)),
    ],
)
def test_the_rows_of_length_tokens_are_merged(
    family: str, changes: dict[str, Any], recipe: Recipe, tmp_path: Path, corpus: str
) -> None:
    """They are new to the base, and trained in the head as well."""
    base = tmp_path / "base"
    tokenizer = makers.word_piece() if family == "bert" else makers.byte_level()
    tiny_network(family, vocab_size=len(tokenizer.tokenizer), **changes).save_pretrained(base)
    tokenizer.tokenizer.save_pretrained(base)
    small: dict[str, Any] = {"steps": 2, "length": 32, "held_out": 64, "bf16": False, "learning_rate": 0.01}
    model = diffusify.adapt(str(base), corpus, tmp_path / "lora", recipe=recipe, lora=Lora(2), **small)
    merged = load_file(merge_adapters(model, tmp_path / "merged") / "model.safetensors")
    written = load_file(export(model, tmp_path / "out", to="hf") / "model.safetensors")
    assert merged.keys() == written.keys() and all(torch.equal(written[name], merged[name]) for name in merged)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # of PEFT
def test_adapters_of_experts_are_merged_before(tmp_path: Path) -> None:
    denoiser = save_tiny(tmp_path / "base", "qwen3_moe", 0, BIDIRECTIONAL)
    add_lora(denoiser.network, Lora(2), 2, str(tmp_path / "base"))
    save_denoiser(tmp_path / "lora", denoiser, tiny_tokenizer(2))
    with pytest.raises(ValueError, match="such as .*experts.*; merge them first: diffusify merge"):
        export(tmp_path / "lora", tmp_path / "out", to="llada_moe")
    out = export(merge_adapters(tmp_path / "lora", tmp_path / "merged"), tmp_path / "out", to="llada_moe")
    again, _ = load_denoiser(import_denoiser(str(out), tmp_path / "again"))
    assert torch.allclose(logits_of(again), logits_of(denoiser), atol=1e-5)


def test_hf_keeps_everything_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = save_tiny(tmp_path / "model", "llama", 1, BIDIRECTIONAL)
    denoiser.add_length_head(5)
    save_denoiser(tmp_path / "model", denoiser, tiny_tokenizer(2))
    for to in ("llada", "gguf"):
        with pytest.raises(ValueError, match=f"has a length head, for which {to} has no word; use --to hf"):
            export(tmp_path / "model", tmp_path / "other", to=to)
    monkeypatch.setattr(stored_tensors, "MAX_SHARD_BYTES", 30_000)
    result = CliRunner().invoke(
        app, ["export", str(tmp_path / "model"), "--to", "hf", "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]
    )
    out = tmp_path / "out"
    assert result.exit_code == 0, result.output
    assert (out / "model.safetensors.index.json").is_file() and len(list(out.glob("*.safetensors"))) > 2
    again = load_denoiser(out)[0]
    assert again.diffusion_config == denoiser.diffusion_config and again.length_head is not None
    torch.testing.assert_close(logits_of(again), logits_of(denoiser), atol=0.5, rtol=0.1)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model", "to", "reason"),
    [
        (("qwen3", 0, BLOCKS), "sdar", "mask_token_id=2 and 320 embeddings, but .* know only 151669 .*mask_token_id="),
        (("qwen3", 0, BIDIRECTIONAL), "sdar", "does not decode in blocks, and sdar models do; use --to a2d or hf"),
        (("qwen2", 0, BIDIRECTIONAL), "dream", "shift=0, and dream models have shift=1; use --to a2d or hf"),
        (("llama", 1, BIDIRECTIONAL), "llada", "shift=1, and llada models have shift=0; use --to diffullama or hf"),
        (("gpt2", 1, BIDIRECTIONAL), "dream", "is a gpt2 network, and dream models are qwen2; use --to diffugpt or hf"),
        (("llama", 0, BLOCKS), "llada", "decodes in blocks, and llada models do not; use --to a2d or hf"),
        (("llama", 1, BlockCausal(4)), "a2d", "decodes in blocks after causal text, .* use --to gguf for its AR half"),
        (("llama", 0, Prefix()), "llada", "has attention Prefix.*, for which llada has no word; use --to hf"),
        (("bert", 0, BIDIRECTIONAL), "gguf", "is a bert network, and --to gguf writes llama, mistral, qwen2, qwen3"),
        (("qwen3", 1, BIDIRECTIONAL), "gguf", "qwen3 network, and llama.cpp's diffusion program runs llama, mistral"),
        (("llama", 0, BLOCKS), "gguf", "without an AR half, which llama.cpp has no mask for; use --to sdar, a2d or hf"),
    ],
)
def test_what_has_no_target_is_refused(model: Any, to: str, reason: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", *model)
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "model", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "to", "reason"),
    [
        ("llama", {"attention_bias": True}, "llada", "attention_bias=True, for which LLaDAModelLM has no word"),
        ("llama", {"head_dim": 16}, "llada", "head_dim=16, for which LLaDAModelLM has no word"),
        ("llama", {"attention_bias": True}, "gguf", r"tensor .*_proj\.bias, for which --to gguf \(llada\)"),
        ("llama", {"hidden_act": "gelu"}, "gguf", "hidden_act=gelu, for which"),
        ("mistral", {"sliding_window": 8}, "gguf", "sliding_window=8, for which"),
        ("llama", {"rope_parameters": LLAMA_3}, "gguf", "rope_scaling=.*llama3.*, for which"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "gguf", "rope_scali"),
    ],
)
def test_settings_without_a_word_are_refused(family: str, changes: Any, to: str, reason: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", family, 0, BIDIRECTIONAL, **changes)
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "model", tmp_path / "out", to=to)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"to": "onnx"}, 'to "onnx" is not known'),
        ({"to": "hf", "dtype": "q8_0"}, 'dtype "q8_0" is not known for --to hf'),
        ({"to": "gguf", "dtype": "q4_k"}, 'dtype "q4_k" is not known for --to gguf'),
        ({"to": "gguf", "dtype": "q8_0"}, "rows of 48, and q8_0 needs multiples of 32; use float16"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: Any, reason: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", 1, BIDIRECTIONAL)
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "model", tmp_path / "out", **options)
    with pytest.raises(ValueError, match="give an empty or new folder"):
        export(tmp_path / "model", tmp_path / "model", to="hf")


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", 1, BIDIRECTIONAL)
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {"score": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="unknown: score"):
        export(tmp_path / "model", tmp_path / "out", to="hf")
