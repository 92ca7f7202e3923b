"""Import of released diffusion models (DiffuGPT, DiffuLLaMA, Dream, LLaDA, SDAR, A2D) as transformers folders."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    TOKENIZER_MAPPING,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from diffusify.config import nearest
from diffusify.formats.layouts import LAYOUTS, stock_config
from diffusify.formats.stored_tensors import (
    DTYPES,
    StoredTensor,
    empty_network,
    match_tensors,
    saved_dtypes,
    stored_tensors,
    write_weights,
)
from diffusify.models import downloading, loading
from diffusify.models.attention_check import check_attention
from diffusify.models.logging import quiet_transformers
from diffusify.models.mask_token import assign_mask_token, find_length_tokens
from diffusify.models.model_card import write_model_card
from diffusify.models.recipe import Recipe
from diffusify.models.recipes import ar, block
from diffusify.models.saving import load_denoiser, require_empty_folder, staging_folder
from diffusify.models.stock_attention import write_is_causal

MAX_CHECKED_PARAMETERS = 10**9  # larger networks are not run to check that they obey attention patterns


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
    name = _detect_layout(settings, folder, source, layout)
    found = LAYOUTS[name]
    recipe = _recipe(name, settings, block_size, source)
    if path is None:
        folder = downloading.download_snapshot(source, downloading.ALL_FILES)
        downloading.download_card(source)
    stored = stored_tensors(folder, source)
    if layout is None and name == "diffugpt" and not any(key.startswith("denoise_model.") for key in stored):
        raise _plain_model_error(source, "gpt2")
    rows = _num_embeddings(name, stored, settings)
    config = stock_config(found, settings, rows, source)
    network = empty_network(loading.network_class(config, source)[0], config)
    tensors = match_tensors(network, stored, source, found)
    tokenizer = _tokenizer(folder, config, source)
    mask = _set_mask_token(tokenizer, name, settings, rows, mask_token_id, source)
    _check_token_ids(config, tokenizer, source)
    dtypes = saved_dtypes(tensors, dtype)
    architecture = type(network).__name__
    config.architectures, config.dtype = [architecture], max(dtypes.values(), key=list(dtypes.values()).count)
    with staging_folder(out) as draft:
        write_weights(tensors, dtypes, draft)
        config.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        diffusion_config = recipe.diffusion_config(architecture, mask, source)
        if diffusion_config.block_size is None:
            diffusion_config = replace(diffusion_config, length_tokens=find_length_tokens(tokenizer))
        write_is_causal(draft, diffusion_config)
        diffusion_config.save(draft)
        write_model_card(draft, out)
        if sum(weight.numel() for weight in network.parameters()) <= MAX_CHECKED_PARAMETERS:
            check_attention(load_denoiser(draft)[0])
    return out


def _detect_layout(settings: dict[str, Any], folder: Path, source: str, layout: str | None) -> str:
    """The name of a model's layout: `layout` if given, else by its config's model type and class.

    ValueError if the folder needs no import, if the layout is unknown or does not fit the model type, or if the files
    do not show that the model is a diffusion model.
    """
    if (folder / "diffusion_config.json").is_file():
        raise ValueError(f"{source} already has a diffusion_config.json: it needs no import")
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f'layout "{layout}" is not known{nearest(layout, LAYOUTS)}')
    model_type: Any = settings.get("model_type")
    classes = settings.get("architectures") or []
    matching = [name for name, each in LAYOUTS.items() if model_type in each.networks]
    if layout is not None and layout not in matching:
        expected = " or ".join(LAYOUTS[layout].networks)
        raise ValueError(f"layout {layout} has model_type {expected}, but {source} has {model_type}")
    if not matching and model_type not in CONFIG_MAPPING:
        known = ", ".join(dict.fromkeys(each for known_layout in LAYOUTS.values() for each in known_layout.networks))
        raise ValueError(f"{source} has model_type {model_type}, which cannot be imported; importable are: {known}")
    if layout is None and (not matching or (model_type == "llama" and "diffullama" not in Path(source).name.lower())):
        raise _plain_model_error(source, model_type)
    by_class = [name for name in matching if LAYOUTS[name].networks[model_type][1] in classes]
    return layout or (by_class or matching)[0]


def _plain_model_error(source: str, model_type: Any) -> ValueError:
    """The error for a model that its files do not show to be a diffusion model."""
    return ValueError(
        f"{source} looks like a plain {model_type} model: `diffusify adapt` turns one into a diffusion model; "
        f"if it is one already, name its --layout ({', '.join(LAYOUTS)})"
    )


def _recipe(name: str, settings: dict[str, Any], block_size: int | None, source: str) -> Recipe:
    """The recipe that the imported model is used with, and trained further with.

    ValueError if the config and the name of the source give different block sizes, or none where one is needed.
    """
    layout = LAYOUTS[name]
    if True not in layout.blocks:
        if block_size is None:
            return ar(0, shift=layout.shift)
        block_layouts = " and ".join(name for name, layout in LAYOUTS.items() if True in layout.blocks)
        raise ValueError(f"block_size={block_size}: {name} models do not decode in blocks; it is for {block_layouts}")
    configured, named = settings.get(layout.block_key), _named_block_size(source)
    if block_size is None and None not in (configured, named) and configured != named:
        raise ValueError(
            f"the config.json of {source} gives a block size of {configured}, but its name {named}; give --block-size"
        )
    size = next((size for size in (block_size, configured, named, layout.block_size) if size is not None), None)
    if size is None and "bd3lm" in source.lower():
        raise ValueError(f"{source} decodes in blocks, but its files do not give their size; give --block-size")
    return ar(0, shift=layout.shift) if size is None else replace(block(size, masked=True), shift=layout.shift)


def _named_block_size(source: str) -> int | None:
    """The block size in the name of a folder or repository (`SDAR-4B-Chat-b64`); None if there is none."""
    found = re.search(
        r"[-_.]b(?:lock)?(?:[-_]?size)?[-_]?([0-9]+)(?![^-_.])", Path(source).absolute().name, re.IGNORECASE
    )
    return int(found[1]) if found else None


def _num_embeddings(name: str, tensors: dict[str, StoredTensor], settings: dict[str, Any]) -> int:
    """The number of embeddings; DiffuGPT's config may still have that of its GPT-2, so its tensor is looked up."""
    if name == "diffugpt" and "embed_tokens.weight" in tensors:
        return tensors["embed_tokens.weight"].shape[0]
    return settings.get("embedding_size") or settings.get("vocab_size") or 0


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
    try:
        assign_mask_token(tokenizer, mask)
    except ValueError as error:
        raise ValueError(
            f"the tokenizer of {source} has no token for mask_token_id={mask}; put the released tokenizer.json "
            "beside its config.json, or give --mask-token-id"
        ) from error
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
