"""How diffusion models are released: the stock network inside each, and the names that its parts go by."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from diffusify.config import nearest


@dataclass(frozen=True)
class Layout:
    """How a family of diffusion models is released.

    `inner` gives the stock model type inside each released one; `names` turns the stock tensor names into the
    released ones, in turn. `masks` knows the mask token by rows of embeddings where the files do not tell.
    """

    inner: dict[str, str]
    shift: int
    names: tuple[tuple[str, str], ...] = ()
    masks: dict[int, int] = field(default_factory=dict)
    blocks: bool = False
    block_size: int | None = None

    def released(self, name: str) -> str:
        """The released name of a stock tensor."""
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement, name)
        return name


_LLADA_NAMES = (
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
        names=((r"^transformer\.wte\.", "embed_tokens."), (r"^transformer\.", "denoise_model.")),
        masks={50257: 10541, 50258: 50257},
    ),
    "diffullama": Layout({"llama": "llama"}, shift=1, masks={32000: 811}),
    "dream": Layout({"Dream": "qwen2"}, shift=1),
    "llada": Layout({"llada": "llama"}, shift=0, names=_LLADA_NAMES),
    "sdar": Layout({"sdar": "qwen3"}, shift=0, masks={151936: 151669}, blocks=True, block_size=4),
    "a2d": Layout({"a2d-qwen3": "qwen3", "a2d-qwen2": "qwen2", "a2d-llama": "llama"}, shift=0, blocks=True),
}

# What a LLaDA config may say and a Llama network still be the same; None where it says nothing.
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


def layout_name(kind: Any, folder: Path, source: str, named: str | None) -> str:
    """The layout that a config's model type, or the user, tells."""
    if (folder / "diffusion_config.json").is_file():
        raise ValueError(f"{source} has a diffusion_config.json already: it needs no import")
    if named is not None and named not in LAYOUTS:
        raise ValueError(f'layout "{named}" is not known{nearest(named, LAYOUTS)}')
    fitting = [name for name, layout in LAYOUTS.items() if kind in layout.inner]
    if named is not None and named not in fitting:
        raise ValueError(f"layout {named} has model_type {' or '.join(LAYOUTS[named].inner)}, but {source} has {kind}")
    if not fitting and kind not in CONFIG_MAPPING:
        known = ", ".join(kind for layout in LAYOUTS.values() for kind in layout.inner)
        raise ValueError(f"{source} has model_type {kind}, which is not among those that can be imported: {known}")
    if named is None and (not fitting or (kind == "llama" and "diffullama" not in Path(source).name.lower())):
        raise plain(source, kind)
    return named or fitting[0]


def plain(source: str, kind: Any) -> ValueError:
    """What to say of a model that its files do not show to be a diffusion model."""
    return ValueError(
        f"{source} looks like a plain {kind} model: `diffusify adapt` is what turns one into a diffusion model; "
        f"if it is one already, name its --layout ({', '.join(LAYOUTS)})"
    )


def stock_config(name: str, settings: dict[str, Any], rows: int, source: str) -> PreTrainedConfig:
    """The config of the stock network inside."""
    kind = LAYOUTS[name].inner[settings["model_type"]]
    if name == "llada":
        settings = _llada_settings(settings, source)
    ours = {"auto_map", "architectures", "model_type", "transformers_version", "block_size", "mask_token_id"}
    told = {key: value for key, value in settings.items() if key not in ours and not key.startswith("_")}
    told["vocab_size"] = rows
    if name == "diffugpt":
        told["tie_word_embeddings"] = True
    try:
        return CONFIG_MAPPING[kind].from_dict(told)
    except Exception as error:  # each family validates its settings with exceptions of its own
        raise ValueError(f"the config.json of {source} describes no valid {kind} network ({error})") from error


def _llada_settings(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """A LLaDA config in Llama's words. ValueError for what a Llama network cannot do."""
    for key, allowed in _LLADA_ALLOWED.items():
        if settings.get(key) not in allowed:
            raise ValueError(
                f"{source} has {key}={settings.get(key)!r}, which LlamaForCausalLM cannot honour; "
                f"only {key}={allowed[0]!r} can be imported"
            )
    needed = ("d_model", "n_heads", "n_layers", "max_sequence_length", "rope_theta", "rms_norm_eps", "weight_tying")
    if absent := [key for key in needed if settings.get(key) is None]:
        raise ValueError(f"the config.json of {source} does not give {', '.join(absent)}")
    heads = settings["n_heads"]
    roles = {key: settings.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return roles | {
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
