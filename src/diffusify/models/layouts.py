"""The formats that diffusion models are released in: the stock network inside each, and its tensor names."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from diffusify.config import nearest


@dataclass(frozen=True)
class Layout:
    """The release format of a family of diffusion models.

    `model_types` maps each released model type to the stock one inside. `key_mapping` holds regular expressions and
    replacements that turn stock tensor names into released ones, applied in order. `mask_token_ids` maps the number of
    embeddings to the mask token, for releases whose files do not name it. `supports_blocks` is whether models of this
    family may decode in blocks; `block_size` is the size where the config gives none.
    """

    model_types: dict[str, str]
    shift: int
    key_mapping: tuple[tuple[str, str], ...] = ()
    mask_token_ids: dict[int, int] = field(default_factory=dict)
    supports_blocks: bool = False
    block_size: int | None = None

    def released_name(self, name: str) -> str:
        """The released name of a stock tensor."""
        for pattern, replacement in self.key_mapping:
            name = re.sub(pattern, replacement, name)
        return name


_LLADA_KEY_MAPPING = (
    (r"^model\.embed_tokens\.", "model.transformer.wte."),
    (r"^model\.norm\.", "model.transformer.ln_f."),
    (r"^lm_head\.", "model.transformer.ff_out."),
    (r"^model\.layers\.", "model.transformer.blocks."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ff_norm."),
    (r"\.self_attn\.o_proj\.", ".attn_out."),
    (r"\.self_attn\.", "."),
    (r"\.mlp\.gate_proj\.", ".ff_proj."),
    (r"\.mlp\.up_proj\.", ".up_proj."),
    (r"\.mlp\.down_proj\.", ".ff_out."),
)

LAYOUTS = {
    "diffugpt": Layout(
        {"gpt2": "gpt2"},
        shift=1,
        key_mapping=((r"^transformer\.wte\.", "embed_tokens."), (r"^transformer\.", "denoise_model.")),
        mask_token_ids={50257: 10541, 50258: 50257},
    ),
    "diffullama": Layout({"llama": "llama"}, shift=1, mask_token_ids={32000: 811}),
    "dream": Layout({"Dream": "qwen2"}, shift=1),
    "llada": Layout({"llada": "llama"}, shift=0, key_mapping=_LLADA_KEY_MAPPING),
    "sdar": Layout({"sdar": "qwen3"}, shift=0, mask_token_ids={151936: 151669}, supports_blocks=True, block_size=4),
    "a2d": Layout({"a2d-qwen3": "qwen3", "a2d-qwen2": "qwen2", "a2d-llama": "llama"}, shift=0, supports_blocks=True),
}

# The LLaDA settings under which a Llama network computes the same; None allows a config without the key.
_LLADA_ALLOWED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1, None),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True, None),
    "bias_for_layer_norm": (False, None),
    "attention_layer_norm": (False, None),
    "input_emb_norm": (False, None),
    "rope": (True,),
    "alibi": (False, None),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "scale_logits": (False, None),
}


def detect_layout(model_type: Any, folder: Path, source: str, layout: str | None) -> str:
    """The name of a model's layout: `layout` if given, else by its config's model type.

    ValueError if the folder needs no import, if the layout is unknown or does not fit the model type, or if the files
    do not show that the model is a diffusion model.
    """
    if (folder / "diffusion_config.json").is_file():
        raise ValueError(f"{source} already has a diffusion_config.json: it needs no import")
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f'layout "{layout}" is not known{nearest(layout, LAYOUTS)}')
    matching = [name for name, each in LAYOUTS.items() if model_type in each.model_types]
    if layout is not None and layout not in matching:
        expected = " or ".join(LAYOUTS[layout].model_types)
        raise ValueError(f"layout {layout} has model_type {expected}, but {source} has {model_type}")
    if not matching and model_type not in CONFIG_MAPPING:
        known = ", ".join(each for known_layout in LAYOUTS.values() for each in known_layout.model_types)
        raise ValueError(f"{source} has model_type {model_type}, which cannot be imported; importable are: {known}")
    if layout is None and (not matching or (model_type == "llama" and "diffullama" not in Path(source).name.lower())):
        raise plain_model_error(source, model_type)
    return layout or matching[0]


def named_block_size(source: str) -> int | None:
    """The block size in the name of a folder or repository (`SDAR-4B-Chat-b64`); None if there is none."""
    found = re.search(
        r"[-_.]b(?:lock)?(?:[-_]?size)?[-_]?([0-9]+)(?![^-_.])", Path(source).absolute().name, re.IGNORECASE
    )
    return int(found[1]) if found else None


def plain_model_error(source: str, model_type: Any) -> ValueError:
    """The error for a model that its files do not show to be a diffusion model."""
    return ValueError(
        f"{source} looks like a plain {model_type} model: `diffusify adapt` turns one into a diffusion model; "
        f"if it is one already, name its --layout ({', '.join(LAYOUTS)})"
    )


def stock_config(layout: str, settings: dict[str, Any], vocab_size: int, source: str) -> PreTrainedConfig:
    """The config of the stock network inside a released model. ValueError if the released config does not fit it."""
    model_type = LAYOUTS[layout].model_types[settings["model_type"]]
    if layout == "llada":
        settings = _llada_settings(settings, source)
    dropped = {"auto_map", "architectures", "model_type", "transformers_version", "block_size", "mask_token_id"}
    stock = {key: value for key, value in settings.items() if key not in dropped and not key.startswith("_")}
    stock["vocab_size"] = vocab_size
    if layout == "diffugpt":
        stock["tie_word_embeddings"] = True
    try:
        return CONFIG_MAPPING[model_type].from_dict(stock)
    except Exception as error:  # each family validates its settings with exceptions of its own
        raise ValueError(f"the config.json of {source} describes no valid {model_type} network ({error})") from error


def _llada_settings(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """A LLaDA config under Llama's keys. ValueError for settings that a Llama network does not support."""
    for key, allowed in _LLADA_ALLOWED.items():
        if settings.get(key) not in allowed:
            raise ValueError(
                f"{source} has {key}={settings.get(key)!r}, which LlamaForCausalLM does not support; "
                f"only {key}={allowed[0]!r} can be imported"
            )
    needed = ("d_model", "n_heads", "n_layers", "max_sequence_length", "rope_theta", "rms_norm_eps", "weight_tying")
    if missing := [key for key in needed if settings.get(key) is None]:
        raise ValueError(f"the config.json of {source} does not give {', '.join(missing)}")
    heads = settings["n_heads"]
    special_tokens = {key: settings.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return special_tokens | {
        "hidden_size": settings["d_model"],
        "intermediate_size": settings.get("mlp_hidden_size") or settings.get("mlp_ratio", 4) * settings["d_model"],
        "num_hidden_layers": settings["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("n_kv_heads") or (1 if settings.get("multi_query_attention") else heads),
        "max_position_embeddings": settings["max_sequence_length"],
        "rms_norm_eps": settings["rms_norm_eps"],
        "rope_theta": settings["rope_theta"],
        "tie_word_embeddings": settings["weight_tying"],
    }
