"""Released diffusion models (DiffuGPT, DiffuLLaMA, Dream, LLaDA, SDAR, A2D), made folders that transformers opens."""

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
from diffusify.models import loading
from diffusify.models.attention_check import check_attention
from diffusify.models.layouts import LAYOUTS, Layout, layout_name, plain, stock_config
from diffusify.models.logging import quiet_transformers
from diffusify.models.recipes import Recipe, ar, block
from diffusify.models.saving import drafted, load_denoiser, refuse_occupied

CHECKED = 10**9  # up to so many parameters, the network is run to see that it obeys attention patterns
SHARD = 4 << 30  # bytes in one file of weights, and so in memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Kept as stored, but for float16: it overflows where bfloat16 and float32 do not, and float32 holds all its values.
_KEPT = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}


@dataclass(frozen=True)
class Stored:
    """A tensor where it is stored."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

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
    """Write the diffusion model that a released folder or hub repository holds into `out`, as `save_denoiser` would.

    `layout` is needed where the files do not tell it; `mask_token_id` and `block_size` stand in for what they say.
    `dtype` is what the weights are kept in: as stored, but float32 for float16, if unset. Weights go through memory a
    file at a time, and no code that comes with them is run. ValueError for anything that does not fit, before weights
    are read.
    """
    out = Path(out)
    refuse_occupied(out)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f'dtype "{dtype}" is not known{nearest(dtype, DTYPES)}')
    path = loading.local_path(source)
    if path is not None and path.is_file():
        raise ValueError(f"{source} is a file; diffusion models are released as folders of config and safetensors")
    folder = path or loading.snapshot(source, loading.CONFIG)
    settings = loading.read_settings(folder, source)
    name = layout_name(settings.get("model_type"), folder, source, layout)
    recipe = _recipe(name, settings, block_size)
    if path is None:
        folder = loading.snapshot(source, loading.WHOLE)
    tensors = _tensors(folder, source)
    if layout is None and name == "diffugpt" and not any(key.startswith("denoise_model.") for key in tensors):
        raise plain(source, "gpt2")
    rows = _rows(name, tensors, settings)
    config = stock_config(name, settings, rows, source)
    network, _ = loading.network_class(config, source)
    plan = _plan(network, config, LAYOUTS[name], tensors, source)
    tokenizer = _tokenizer(folder, config, source)
    mask = _set_mask_token(tokenizer, name, settings, rows, mask_token_id, source)
    _check_ids(config, tokenizer, source)
    kept = {key: DTYPES[dtype] if dtype else _KEPT[tensor.dtype] for key, tensor in plan.items()}
    config.architectures, config.dtype = [network.__name__], max(kept.values(), key=list(kept.values()).count)
    with drafted(out) as draft:
        _write(plan, kept, draft)
        config.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        recipe.diffusion_config(network.__name__, mask, source).save(draft)
        if sum(torch.Size(tensor.shape).numel() for tensor in plan.values()) <= CHECKED:
            check_attention(load_denoiser(draft)[0])
    return out


def _recipe(name: str, settings: dict[str, Any], block_size: int | None) -> Recipe:
    """How the model goes on being trained, and is used."""
    layout = LAYOUTS[name]
    if block_size is not None and not layout.blocks:
        blocky = " and ".join(name for name, layout in LAYOUTS.items() if layout.blocks)
        raise ValueError(f"block_size={block_size}: {name} models are not written in blocks; it is for {blocky}")
    stated = settings.get("block_size") if layout.block_size else None
    size = next((size for size in (block_size, stated, layout.block_size) if size is not None), None)
    return ar(0, shift=layout.shift) if size is None else block(size, masked=True)


def _tensors(folder: Path, source: str) -> dict[str, Stored]:
    """Every tensor in a folder's files, by its released name; only the files' headers are read."""
    found: dict[str, Stored] = {}
    for file in loading.weight_files(folder, source):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                part = opened.get_slice(name)
                if name in found:
                    raise ValueError(f"{source} stores {name} twice, in {found[name].file.name} and {file.name}")
                found[name] = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
    return {name: tensor for name, tensor in found.items() if not loading.HARMLESS.search(name)}


def _rows(name: str, tensors: dict[str, Stored], settings: dict[str, Any]) -> int:
    """Rows of embeddings. DiffuGPT's config may still count those of the GPT-2 it was made from."""
    if name == "diffugpt" and "embed_tokens.weight" in tensors:
        return tensors["embed_tokens.weight"].shape[0]
    return settings.get("embedding_size") or settings.get("vocab_size") or 0


def _plan(
    network_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    layout: Layout,
    tensors: dict[str, Stored],
    source: str,
) -> dict[str, Stored]:
    """Which stored tensor goes where in the stock network. ValueError unless they match to the last one, by name."""
    with torch.device("meta"), quiet_transformers():
        network: Any = network_class(config)
    needs = {key: (layout.released(key), tuple(weight.shape)) for key, weight in network.state_dict().items()}
    for key, origin in network.all_tied_weights_keys.items():
        copy, original = tensors.get(needs[key][0]), tensors.get(needs[origin][0])
        if copy and original and not torch.equal(copy.read(), original.read()):
            raise ValueError(f"{source} ties {copy.name} to {original.name}, but stores other numbers for it")
        tensors = {name: tensor for name, tensor in tensors.items() if name != needs[key][0]}
        del needs[key]
    names = {name for name, _ in needs.values()}
    wrong = {
        "missing": names - set(tensors),
        "of another shape": [
            f"{name} {tensors[name].shape}, not {shape}"
            for name, shape in needs.values()
            if name in tensors and tensors[name].shape != shape
        ],
        "unknown": set(tensors) - names,
        "quantised": [f"{tensor.name} ({tensor.dtype})" for tensor in tensors.values() if tensor.dtype not in _KEPT],
    }
    if any(wrong.values()):
        told = "; ".join(f"{what}: {loading.some(keys)}" for what, keys in wrong.items() if keys)
        raise ValueError(f"the weights of {source} do not fit {network_class.__name__}: {told}")
    return {key: tensors[name] for key, (name, _) in needs.items()}


def _tokenizer(folder: Path, config: PreTrainedConfig, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder's files, without the code that may come with it."""
    family: Any = PreTrainedTokenizerFast
    if not (folder / "tokenizer.json").is_file():
        family = TOKENIZER_MAPPING.get(type(config), None)
        if family is None or not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
            raise ValueError(f"{source} has no tokenizer that can be read; put tokenizer.json beside its config.json")
    try:
        with quiet_transformers():
            made = family.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the many formats fail in many ways
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the tokenizer of {source} cannot be loaded ({reason}); put tokenizer.json beside it"
        ) from error
    made.init_kwargs.pop("auto_map", None)
    return made


def _set_mask_token(
    tokenizer: Any, name: str, settings: dict[str, Any], rows: int, given: int | None, source: str
) -> int:
    """The id of the mask as the user, the config, the layout or the tokenizer tells it; the tokenizer's from now on."""
    known = [given, settings.get("mask_token_id"), LAYOUTS[name].masks.get(rows), tokenizer.mask_token_id]
    known += [tokenizer.get_vocab().get(text) for text in ("<|mask|>", "<|MASK|>")]
    mask = next((i for i in known if i is not None), None)
    if mask is None:
        raise ValueError(f"{source} ({name}, {rows} rows of embeddings) does not tell its mask; give --mask-token-id")
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


def _check_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """ValueError for a token beyond the embeddings."""
    rows = config.vocab_size
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, role, None)
        for i in ids if isinstance(ids, list) else [ids]:
            if i is not None and i >= rows:
                raise ValueError(f"the config.json of {source} has {role}={i}, beyond its {rows} embeddings")
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ValueError(f"the tokenizer of {source} has ids up to {last}, beyond the {rows} embeddings")


def _write(plan: dict[str, Stored], kept: dict[str, torch.dtype], folder: Path) -> None:
    """The weights under their stock names, a file at a time."""
    ends, size = {}, 0
    for key, tensor in plan.items():
        size += torch.Size(tensor.shape).numel() * kept[key].itemsize
        ends[key] = size
    shards = [list(keys) for _, keys in groupby(plan, key=lambda key: (ends[key] - 1) // SHARD)]
    where = {}
    for i, keys in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        weights = {key: plan[key].read().to(kept[key]) for key in keys}
        for key, weight in weights.items():
            if kept[key] == torch.float16 and not weight.isfinite().all():
                raise ValueError(f"{plan[key].name} does not fit into float16; take --dtype bfloat16 or float32")
        save_file(weights, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(keys, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
