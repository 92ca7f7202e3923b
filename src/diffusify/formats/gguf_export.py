"""Export to GGUF: bidirectional models for llama.cpp's diffusion program, and AR halves for llama.cpp and Ollama."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from diffusify.diffusion.attention import Bidirectional
from diffusify.formats.export_card import AR_GGUF, DIFFUSION_GGUF, write_export_card
from diffusify.formats.gguf_tokenizer import write_tokenizer
from diffusify.formats.saved_model import SavedModel
from diffusify.formats.stored_tensors import StoredTensor, require_finite, saved_dtypes
from diffusify.models.attention_masks import sliding_windows
from diffusify.models.loading import num_embeddings
from diffusify.models.saving import staging_folder
from diffusify.text.tokenizer import TextTokenizer

GGUF_DTYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


@dataclass(frozen=True)
class GgufNetwork:
    """How llama.cpp names a stock network: its AR architecture and that of its diffusion program, if it has one.

    With `permuted`, the rows of q and k alternate between the two halves of each head, as the rotary embedding of Llama
    files expects. `biases` are the layers with biases.
    """

    causal: MODEL_ARCH
    diffusion: MODEL_ARCH | None
    permuted: bool = False
    biases: tuple[str, ...] = ()


NETWORKS = {
    "llama": GgufNetwork(MODEL_ARCH.LLAMA, MODEL_ARCH.LLADA, permuted=True),
    "mistral": GgufNetwork(MODEL_ARCH.LLAMA, MODEL_ARCH.LLADA, permuted=True),
    "qwen2": GgufNetwork(MODEL_ARCH.QWEN2, MODEL_ARCH.DREAM, biases=("q_proj", "k_proj", "v_proj")),
    "qwen3": GgufNetwork(MODEL_ARCH.QWEN3, None),
}


def export_gguf(saved: SavedModel, out: Path, dtype: str | None) -> Path:
    """Write a model as the GGUF file OUT/NAME.gguf, NAME being that of `out`, with a card and for Ollama a Modelfile.

    ValueError, before weights are read, for what llama.cpp cannot run.
    """
    arch, diffusion = _architecture(saved)
    names = _tensor_names(saved, arch)
    usual = _usual_dtype(saved, dtype)
    kind, file_type = GGUF_DTYPES[usual]
    kinds = {key: _tensor_kind(saved.tensors[key], kind) for key in names}
    name = out.absolute().name
    with staging_folder(out) as draft:
        writer = GGUFWriter(draft / f"{name}.gguf", MODEL_ARCH_NAMES[arch])
        writer.add_name(name)
        writer.add_file_type(file_type)
        _write_settings(writer, saved, diffusion)
        _write_vocabulary(writer, saved, diffusion)
        for key, gguf_name in names.items():
            shape, is_float = saved.tensors[key].shape, kinds[key] == GGMLQuantizationType.F32
            stored = quant_shape_to_byte_shape(shape, kinds[key])
            data = np.dtype(np.float32 if is_float else np.uint8)
            writer.add_tensor_info(gguf_name, shape if is_float else stored, data, math.prod(stored), kinds[key])
        if (factors := _rope_factors(saved)) is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key in names:
            writer.write_tensor_data(_array(saved, key, kinds[key]))
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()
        if not diffusion:
            (draft / "Modelfile").write_text(_modelfile(saved, name), encoding="utf-8")
        usage = DIFFUSION_GGUF if diffusion else AR_GGUF
        write_export_card(saved, draft, out, "gguf", MODEL_ARCH_NAMES[arch], usage)
    return out


def _architecture(saved: SavedModel) -> tuple[MODEL_ARCH, bool]:
    """The architecture of the file, and whether it is for the diffusion program. ValueError if there is none."""
    config, network = saved.diffusion_config, NETWORKS.get(saved.config.model_type)
    if config.longest_answer is not None:
        raise ValueError(f"{saved.source} has a length head, for which gguf has no word; use --to hf")
    if network is None:
        raise ValueError(
            f"{saved.source} is a {saved.config.model_type} network, and --to gguf writes {', '.join(NETWORKS)}; use "
            "--to hf"
        )
    if config.reads_as_ar_model:
        return network.causal, False
    if not isinstance(config.attention, Bidirectional):
        raise ValueError(
            f"{saved.source} has attention {config.attention} without an AR half, which llama.cpp has no mask for; use "
            "--to sdar, a2d or hf"
        )
    if network.diffusion is None:
        known = ", ".join(name for name, each in NETWORKS.items() if each.diffusion is not None)
        raise ValueError(
            f"{saved.source} is a {saved.config.model_type} network, and llama.cpp's diffusion program runs {known}; "
            "use --to a2d or hf, or for llama.cpp adapt a base of these"
        )
    return network.diffusion, True


def _tensor_names(saved: SavedModel, arch: MODEL_ARCH) -> dict[str, str]:
    """The name in the file of every tensor. ValueError for what the architecture has no word for."""
    config: Any = saved.config
    name, network = MODEL_ARCH_NAMES[arch], NETWORKS[config.model_type]
    rope_types = ("default", "llama3") if arch == MODEL_ARCH.LLAMA else ("default",)  # llada ignores factors
    unknown = {
        "hidden_act": None if config.hidden_act == "silu" else config.hidden_act,
        "sliding_window": next((w for w in sliding_windows(saved.network).values() if w), None),
        "rope_scaling": None if _rope_type(saved) in rope_types else config.rope_parameters,
    }
    if config.hidden_size != config.num_attention_heads * _head_dim(saved) and config.model_type == "qwen2":
        unknown["head_dim"] = _head_dim(saved)
    for setting, value in unknown.items():
        if value is not None:
            raise ValueError(
                f"{saved.source} has {setting}={value}, for which --to gguf ({name}) has no word; use --to hf"
            )
    table = get_tensor_name_map(arch, config.num_hidden_layers)
    names = {key: table.get_name(key, (".weight", ".bias")) for key in saved.tensors}
    for key, gguf_name in names.items():
        if gguf_name is None or (key.endswith(".bias") and key.split(".")[-2] not in network.biases):
            raise ValueError(
                f"{saved.source} has the tensor {key}, for which --to gguf ({name}) has no word; use --to hf"
            )
    return {key: gguf_name for key, gguf_name in names.items() if gguf_name is not None}


def _rope_type(saved: SavedModel) -> str:
    config: Any = saved.config
    return config.rope_parameters["rope_type"]


def _rope_factors(saved: SavedModel) -> np.ndarray | None:
    """What each frequency of the rotary embedding is divided by, for the scaling of Llama 3; None without scaling."""
    if _rope_type(saved) == "default":
        return None
    config: Any = saved.config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = torch.arange(0, _head_dim(saved), 2) / _head_dim(saved)
    return (config.rope_parameters["rope_theta"] ** -exponents / scaled).numpy()


def _write_settings(writer: GGUFWriter, saved: SavedModel, diffusion: bool) -> None:
    config: Any = saved.config
    writer.add_vocab_size(num_embeddings(saved.network))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(saved))
    writer.add_value_length(_head_dim(saved))
    writer.add_rope_dimension_count(_head_dim(saved))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if diffusion:
        writer.add_causal_attention(False)
        writer.add_diffusion_shift_logits(saved.diffusion_config.shift == 1)


def _write_vocabulary(writer: GGUFWriter, saved: SavedModel, diffusion: bool) -> None:
    config = saved.diffusion_config
    words = TextTokenizer(saved.tokenizer, config.mask_token_id, config.frame)
    write_tokenizer(
        writer,
        saved.tokenizer,
        num_embeddings(saved.network),
        saved.source,
        start_token_id=words.start_token_id,
        start_prompts=config.frame.start_prompts,
        mask_token_id=config.mask_token_id if diffusion else None,
    )


def _array(saved: SavedModel, key: str, kind: GGMLQuantizationType) -> np.ndarray:
    """A tensor's data as they stand in the file."""
    config: Any = saved.config
    weight = saved.tensors[key].read().float()
    layer = key.split(".")[-2]
    if NETWORKS[config.model_type].permuted and layer in ("q_proj", "k_proj"):
        weight = permute(weight, config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads)
    if kind == GGMLQuantizationType.F16:
        require_finite(weight.half(), key)
    return np.ascontiguousarray(quantize(weight.numpy(), kind)).view(
        np.float32 if kind == GGMLQuantizationType.F32 else np.uint8
    )


def permute(weight: Tensor, heads: int) -> Tensor:
    """The rows of q or k as Llama files have them: within each head, row i of each half beside the other's."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _usual_dtype(saved: SavedModel, dtype: str | None) -> str:
    """The dtype of most tensors: `dtype`, or as they are stored."""
    if dtype is not None:
        return dtype
    dtypes = list(saved_dtypes(saved.tensors, None).values())
    return str(max(dtypes, key=dtypes.count)).removeprefix("torch.")


def _tensor_kind(tensor: StoredTensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """The dtype of a tensor in the file; vectors stay in float32. ValueError for rows that q8_0 cannot divide."""
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
        raise ValueError(f"{tensor.name} has rows of {tensor.shape[-1]}, and q8_0 needs multiples of 32; use float16")
    return kind


def _head_dim(saved: SavedModel) -> int:
    config: Any = saved.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _modelfile(saved: SavedModel, name: str) -> str:
    """The file from which Ollama makes a model of the GGUF; the chat template is the file's own."""
    config: Any = saved.config
    lines = [f"FROM ./{name}.gguf", f"PARAMETER num_ctx {min(4096, config.max_position_embeddings)}"]
    if not isinstance(saved.tokenizer.chat_template, str):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    return "\n".join(lines) + "\n"
