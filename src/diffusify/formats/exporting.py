"""Export of diffusion models to the formats that other programs read, tensor by tensor."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from diffusify.config import nearest
from diffusify.diffusion.attention import Bidirectional, BlockCausal
from diffusify.formats.export_card import RELEASED, write_export_card, write_merged_card
from diffusify.formats.gguf_export import GGUF_DTYPES, export_gguf
from diffusify.formats.layouts import LAYOUTS, Layout, released_config
from diffusify.formats.saved_model import SavedModel, open_saved_model
from diffusify.formats.stored_tensors import DTYPES, saved_dtypes, write_weights
from diffusify.models.loading import num_embeddings
from diffusify.models.saving import LENGTH_HEAD, require_empty_folder, staging_folder
from diffusify.models.stock_attention import write_is_causal

TARGETS = ("gguf", "hf", *LAYOUTS)


def export(model: Path | str, out: Path | str, *, to: str, dtype: str | None = None) -> Path:
    """Write a diffusion model in the format `to` into the new folder `out`, for other programs. Returns `out`.

    - `gguf`: one file for llama.cpp. A bidirectional model of a Llama or Qwen2 becomes one for its diffusion program; a
      block model that keeps its AR half becomes that AR model, with a Modelfile for Ollama.
    - `dream`, `llada`, `sdar`, `a2d` and the other layouts that `import_denoiser` reads: folders as they are released,
      which it reads again.
    - `hf`: a folder for `transformers` and diffusify, with adapters merged.

    The weights are saved in `dtype`: `float32`, `bfloat16`, `float16`, or for `gguf` also `q8_0`; by default as they
    are stored, but float16 becomes float32. Adapters are merged. Memory holds one file of weights at a time, and of a
    GGUF one tensor. ValueError with the reason, before weights are read, for what the format cannot express.
    """
    out = Path(out)
    require_empty_folder(out)
    if to not in TARGETS:
        raise ValueError(f'--to "{to}" is not known{nearest(to, TARGETS)}')
    known = GGUF_DTYPES if to == "gguf" else DTYPES
    if dtype is not None and dtype not in known:
        raise ValueError(f'dtype "{dtype}" is not known for --to {to}{nearest(dtype, known)}')
    saved = open_saved_model(model)
    if to == "gguf":
        return export_gguf(saved, out, dtype)
    if saved.diffusion_config.adapters == "masks":
        raise ValueError(
            f"{model} holds adapters that act on masks only, which cannot become part of weights, so the diffusion "
            "half has no target; --to gguf exports the AR half, which is the base itself"
        )
    settings = None if to == "hf" else _released_settings(saved, to)
    _write_folder(saved, out, to, dtype, settings)
    return out


def _released_settings(saved: SavedModel, to: str) -> dict[str, Any]:
    """The released config of a model in a layout. ValueError if the layout has no word for the model."""
    layout, config = LAYOUTS[to], saved.diffusion_config
    _check_decoding(saved, to, layout)
    stock_types = dict.fromkeys(stock for stock, _ in layout.networks.values())
    if saved.config.model_type not in stock_types:
        raise ValueError(
            f"{saved.source} is a {saved.config.model_type} network, and {to} models are {' or '.join(stock_types)}; "
            f"{_nearest_target(saved)}"
        )
    rows = num_embeddings(saved.network)
    fixed = layout.mask_token_ids.get(rows)
    if layout.fixed_mask and config.mask_token_id != fixed:
        raise ValueError(
            f"{saved.source} has mask_token_id={config.mask_token_id} and {rows} embeddings, but programs for "
            f"{to} know only {_known_masks(layout)}; adapt the base with -o mask_token_id=..."
        )
    return released_config(layout, saved.config, config.mask_token_id, config.block_size, saved.source)


def _check_decoding(saved: SavedModel, to: str, layout: Layout) -> None:
    """Check that the programs for a layout decode as the model does. ValueError if they do not."""
    config = saved.diffusion_config
    if config.longest_answer is not None:
        raise ValueError(f"{saved.source} has a length head, for which {to} has no word; use --to hf")
    if config.keeps_ar_model:
        raise ValueError(
            f"{saved.source} decodes in blocks after causal text, which programs for {to} do not; use --to gguf for "
            "its AR half, or --to hf; the recipe block(size, masked=True) trains models for sdar and a2d"
        )
    is_block = isinstance(config.attention, BlockCausal)
    if not is_block and not isinstance(config.attention, Bidirectional):
        raise ValueError(f"{saved.source} has attention {config.attention}, for which {to} has no word; use --to hf")
    if is_block not in layout.blocks:
        raise ValueError(
            f"{saved.source} {'decodes' if is_block else 'does not decode'} in blocks, and {to} models "
            f"{'do not' if is_block else 'do'}; {_nearest_target(saved)}"
        )
    if config.shift != layout.shift:
        raise ValueError(
            f"{saved.source} has shift={config.shift}, and {to} models have shift={layout.shift}; "
            f"{_nearest_target(saved)}"
        )


def _known_masks(layout: Layout) -> str:
    """The mask tokens that the programs for a layout know."""
    return ", ".join(f"{mask} (of {rows} embeddings)" for rows, mask in layout.mask_token_ids.items())


def _nearest_target(saved: SavedModel) -> str:
    """The end of an error message: the layouts that hold networks of this type with this decoding."""
    config = saved.diffusion_config
    fitting = [
        name
        for name, layout in LAYOUTS.items()
        if any(stock == saved.config.model_type for stock, _ in layout.networks.values())
        and layout.shift == config.shift
        and isinstance(config.attention, BlockCausal) in layout.blocks
    ]
    return f"use --to {' or '.join([*fitting, 'hf'])}"


def _write_folder(saved: SavedModel, out: Path, to: str, dtype: str | None, settings: dict[str, Any] | None) -> None:
    """Write a folder of config, weights, tokenizer and card; a `transformers` one without released `settings`."""
    dtypes = saved_dtypes(saved.tensors, dtype)
    usual = max(dtypes.values(), key=list(dtypes.values()).count)
    name = LAYOUTS[to].released_name if settings is not None else str
    config = saved.config
    config.architectures, config.dtype = [type(saved.network).__name__], usual
    with staging_folder(out) as draft:
        write_weights(
            {name(key): tensor for key, tensor in saved.tensors.items()},
            {name(key): each for key, each in dtypes.items()},
            draft,
        )
        saved.tokenizer.save_pretrained(draft)
        if settings is None:
            config.save_pretrained(draft)
            write_is_causal(draft, saved.diffusion_config)
            saved.diffusion_config.save(draft)
            if saved.diffusion_config.longest_answer is not None:
                shutil.copy(saved.folder / LENGTH_HEAD, draft)
        else:
            settings["torch_dtype"] = str(usual).removeprefix("torch.")
            (draft / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        _generation_config(saved).to_json_file(draft / "generation_config.json")  # as the base has it, unvalidated
        if settings is None:
            write_merged_card(saved, draft, out)
        else:
            write_export_card(saved, draft, out, to, settings["architectures"][0], RELEASED)


def _generation_config(saved: SavedModel) -> GenerationConfig:
    """The generation config of the network, with the mask token, which programs for diffusion models read there."""
    config: Any = getattr(saved.network, "generation_config", None) or GenerationConfig()
    config.mask_token_id = saved.diffusion_config.mask_token_id
    return config
