"""Released diffusion models are imported with their authors' logits, or refused with the reason."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from diffusify.canvas import Canvas
from diffusify.cli import app
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.diffusion.length_tokens import LengthTokens
from diffusify.diffusion.policies import Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.formats import stored_tensors
from diffusify.formats.importers import import_denoiser
from diffusify.models import downloading
from diffusify.models.denoiser import Denoiser
from diffusify.models.saving import load_denoiser
from diffusify.sampling.diffusion_lm import DiffusionLM
from tests.families import tiny_network
from tests.text import makers

VECTORS_FOLDER = Path(__file__).parents[1] / "data" / "layouts"
BLOCK_POLICY = Unmask(quota=Threshold(0.9))
STOCK_TYPES = {
    "diffugpt": "gpt2",
    "diffullama": "llama",
    "Dream": "qwen2",
    "sdar": "qwen3",
    "a2d-qwen3": "qwen3",
    "a2d-qwen2": "qwen2",
    "a2d-llama": "llama",
    "Fast_dLLM_Qwen": "qwen2",
}
# The settings of LLaDA-MoE's configuration class (dllm's configuration_lladamoe.py), at a tiny size.
LLADA_MOE = {
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "vocab_size": 320, "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu",
    "max_position_embeddings": 64, "initializer_range": 0.02, "rms_norm_eps": 1e-5, "use_cache": False,
    "tie_word_embeddings": False, "attention_dropout": 0.0, "attention_bias": False, "clip_qkv": None,
    "dense_intermediate_size": 64, "expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": None, "moe_layer_freq": None, "qk_layernorm": True, "rope_theta": 50000,
    "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False, "output_router_logits": False,
    "router_aux_loss_coef": 0.01, "router_num_group": None, "router_topk_group": None, "routed_scaling_factor": 1,
    "norm_topk_prob": None, "rope_scaling": None, "pad_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def word_tokenizer(count: int, **roles: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `count` words."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2", **roles)


def write_json(file: Path, **changes: Any) -> None:
    """Set some keys of a JSON file; None removes a key."""
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def released(kind: str, folder: Path, rows: int = 320, **config: Any) -> PreTrainedModel:
    """A tiny random model in the layout of a release, with a byte-level tokenizer and remote code that must not run."""
    stock_type = STOCK_TYPES[kind]
    changes: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2} if stock_type == "gpt2" else {}
    if rows > 1000 and stock_type != "gpt2":
        changes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    network = tiny_network(stock_type, vocab_size=rows, eos_token_id=0, bos_token_id=0, **changes)
    network.save_pretrained(folder)
    makers.byte_level().tokenizer.save_pretrained(folder)
    (folder / "own.py").write_text("raise SystemExit('remote code was run')")
    remote: dict[str, Any] = {"auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    kind = {"diffugpt": "gpt2", "diffullama": "llama"}.get(kind, kind)
    write_json(folder / "config.json", model_type=kind, architectures=["OwnModel"], **(remote | config))
    write_json(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.Tokenizer", None]},
    )
    if kind == "gpt2":
        edit(folder, lambda weights: {released_name(name): weight for name, weight in weights.items()})
    return network


def released_name(name: str) -> str:
    """A GPT-2 tensor's name inside DiffuGPT's wrapper class."""
    return "embed_tokens.weight" if name == "transformer.wte.weight" else name.replace("transformer.", "denoise_model.")


def edit(folder: Path, change: Any) -> None:
    """Save the weights that `change` returns, or that it changed in place."""
    weights = load_file(folder / "model.safetensors")
    changed = change(weights)
    save_file(changed if isinstance(changed, dict) else weights, folder / "model.safetensors")


def split_into_two_files(folder: Path) -> None:
    weights = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, shard in enumerate((weights[::2], weights[1::2]), 1):
        name = f"model-{i:05}-of-00002.safetensors"
        save_file(dict(shard), folder / name)
        weight_map |= {key: name for key, _ in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def logits_of(denoiser: Denoiser) -> torch.Tensor:
    tokens = torch.arange(20, 44).view(2, 12)
    with torch.no_grad():
        return denoiser(Canvas.clean(tokens)).logits


@pytest.fixture
def vectors(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of weights in a released layout, their logits as the authors' code computes them, and a tokenizer."""
    folder = tmp_path / request.param
    shutil.copytree(VECTORS_FOLDER / request.param, folder)
    word_tokenizer(95).save_pretrained(folder)
    return folder


@pytest.fixture
def sdar(tmp_path: Path) -> Path:
    released("sdar", tmp_path / "sdar", mask_token_id=2)
    return tmp_path / "sdar"


@pytest.fixture
def diffugpt(tmp_path: Path) -> Path:
    released("diffugpt", tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("vectors", "architecture", "shift"),
    [("llada", "LlamaForCausalLM", 0), ("dream", "Qwen2ForCausalLM", 1)],
    indirect=["vectors"],
)
def test_logits_equal_the_authors(vectors: Path, architecture: str, shift: int, tmp_path: Path) -> None:
    out = import_denoiser(str(vectors), tmp_path / "out")
    denoiser, tokenizer = load_denoiser(out)
    assert denoiser.diffusion_config == DiffusionConfig(
        95, shift, Bidirectional(), architecture, recipe="ar", base_model=str(vectors)
    )
    assert tokenizer.mask_token_id == 95
    expected = load_file(vectors / "expected.safetensors")
    with torch.no_grad():
        logits = denoiser(Canvas.clean(expected["input_ids"])).logits
        plain = AutoModelForCausalLM.from_pretrained(out)(input_ids=expected["input_ids"]).logits
    torch.testing.assert_close(plain, expected["logits"], atol=1e-5, rtol=0)  # transformers alone
    assert (logits[..., 95] == -torch.inf).all()  # the authors' networks may predict the mask token
    ours, theirs = logits[:, shift:, :95], expected["logits"][:, : 12 - shift, :95]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vectors", ["llada"], indirect=True)
def test_every_llada_tensor_is_kept(vectors: Path, tmp_path: Path) -> None:
    released_weights = load_file(vectors / "model.safetensors")
    kept = load_file(import_denoiser(str(vectors), tmp_path / "out") / "model.safetensors")
    assert len(kept) == len(released_weights)
    assert torch.equal(
        kept["model.layers.1.mlp.gate_proj.weight"], released_weights["model.transformer.blocks.1.ff_proj.weight"]
    )
    assert torch.equal(kept["lm_head.weight"], released_weights["model.transformer.ff_out.weight"])


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("Dream", {}, (2, 1, Bidirectional(), "Qwen2ForCausalLM")),
        ("sdar", {}, (2, 0, BlockCausal(4, clean="block"), "Qwen3ForCausalLM")),
        ("sdar", {"block_size": 8}, (2, 0, BlockCausal(8, clean="block"), "Qwen3ForCausalLM")),
        ("a2d-qwen3", {}, (2, 0, Bidirectional(), "Qwen3ForCausalLM")),
        ("a2d-qwen2", {}, (2, 0, Bidirectional(), "Qwen2ForCausalLM")),
        ("a2d-llama", {"block_size": 16}, (2, 0, BlockCausal(16, clean="block"), "LlamaForCausalLM")),
        ("diffullama", {"mask_token_id": 2}, (2, 1, Bidirectional(), "LlamaForCausalLM")),
        ("diffugpt", {"mask_token_id": 2}, (2, 1, Bidirectional(), "GPT2LMHeadModel")),
        ("Fast_dLLM_Qwen", {}, (2, 1, BlockCausal(32, clean="block"), "Qwen2ForCausalLM")),
    ],
)
def test_layouts(kind: str, options: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    source = tmp_path / f"tiny-{kind}"
    network = released(kind, source)
    given = load_file(source / "model.safetensors")
    out = import_denoiser(str(source), tmp_path / "out", **options)
    denoiser, tokenizer = load_denoiser(out)
    block_model = isinstance(expected[2], BlockCausal)
    assert denoiser.diffusion_config == DiffusionConfig(
        *expected,
        recipe="block" if block_model else "ar",
        base_model=str(source),
        policy=BLOCK_POLICY if block_model else Unmask(),
    )
    assert tokenizer.mask_token_id == 2 and tokenizer.encode("The fox") == makers.byte_level().encode("The fox")
    assert json.loads((out / "config.json").read_text()).get("is_causal") is (None if block_model else False)
    assert ("block-diffusion" in (metadata_load(out / "README.md") or {})["tags"]) is block_model
    kept = load_file(out / "model.safetensors")
    assert len(kept) == len(given)  # no tensor is dropped or added
    for name, weight in network.state_dict().items():
        assert torch.equal(denoiser.network.state_dict()[name], weight), name
    torch.testing.assert_close(logits_of(denoiser), logits_of(Denoiser(network, denoiser.diffusion_config)))
    stock = AutoModelForCausalLM.from_pretrained(out)
    assert type(stock).__name__ == expected[3] == type(denoiser.network).__name__
    assert all(torch.equal(weight, kept[name]) for name, weight in stock.state_dict().items() if name in kept)
    assert not list(out.glob("*.py")) and "auto_map" not in "".join(file.read_text() for file in out.glob("*.json"))
    lm = DiffusionLM.from_pretrained(out)
    assert lm.generate("The fox", max_new_tokens=8, steps=4).text.startswith("The fox")


@pytest.mark.parametrize(
    ("kind", "rows", "mask"),
    [
        *(("diffugpt", 50257, 10541), ("diffugpt", 50258, 50257), ("diffullama", 32000, 811)),
        *(("sdar", 151936, 151669), ("Fast_dLLM_Qwen", 151936, 151665)),
    ],
)
def test_mask_tokens_that_only_the_layout_knows(kind: str, rows: int, mask: int, tmp_path: Path) -> None:
    source = tmp_path / kind
    released(kind, source, rows, **({"vocab_size": 50257} if kind == "diffugpt" else {}))
    word_tokenizer(mask if rows > 100_000 else min(rows, 50257)).save_pretrained(source)
    write_json(source / "config.json", eos_token_id=2, bos_token_id=1)
    denoiser, tokenizer = load_denoiser(import_denoiser(str(source), tmp_path / "out"))
    assert denoiser.diffusion_config.mask_token_id == tokenizer.mask_token_id == mask
    assert tokenizer.mask_token == (f"w{mask}" if mask < min(rows, 50257) else "<|mask|>")
    assert denoiser.network.get_input_embeddings().get_parameter("weight").shape[0] == rows


def test_the_block_size_comes_from_the_config_or_the_user(sdar: Path, tmp_path: Path) -> None:
    write_json(sdar / "config.json", block_size=32)
    assert load_denoiser(import_denoiser(str(sdar), tmp_path / "out"))[0].diffusion_config.block_size == 32
    again = import_denoiser(str(sdar), tmp_path / "again", block_size=8)
    assert DiffusionConfig.load(again).block_size == 8


@pytest.mark.parametrize(
    ("name", "size"),
    [("SDAR-4B-Chat-b64", 64), ("SDAR-1.7B-b16-v2", 16), ("sdar_block_size8", 8), ("SDAR-30B-A3B-bf16", 4)],
)
def test_the_block_size_of_a_name_is_used(sdar: Path, name: str, size: int, tmp_path: Path) -> None:
    source = sdar.rename(tmp_path / name)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["import", str(source), "--out", str(out)])
    assert result.exit_code == 0 and DiffusionConfig.load(out).block_size == size
    assert f"decodes in blocks of {size} tokens" in result.output
    write_json(source / "config.json", block_size=32)
    if size != 4:
        with pytest.raises(ValueError, match=f"a block size of 32, but its name {size}; give --block-size"):
            import_denoiser(str(source), tmp_path / "again")
    again = import_denoiser(str(source), tmp_path / "again", block_size=2)
    assert DiffusionConfig.load(again).block_size == 2


def test_a_block_model_of_unknown_size_is_refused(tmp_path: Path) -> None:
    released("a2d-qwen3", tmp_path / "Qwen3-bd3lm")
    with pytest.raises(ValueError, match="do not give their size; give --block-size"):
        import_denoiser(str(tmp_path / "Qwen3-bd3lm"), tmp_path / "out")


def test_llada_moe(tmp_path: Path) -> None:
    """Experts are weighted by the softmax over all of them, so the weights of those that are chosen do not add to 1."""
    source = tmp_path / "moe"
    settings = {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "intermediate_size": 64}
    rope = {"rope_theta": 50000.0, "rope_type": "default"}
    network = tiny_network("qwen3_moe", vocab_size=320, rope_parameters=rope, **settings)
    network.save_pretrained(source)
    makers.byte_level().tokenizer.save_pretrained(source)
    (source / "config.json").write_text(json.dumps(LLADA_MOE))
    denoiser, _ = load_denoiser(import_denoiser(str(source), tmp_path / "out"))
    assert type(denoiser.network).__name__ == "Qwen3MoeForCausalLM" and not denoiser.config.norm_topk_prob
    assert torch.equal(logits_of(denoiser), logits_of(Denoiser(network, denoiser.diffusion_config)))
    write_json(source / "config.json", moe_router_enable_expert_bias=True)
    with pytest.raises(ValueError, match="moe_router_enable_expert_bias=True, which stock qwen3_moe networks do not"):
        import_denoiser(str(source), tmp_path / "other")


def test_dreamon_is_dream_with_more_tokens(tmp_path: Path) -> None:
    """Its tokens that stand for two masks and for none change the length of a span; the network is Dream's."""
    source = tmp_path / "DreamOn-v0-7B"
    network = released("Dream", source, 322, mask_token_id=2)
    tokenizer = makers.byte_level().tokenizer
    tokenizer.add_tokens(["<|expand|>", "<|delete|>"], special_tokens=True)
    tokenizer.save_pretrained(source)
    lm = DiffusionLM.from_pretrained(import_denoiser(str(source), tmp_path / "out"))
    assert lm.tokenizer.tokenizer.convert_tokens_to_ids(["<|expand|>", "<|delete|>"]) == [320, 321]
    torch.testing.assert_close(logits_of(lm.denoiser), logits_of(Denoiser(network, lm.config).eval()))
    assert lm.config.length_tokens == LengthTokens(320, 321)
    text = lm.infill("The fox[[...]] over").text
    assert text.startswith("The fox") and text.endswith(" over")


@pytest.mark.parametrize("text", ["<|mask|>", "<|MASK|>"])
def test_a2d_finds_its_mask_by_name(text: str, tmp_path: Path) -> None:
    released("a2d-qwen3", tmp_path / "a2d")
    tokenizer = word_tokenizer(300)
    tokenizer.add_tokens([text], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "a2d")
    assert DiffusionConfig.load(import_denoiser(str(tmp_path / "a2d"), tmp_path / "out")).mask_token_id == 300


@pytest.mark.parametrize(
    ("stored", "requested", "saved"),
    [
        (torch.float16, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float16", torch.float16),
    ],
)
def test_weights_are_saved_in_the_stored_or_the_requested_dtype(
    stored: torch.dtype, requested: str | None, saved: torch.dtype, sdar: Path, tmp_path: Path
) -> None:
    edit(sdar, lambda weights: {name: weight.to(stored) for name, weight in weights.items()})
    out = import_denoiser(str(sdar), tmp_path / "out", dtype=requested)
    given = load_file(sdar / "model.safetensors")
    for name, weight in load_file(out / "model.safetensors").items():
        assert weight.dtype == saved and torch.equal(weight, given[name].to(saved))
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == saved


def test_weights_beyond_float16_are_refused(sdar: Path, tmp_path: Path) -> None:
    edit(sdar, lambda weights: weights["model.norm.weight"].fill_(1e5))
    with pytest.raises(ValueError, match=r"model\.norm\.weight does not fit into float16"):
        import_denoiser(str(sdar), tmp_path / "out", dtype="float16")
    assert not list((tmp_path / "out").iterdir())


def test_sharded_weights_are_read_and_written(sdar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_denoiser(import_denoiser(str(sdar), tmp_path / "whole"))[0]
    split_into_two_files(sdar)
    monkeypatch.setattr(stored_tensors, "MAX_SHARD_BYTES", 30_000)
    out = import_denoiser(str(sdar), tmp_path / "out")
    assert not (out / "model.safetensors").exists() and len(list(out.glob("model-0*.safetensors"))) > 2
    assert torch.equal(logits_of(load_denoiser(out)[0]), logits_of(whole))


def test_stored_copies_of_tied_weights_and_buffers_are_no_error(diffugpt: Path, tmp_path: Path) -> None:
    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["embed_tokens.weight"].clone()
        weights["denoise_model.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
        weights["denoise_model.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    edit(diffugpt, add)
    out = import_denoiser(str(diffugpt), tmp_path / "out", mask_token_id=2)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    edit(diffugpt, lambda weights: weights["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to embed_tokens\.weight"):
        import_denoiser(str(diffugpt), tmp_path / "other", mask_token_id=2)


def test_a_tokenizer_of_words_and_merges(tmp_path: Path) -> None:
    """A tokenizer such as Dream's: its own class over Qwen2's files, special tokens only in tokenizer_config.json."""
    source = tmp_path / "dream"
    released("Dream", source, mask_token_id=319)
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([makers.WORDS], BpeTrainer(vocab_size=317, initial_alphabet=alphabet))
    model = json.loads(trained.to_str())["model"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    special = dict(enumerate(["<|endoftext|>", "<|im_end|>", "<|mask|>"], 317))
    settings = {
        "added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in special.items()},
        "auto_map": {"AutoTokenizer": ["own.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer",
        "bos_token": "<|im_end|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    lm = DiffusionLM.from_pretrained(import_denoiser(str(source), tmp_path / "out"))
    assert lm.config.mask_token_id == lm.tokenizer.tokenizer.mask_token_id == 319
    assert (lm.tokenizer.start_token_id, lm.tokenizer.end_token_id) == (318, 317)
    assert lm.tokenizer.encode("The quick fox") == trained.encode("The quick fox").ids
    assert lm.tokenizer.decode(lm.tokenizer.encode("The quick fox")) == "The quick fox"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("embed_tokens.weight"), r"missing: embed_tokens\.weight"),
        (lambda weights: weights.pop("denoise_model.h.0.mlp.c_fc.bias"), r"missing: denoise_model\.h\.0\.mlp"),
        (lambda weights: weights.update(score=torch.ones(2)), "unknown: score"),
        (
            lambda weights: weights.update({"denoise_model.ln_f.weight": torch.ones(9)}),
            r"another shape: denoise_model\.ln_f\.weight \(9,\), not \(8,\)",
        ),
        (
            lambda weights: weights.update({"denoise_model.ln_f.weight": torch.ones(8, dtype=torch.int8)}),
            r"quantized: denoise_model\.ln_f\.weight \(I8\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, reason: str, diffugpt: Path, tmp_path: Path) -> None:
    edit(diffugpt, change)
    with pytest.raises(ValueError, match=reason):
        import_denoiser(str(diffugpt), tmp_path / "out", mask_token_id=2)
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_two_files_is_refused(sdar: Path, tmp_path: Path) -> None:
    split_into_two_files(sdar)
    save_file(load_file(sdar / "model-00001-of-00002.safetensors"), sdar / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="twice, in model-00001-of-00002.safetensors and model-00002"):
        import_denoiser(str(sdar), tmp_path / "out")


@pytest.mark.parametrize("vectors", ["llada"], indirect=True)
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("alibi", True, "alibi=True"),
        ("block_type", "sequential", "block_type='sequential'"),
        ("layer_norm_type", "default", "layer_norm_type='default'"),
        ("attention_layer_norm", True, "attention_layer_norm=True"),
        ("include_bias", True, "include_bias=True"),
        ("activation_type", "swiglu", "activation_type='swiglu'"),
        ("rope", None, "rope=None"),
        ("d_model", None, "does not give d_model"),
        ("mlp_hidden_size", 64, r"another shape: model\.transformer\.blocks\.0\.ff_out\.weight \(32, 48\)"),
        ("n_layers", 3, r"missing: model\.transformer\.blocks\.2\.attn_norm\.weight"),
        ("n_layers", 1, r"unknown: model\.transformer\.blocks\.1\.attn_norm\.weight"),
        ("weight_tying", True, r"ties model\.transformer\.ff_out\.weight"),
        ("eos_token_id", 96, "eos_token_id=96, beyond its 96 embeddings"),
        ("mask_token_id", 96, "mask_token_id=96 is beyond the 96 embeddings"),
        ("mask_token_id", None, r"llada, 96 embeddings\) does not name its mask token; give --mask-token-id"),
    ],
)
def test_configs_that_do_not_fit_are_refused(key: str, value: Any, reason: str, vectors: Path, tmp_path: Path) -> None:
    write_json(vectors / "config.json", **{key: value})
    with pytest.raises(ValueError, match=reason):
        import_denoiser(str(vectors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "name"), [("gpt2", "gpt2"), ("llama", "llama-2"), ("qwen3", "qwen3")])
def test_a_plain_model_is_referred_to_adapt(family: str, name: str, tmp_path: Path) -> None:
    tiny_network(family).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=f"looks like a plain {family} model: `diffusify adapt` .* --layout"):
        import_denoiser(str(tmp_path / name), tmp_path / "out")


def test_the_layout_may_be_given(tmp_path: Path) -> None:
    released("diffullama", tmp_path / "mine")
    with pytest.raises(ValueError, match="plain llama"):
        import_denoiser(str(tmp_path / "mine"), tmp_path / "out", mask_token_id=2)
    out = import_denoiser(str(tmp_path / "mine"), tmp_path / "out", layout="diffullama", mask_token_id=2)
    assert DiffusionConfig.load(out).shift == 1


def test_hub_weights_are_downloaded_after_their_config_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released("diffullama", tmp_path / "cache")
    downloads: list[list[str]] = []
    monkeypatch.setattr(
        downloading, "download_snapshot", lambda name, patterns: downloads.append(patterns) or tmp_path / "cache"
    )
    with pytest.raises(ValueError, match="lab/llama looks like a plain llama model"):
        import_denoiser("lab/llama", tmp_path / "out")
    assert downloads == [["*.json"]]
    out = import_denoiser("lab/DiffuLLaMA", tmp_path / "out", mask_token_id=2)
    assert DiffusionConfig.load(out).base_model == "lab/DiffuLLaMA"
    assert "*.safetensors" in downloads[-1] and "*.py" not in downloads[-1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layout": "dreem"}, 'layout "dreem" is not known; did you mean "dream"'),
        ({"layout": "dream"}, "layout dream has model_type Dream, but .* has sdar"),
        ({"dtype": "float8"}, 'dtype "float8" is not known'),
        ({"block_size": 0}, "block size 0"),
        ({"mask_token_id": 320}, "mask_token_id=320 is beyond the 320 embeddings"),
        ({"mask_token_id": -1}, "mask_token_id=-1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: Any, reason: str, sdar: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        import_denoiser(str(sdar), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_block_size_is_refused_for_models_without_blocks(diffugpt: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diffugpt models do not decode in blocks; it is for sdar and a2d and fast"):
        import_denoiser(str(diffugpt), tmp_path / "out", block_size=4)


def test_an_unknown_diffugpt_needs_its_mask_token(diffugpt: Path, tmp_path: Path) -> None:
    word_tokenizer(320).save_pretrained(diffugpt)
    with pytest.raises(ValueError, match="give --mask-token-id"):
        import_denoiser(str(diffugpt), tmp_path / "out")


def test_unknown_model_types_are_refused(sdar: Path, tmp_path: Path) -> None:
    write_json(sdar / "config.json", model_type="llada2_moe")
    with pytest.raises(ValueError, match="model_type llada2_moe, which cannot be imported; .* Dream, llada, llada_moe"):
        import_denoiser(str(sdar), tmp_path / "out")


def test_a_model_without_its_tokenizer_is_refused(sdar: Path, tmp_path: Path) -> None:
    (sdar / "tokenizer.json").rename(sdar / "other.json")
    with pytest.raises(ValueError, match="has no tokenizer"):
        import_denoiser(str(sdar), tmp_path / "out")
    (sdar / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        import_denoiser(str(sdar), tmp_path / "out")


@pytest.mark.parametrize(
    ("count", "reason"), [(321, "ids up to 320, beyond the 320 embeddings"), (250, "no token for mask_token_id=300")]
)
def test_a_tokenizer_of_another_model_is_refused(count: int, reason: str, sdar: Path, tmp_path: Path) -> None:
    word_tokenizer(count).save_pretrained(sdar)
    with pytest.raises(ValueError, match=reason):
        import_denoiser(str(sdar), tmp_path / "out", mask_token_id=300)


def test_importing_twice_is_refused(sdar: Path, tmp_path: Path) -> None:
    out = import_denoiser(str(sdar), tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    with pytest.raises(ValueError, match="holds other files; give an empty or new folder"):
        import_denoiser(str(sdar), out)
    assert before == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    with pytest.raises(ValueError, match="needs no import"):
        import_denoiser(str(out), tmp_path / "again")


@pytest.mark.parametrize("source", ["./nowhere", "nobody/nothing"])
def test_a_missing_source_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{source} "):
        import_denoiser(source, tmp_path / "out")


def test_pickled_weights_are_not_opened(sdar: Path, tmp_path: Path) -> None:
    (sdar / "model.safetensors").rename(sdar / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no model.safetensors"):
        import_denoiser(str(sdar), tmp_path / "out")
