"""Import of released diffusion models (DiffuGPT, DiffuLLaMA, Dream, LLaDA, SDAR, A2D) as transformers folders."""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    TOKENIZER_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from diffusify.config import nearest
from diffusify.models import downloading, loading
from diffusify.models.attention_check import check_attention
from diffusify.models.layouts import LAYOUTS, Layout, detect_layout, named_block_size, plain_model_error, stock_config
from diffusify.models.logging import quiet_transformers
from diffusify.models.model_card import write_model_card
from diffusify.models.recipes import Recipe, ar, block
from diffusify.models.saving import load_denoiser, require_empty_folder, staging_folder
from diffusify.models.stock_attention import write_is_causal
from diffusify.models.weight_files import weight_files

MAX_CHECKED_PARAMETERS = 10**9  # larger networks are not run to check that they obey attention patterns
MAX_SHARD_BYTES = 4 << 30  # per file of weights, and so in memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The default dtypes of saved weights. float16 overflows where the others do not, and float32 holds all its values.
_SAVED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, not yet read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        return torch.Size(self.shape).numel()

    def read(self) -> torch.Tensor:
        with safe_open(self.file, "pt") as opened:
            return opened.get_tensor(self.name)


def import_denoiser(
    source: str,
    out: Path | str,
    *,
    layout: str | None = None,
    mask_token_id: int | None = None,
    block_size: int | None = None,
    dtype: str | None = None,
) -> Path:
    """Import a released folder or hub repository into `out`, in the format of `save_denoiser`. Returns `out`.

    `layout` is needed if the files do not show it; `mask_token_id` and `block_size` override what the files say. A
    block size that the config does not give is that of the source's name (`SDAR-4B-Chat-b64`), or the family's usual
    one. The weights are saved in `dtype`; by default as they are stored, but float16 becomes float32. Memory holds one
    file of weights at a time, and no remote code is run. ValueError for anything that does not fit, before weights are
    read.
    """
    out = Path(out)
    require_empty_folder(out)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f'dtype "{dtype}" is not known{nearest(dtype, DTYPES)}')
    path = loading.local_path(source)
    if path is not None and path.is_file():
        raise ValueError(f"{source} is a file; diffusion models are released as folders of config and safetensors")
    folder = path or downloading.download_snapshot(source, downloading.CONFIG_FILES)
    settings = loading.read_config_json(folder, source)
    name = detect_layout(settings.get("model_type"), folder, source, layout)
    recipe = _recipe(name, settings, block_size, source)
    if path is None:
        folder = downloading.download_snapshot(source, downloading.ALL_FILES)
        downloading.download_card(source)
    tensors = _stored_tensors(folder, source)
    if layout is None and name == "diffugpt" and not any(key.startswith("denoise_model.") for key in tensors):
        raise plain_model_error(source, "gpt2")
    rows = _num_embeddings(name, tensors, settings)
    config = stock_config(name, settings, rows, source)
    network, _ = loading.network_class(config, source)
    state_dict = _match_tensors(network, config, LAYOUTS[name], tensors, source)
    tokenizer = _tokenizer(folder, config, source)
    mask = _set_mask_token(tokenizer, name, settings, rows, mask_token_id, source)
    _check_token_ids(config, tokenizer, source)
    dtypes = {key: DTYPES[dtype] if dtype else _SAVED_DTYPES[tensor.dtype] for key, tensor in state_dict.items()}
    config.architectures, config.dtype = [network.__name__], max(dtypes.values(), key=list(dtypes.values()).count)
    with staging_folder(out) as draft:
        _write_weights(state_dict, dtypes, draft)
        config.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        diffusion_config = recipe.diffusion_config(network.__name__, mask, source)
        write_is_causal(draft, diffusion_config)
        diffusion_config.save(draft)
        write_model_card(draft, out)
        if sum(tensor.num_elements for tensor in state_dict.values()) <= MAX_CHECKED_PARAMETERS:
            check_attention(load_denoiser(draft)[0])
    return out


def _recipe(name: str, settings: dict[str, Any], block_size: int | None, source: str) -> Recipe:
    """The recipe that the imported model is used with, and trained further with.

    ValueError if the config and the name of the source give different block sizes, or none where one is needed.
    """
    layout = LAYOUTS[name]
    if block_size is not None and not layout.supports_blocks:
        block_layouts = " and ".join(name for name, layout in LAYOUTS.items() if layout.supports_blocks)
        raise ValueError(f"block_size={block_size}: {name} models do not decode in blocks; it is for {block_layouts}")
    if not layout.supports_blocks:
        return ar(0, shift=layout.shift)
    configured = settings.get("block_size") if layout.block_size else None
    named = named_block_size(source)
    if block_size is None and None not in (configured, named) and configured != named:
        raise ValueError(
            f"the config.json of {source} gives a block size of {configured}, but its name {named}; give --block-size"
        )
    size = next((size for size in (block_size, configured, named, layout.block_size) if size is not None), None)
    if size is None and "bd3lm" in source.lower():
        raise ValueError(f"{source} decodes in blocks, but its files do not give their size; give --block-size")
    return ar(0, shift=layout.shift) if size is None else block(size, masked=True)


def _stored_tensors(folder: Path, source: str) -> dict[str, StoredTensor]:
    """All tensors in a folder's files by their released names, from the files' headers alone."""
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder, source):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                header = opened.get_slice(name)
                if name in tensors:
                    raise ValueError(f"{source} stores {name} twice, in {tensors[name].file.name} and {file.name}")
                tensors[name] = StoredTensor(file, name, tuple(header.get_shape()), header.get_dtype())
    return {name: tensor for name, tensor in tensors.items() if not loading.IGNORED_TENSORS.search(name)}


def _num_embeddings(name: str, tensors: dict[str, StoredTensor], settings: dict[str, Any]) -> int:
    """The number of embeddings; DiffuGPT's config may still have that of its GPT-2, so its tensor is looked up."""
    if name == "diffugpt" and "embed_tokens.weight" in tensors:
        return tensors["embed_tokens.weight"].shape[0]
    return settings.get("embedding_size") or settings.get("vocab_size") or 0


def _match_tensors(
    network_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    layout: Layout,
    tensors: dict[str, StoredTensor],
    source: str,
) -> dict[str, StoredTensor]:
    """The stock network's state dict as stored tensors.

    ValueError if any tensor is missing, unknown, quantized or of another shape, or if tied tensors differ.
    """
    with torch.device("meta"), quiet_transformers():
        network: Any = network_class(config)
    expected = {key: (layout.released_name(key), tuple(weight.shape)) for key, weight in network.state_dict().items()}
    for key, original_key in network.all_tied_weights_keys.items():
        copy, original = tensors.get(expected[key][0]), tensors.get(expected[original_key][0])
        if copy and original and not torch.equal(copy.read(), original.read()):
            raise ValueError(f"{source} ties {copy.name} to {original.name}, but stores different values for it")
        tensors = {name: tensor for name, tensor in tensors.items() if name != expected[key][0]}
        del expected[key]
    names = {name for name, _ in expected.values()}
    wrong = {
        "missing": names - set(tensors),
        "of another shape": [
            f"{name} {tensors[name].shape}, not {shape}"
            for name, shape in expected.values()
            if name in tensors and tensors[name].shape != shape
        ],
        "unknown": set(tensors) - names,
        "quantized": [
            f"{tensor.name} ({tensor.dtype})" for tensor in tensors.values() if tensor.dtype not in _SAVED_DTYPES
        ],
    }
    if any(wrong.values()):
        details = "; ".join(f"{problem}: {loading.first_names(keys)}" for problem, keys in wrong.items() if keys)
        raise ValueError(f"the weights of {source} do not fit {network_class.__name__}: {details}")
    return {key: tensors[name] for key, (name, _) in expected.items()}


def _tokenizer(folder: Path, config: PreTrainedConfig, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, without its remote code. ValueError if there is none or it cannot be loaded."""
    tokenizer_class: Any = PreTrainedTokenizerFast
    if not (folder / "tokenizer.json").is_file():
        tokenizer_class = TOKENIZER_MAPPING.get(type(config), None)
        if tokenizer_class is None or not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
            raise ValueError(f"{source} has no tokenizer that can be read; put tokenizer.json beside its config.json")
    try:
        with quiet_transformers():
            tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each format fails with exceptions of its own
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the tokenizer of {source} cannot be loaded ({reason}); put tokenizer.json beside it"
        ) from error
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _set_mask_token(
    tokenizer: Any, name: str, settings: dict[str, Any], rows: int, mask_token_id: int | None, source: str
) -> int:
    """Set the tokenizer's mask token and return its id, from the user, the config, the layout or the tokenizer."""
    layout_id = LAYOUTS[name].mask_token_ids.get(rows)
    known = [mask_token_id, settings.get("mask_token_id"), layout_id, tokenizer.mask_token_id]
    known += [tokenizer.get_vocab().get(text) for text in ("<|mask|>", "<|MASK|>")]
    mask = next((i for i in known if i is not None), None)
    if mask is None:
        raise ValueError(f"{source} ({name}, {rows} embeddings) does not name its mask token; give --mask-token-id")
    if not 0 <= mask < rows:
        raise ValueError(f"mask_token_id={mask} is beyond the {rows} embeddings of {source}; give --mask-token-id")
    text = tokenizer.convert_ids_to_tokens(mask)
    if text is None and mask == len(tokenizer):
        text = "<|mask|>"
    if text is not None:
        tokenizer.add_special_tokens({"mask_token": tokenizer.added_tokens_decoder.get(mask, text)})
    if tokenizer.mask_token_id != mask:
        raise ValueError(
            f"the tokenizer of {source} has no token for mask_token_id={mask}; put the released tokenizer.json "
            "beside its config.json, or give --mask-token-id"
        )
    return mask


def _check_token_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Check that all token ids have embeddings. ValueError if one has none."""
    rows = config.vocab_size
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, role, None)
        for i in ids if isinstance(ids, list) else [ids]:
            if i is not None and i >= rows:
                raise ValueError(f"the config.json of {source} has {role}={i}, beyond its {rows} embeddings")
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ValueError(f"the tokenizer of {source} has ids up to {last}, beyond the {rows} embeddings")


def _write_weights(state_dict: dict[str, StoredTensor], dtypes: dict[str, torch.dtype], folder: Path) -> None:
    """Write the weights under their stock names, one shard in memory at a time."""
    ends, size = {}, 0
    for key, tensor in state_dict.items():
        size += tensor.num_elements * dtypes[key].itemsize
        ends[key] = size
    shards = [list(keys) for _, keys in groupby(state_dict, key=lambda key: (ends[key] - 1) // MAX_SHARD_BYTES)]
    weight_map = {}
    for i, keys in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        weights = {key: state_dict[key].read().to(dtypes[key]) for key in keys}
        for key, weight in weights.items():
            if dtypes[key] == torch.float16 and not weight.isfinite().all():
                raise ValueError(f"{state_dict[key].name} does not fit into float16; use --dtype bfloat16 or float32")
        save_file(weights, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
