"""How the stock network of a saved folder attends when `transformers` opens it alone."""

import json
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import Bidirectional

# Causal classes that ignore `is_causal: false` in config.json under their default attention kernel (sdpa), found by
# running a tiny network of every class. Under `attn_implementation="eager"` they obey it, too.
IGNORES_IS_CAUSAL = {"NemotronForCausalLM", "StableLmForCausalLM"}


def is_causal_class(architecture: str) -> bool:
    """Whether a class of transformers attends causally unless its config says otherwise."""
    return architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def stock_arguments(folder: Path, config: DiffusionConfig) -> dict[str, str | int]:
    """The arguments with which `from_pretrained` opens a bidirectional model's folder so that it attends as here.

    `attn_implementation` for classes that ignore `is_causal`. `sliding_window`, one less than in training, because a
    causal window of w tokens counts the token itself, and the bidirectional window of transformers does not.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arguments: dict[str, str | int] = {}
    if config.architecture in IGNORES_IS_CAUSAL:
        arguments["attn_implementation"] = "eager"
    window, kinds = settings.get("sliding_window"), settings.get("layer_types")
    if is_causal_class(config.architecture) and window and (kinds is None or "sliding_attention" in kinds):
        arguments["sliding_window"] = window - 1
    return arguments


def write_is_causal(folder: Path, config: DiffusionConfig) -> None:
    """Set `is_causal: false` in the config.json of a bidirectional model of a causal class; remove it from all others.

    `AutoModelForCausalLM` alone then attends in both directions as well.
    """
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("is_causal", None)
    if is_causal_class(config.architecture) and isinstance(config.attention, Bidirectional):
        settings["is_causal"] = False
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
