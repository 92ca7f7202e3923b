"""GGUF files have every tensor and key, and the network's logits in llama.cpp and in transformers."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from tokenizers import pre_tokenizers

import diffusify
from diffusify.config import DocumentFrame
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.formats.exporting import export
from diffusify.formats.gguf_export import permute
from diffusify.models.loading import load_base, load_tokenizer
from diffusify.models.saving import load_ar_half
from tests.formats.test_exporting import save_tiny
from tests.text import makers

BIDIRECTIONAL = Bidirectional()
LLAMA_TENSORS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
SPECIAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def llama_3(theta: float, length: int) -> dict[str, Any]:
    """The scaled rotary embedding of Llama 3.2, for a base that was pretrained on texts of a length."""
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = scaling | {"rope_theta": theta, "original_max_position_embeddings": length}
    return {"head_dim": 64, "max_position_embeddings": 16 * length, "rope_parameters": rope}


def gguf_name(name: str) -> str:
    """The name in GGUF of a tensor of Llama, Qwen2 or Qwen3."""
    module, _, kind = name.rpartition(".")
    if module in SPECIAL:
        return f"{SPECIAL[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{LLAMA_TENSORS[rest]}.{kind}"


def keys(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def llamacpp() -> ModuleType:
    """The helper of the benchmark, which runs llama.cpp; skips the test where it is not installed."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it takes minutes to compile")
    spec = importlib.util.spec_from_file_location("llamacpp", Path(__file__).parents[2] / "benchmarks/llamacpp.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("family", "shift", "attention", "arch"),
    [
        ("llama", 1, BIDIRECTIONAL, "llada"),
        ("llama", 0, BIDIRECTIONAL, "llada"),
        ("mistral", 1, BIDIRECTIONAL, "llada"),
        ("qwen2", 1, BIDIRECTIONAL, "dream"),
        ("llama", 1, BlockCausal(4), "llama"),
        ("qwen2", 1, BlockCausal(4), "qwen2"),
        ("qwen3", 1, BlockCausal(4), "qwen3"),
    ],
)
def test_every_tensor_and_key(family: str, shift: int, attention: Any, arch: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"sliding_window": None} if family == "mistral" else {}
    denoiser = save_tiny(tmp_path / "model", family, shift, attention, **changes)
    out = export(tmp_path / "model", tmp_path / "tiny", to="gguf")
    reader = GGUFReader(out / "tiny.gguf")
    found = keys(reader)
    vocabulary = {key: found.pop(key) for key in list(found) if key.startswith("tokenizer.")}
    diffusion = {f"{arch}.attention.causal": False, "diffusion.shift_logits": shift == 1}
    assert found == (diffusion if arch in ("llada", "dream") else {}) | {
        "general.architecture": arch, "general.name": "tiny", "general.file_type": 0,
        f"{arch}.vocab_size": 320, f"{arch}.context_length": 64, f"{arch}.embedding_length": 32,
        f"{arch}.block_count": 2, f"{arch}.feed_forward_length": 48, f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2, f"{arch}.attention.key_length": 8, f"{arch}.attention.value_length": 8,
        f"{arch}.rope.dimension_count": 8, f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "model", "")  # that of Qwen2 splits words by a rule of its own
    assert vocabulary["tokenizer.ggml.tokens"] == [tokenizer.convert_ids_to_tokens(i) for i in range(320)]
    types = vocabulary["tokenizer.ggml.token_type"]
    assert types[:3] == [TokenType.CONTROL] * 3 and set(types[3:]) == {TokenType.NORMAL}
    names = {"model": "gpt2", "pre": "gpt-2", "bos_token_id": 0, "eos_token_id": 0, "add_bos_token": True}
    if family == "qwen2":
        names |= {"pre": "qwen2", "unknown_token_id": 0, "padding_token_id": 0}
    names |= {"mask_token_id": 2} if arch in ("llada", "dream") else {}
    assert len(vocabulary.pop("tokenizer.ggml.merges")) == 320 - 3 - 256
    del vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.token_type"]
    assert vocabulary == {f"tokenizer.ggml.{name}": value for name, value in names.items()}
    weights = denoiser.network.state_dict()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == {gguf_name(name) for name in weights}
    for name, weight in weights.items():
        heads = 4 if ".q_proj." in name else 2
        permuted = family in ("llama", "mistral") and (".q_proj." in name or ".k_proj." in name)
        expected = permute(weight, heads) if permuted else weight
        assert np.array_equal(tensors[gguf_name(name)].data, expected.numpy()), name
    assert (out / "Modelfile").is_file() is (attention != BIDIRECTIONAL)


def test_the_scaled_rope_of_llama_3(tmp_path: Path) -> None:
    """Factors as in llama.cpp's file of Llama 3.2: 1 for high frequencies, 32 for low ones, in between smooth."""
    save_tiny(tmp_path / "model", "llama", 1, BlockCausal(4), **llama_3(5e5, 8192))
    out = export(tmp_path / "model", tmp_path / "tiny", to="gguf", dtype="float16")
    [factors] = [each.data for each in GGUFReader(out / "tiny.gguf").tensors if each.name == "rope_freqs.weight"]
    assert factors.dtype == np.float32 and factors.shape == (32,)
    assert np.allclose(factors[:15], 1) and np.allclose(factors[18:], 32) and (np.diff(factors[14:19]) > 0).all()


def test_the_permutation_is_that_of_llama_files() -> None:
    """Two heads of four rows: row i of the first half of a head stands beside row i of its second half."""
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    assert permute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert permute(torch.arange(8.0), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2), ("q8_0", 1e-2)])
def test_smaller_data_types(dtype: str, error: float, tmp_path: Path) -> None:
    denoiser = save_tiny(tmp_path / "model", "llama", 1, BIDIRECTIONAL, intermediate_size=64)
    out = export(tmp_path / "model", tmp_path / "tiny", to="gguf", dtype=dtype)
    tensors = {tensor.name: tensor for tensor in GGUFReader(out / "tiny.gguf").tensors}
    for name, weight in denoiser.network.state_dict().items():
        tensor = tensors[gguf_name(name)]
        kind = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
        assert tensor.tensor_type.name == ("F32" if weight.dim() == 1 else kind)
        if "_proj" not in name:
            values = dequantize(tensor.data, tensor.tensor_type)
            assert abs(values - weight.numpy()).max() <= error * weight.abs().max()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_ar_half(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another reader of GGUF, and a base for more training."""
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path / "cache"))
    changes: dict[str, Any] = {"head_dim": 128} if family == "qwen3" else {}  # that reader knows no other for Qwen3
    save_tiny(tmp_path / "model", family, 1, BlockCausal(4), **changes)
    out = export(tmp_path / "model", tmp_path / "half", to="gguf")
    assert 'TEMPLATE """{{ .Prompt }}"""' in (out / "Modelfile").read_text()
    base = load_base(str(out / "half.gguf"))
    tokens = torch.arange(20, 44).view(2, 12)
    with torch.no_grad():
        theirs = base.network(tokens).logits
        ours = load_ar_half(tmp_path / "model")(tokens).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    ids = base.tokenizer.encode("The fox", add_special_tokens=False)
    assert ids == makers.byte_level().encode("The fox")


def test_of_masks_only_adapters_the_base_is_exported(causal_base: str, corpus: str, tmp_path: Path) -> None:
    model = diffusify.adapt(
        causal_base, corpus, tmp_path / "draft", recipe=diffusify.draft(4), steps=1, length=32, held_out=64, bf16=False
    )
    tensors = {t.name: t for t in GGUFReader(export(model, tmp_path / "x", to="gguf") / "x.gguf").tensors}
    for name, weight in load_base(causal_base).network.state_dict().items():
        if "q_proj" not in name and "k_proj" not in name:
            assert np.array_equal(tensors[gguf_name(name)].data, weight.numpy())
    with pytest.raises(ValueError, match="act on masks only, .* --to gguf exports the AR half, which is the base"):
        export(model, tmp_path / "y", to="hf")


def test_a_start_token_of_its_own(tmp_path: Path) -> None:
    frame = DocumentFrame(start_token_id=1, start_prompts=False)
    save_tiny(tmp_path / "model", "llama", 1, BIDIRECTIONAL, frame=frame)
    found = keys(GGUFReader(export(tmp_path / "model", tmp_path / "x", to="gguf") / "x.gguf"))
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (1, False)


def test_tokenizers_that_llama_cpp_has_no_rule_for_are_refused(tmp_path: Path) -> None:
    spaced: Any = makers.byte_level().tokenizer
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for i, (tokenizer, reason) in enumerate(
        [
            (makers.unigram().tokenizer, "is Unigram, and --to gguf writes BPE only"),
            (makers.word_piece().tokenizer, "is WordPiece, and --to gguf writes BPE only"),
            (spaced, "splits words by a rule that --to gguf has no name for; it knows those of gpt-2, smollm"),
        ]
    ):
        save_tiny(tmp_path / f"m{i}", "llama", 1, BIDIRECTIONAL, tokenizer=tokenizer)
        with pytest.raises(ValueError, match=reason):
            export(tmp_path / f"m{i}", tmp_path / "out", to="gguf")


@pytest.mark.parametrize(
    ("family", "attention", "changes"),
    [
        ("llama", BIDIRECTIONAL, {}),
        ("qwen2", BIDIRECTIONAL, {}),
        ("llama", BlockCausal(4), {}),
        ("llama", BlockCausal(4), llama_3(1e3, 16)),
        ("qwen3", BlockCausal(4), {}),
    ],
)
def test_llama_cpp_gives_our_logits(family: str, attention: Any, changes: Any, tmp_path: Path) -> None:
    module = llamacpp()
    denoiser = save_tiny(tmp_path / "model", family, 1, attention, **changes)
    model = module.GgufModel(export(tmp_path / "model", tmp_path / "x", to="gguf") / "x.gguf", length=32)
    tokens = list(range(20, 32))
    network: Any = denoiser.network
    network.config.is_causal = attention != BIDIRECTIONAL
    for layer in network.model.layers:
        layer.self_attn.is_causal = network.config.is_causal
    with torch.no_grad():
        ours = network(torch.tensor([tokens])).logits[0]
    theirs = model.logits(tokens, causal=network.config.is_causal)
    assert abs(theirs - ours.numpy()).max() < 1e-3
    text, tokenizer = "The quick fox: it's 35!", load_tokenizer(tmp_path / "model", "")
    assert model.tokenize(text) == tokenizer.encode(text, add_special_tokens=False)
    model.close()


def test_llama_cpp_splits_words_in_the_same_way(tmp_path: Path) -> None:
    """A byte-level tokenizer, and one as of Llama 2."""
    module = llamacpp()
    text = "The lazy dog's 123 mats,  and (so) it is! \n 45 foxes"
    for i, words in enumerate((makers.byte_level(), makers.sentence_bpe())):
        mask, count = words.mask_token_id, len(words.tokenizer)
        save_tiny(tmp_path / f"m{i}", "llama", 1, BIDIRECTIONAL, mask, words.tokenizer, vocab_size=count)
        model = module.GgufModel(export(tmp_path / f"m{i}", tmp_path / f"x{i}", to="gguf") / f"x{i}.gguf", length=32)
        assert model.tokenize(text) == words.encode(text) and model.mask_token_id == mask
        model.close()
