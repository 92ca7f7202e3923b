"""LoRA: low-rank adapters inside a network, by PEFT's layers; the base weights stay unchanged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import PreTrainedModel

from diffusify.config import DiffusionConfig
from diffusify.diffusion.length_tokens import LengthTokens
from diffusify.models.bundled import find_model
from diffusify.models.loading import num_embeddings
from diffusify.models.logging import quiet_transformers
from diffusify.models.mask_adapters import (
    MaskAdapter,
    add_mask_adapters,
    find_mask_rows,
    load_mask_adapter_weights,
    peft_config,
    read_adapter_weights,
    save_mask_adapters,
    write_adapter_weights,
)
from diffusify.models.recipe import Recipe


@dataclass(frozen=True)
class Lora:
    """The settings of LoRA adapters on every linear layer, scaled by alpha / rank (alpha: twice the rank if unset).

    `embeddings` names the embeddings that are trained as well: those of the mask token and the length tokens, on which
    the base was hardly trained, or `all` (DiffuLLaMA). ValueError if the rank is below 1.
    """

    rank: int = 16
    alpha: int | None = None
    embeddings: Literal["mask", "all"] = "mask"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank {self.rank} must be at least 1; 16 is usual")


def default_lora(lora: Lora | None, rows: Literal["all", "masks"]) -> Lora | None:
    """The adapters of a run: those that are given, else `Lora()` if the recipe's adapters act on masks only."""
    return Lora() if lora is None and rows == "masks" else lora


def add_lora(
    network: PreTrainedModel,
    lora: Lora,
    mask_token_id: int,
    base: str,
    rows: Literal["all", "masks"] = "all",
    length_tokens: LengthTokens | None = None,
) -> None:
    """Add new adapters, which do not change the network's outputs yet, and freeze all other weights.

    They act on all `rows` of a forward pass or only where the input is a mask. The weights of the length tokens in the
    head are trained as well. ValueError if the adapters are for masks only and all embeddings are to be trained.
    """
    base = str(Path(base).absolute()) if Path(base).exists() else base
    alpha = lora.alpha or 2 * lora.rank
    if rows == "masks":
        if lora.embeddings == "all":
            raise ValueError("embeddings='all' changes clean text, which adapters='masks' keeps; leave embeddings out")
        add_mask_adapters(network, lora.rank, alpha, mask_token_id, base)
        return
    length_ids = [] if length_tokens is None else length_tokens.ids
    every_id = list(range(num_embeddings(network)))
    trained: Any = [mask_token_id, *length_ids] if lora.embeddings == "mask" else every_id
    head, embeddings = network.get_output_embeddings(), network.get_input_embeddings()
    if length_ids and head is not None and head.weight is not embeddings.weight:  # PEFT trains both if they are tied
        names = {id(module): name for name, module in network.named_modules()}
        trained = {names[id(embeddings)]: trained, names[id(head)]: length_ids}
    _attach(network, peft_config(network, lora.rank, alpha, base, trainable_token_indices=trained))


def save_lora(network: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapters in PEFT's format, with the name of their base; `weights` replace the network's own."""
    if find_mask_rows(network) is not None:
        save_mask_adapters(network, folder, weights)
        return
    adapters = get_peft_model_state_dict(network, state_dict=weights, save_embedding_layers=False)
    write_adapter_weights(adapters, folder)
    network.peft_config["default"].save_pretrained(str(folder))


def has_lora(network: PreTrainedModel) -> bool:
    """Whether a network contains adapters."""
    return any(isinstance(module, BaseTunerLayer | MaskAdapter) for module in network.modules())


def adapter_base(folder: Path) -> str | None:
    """The name of the base model of an adapter folder; None for a folder of full weights."""
    if not (folder / "adapter_config.json").is_file():
        return None
    return PeftConfig.from_pretrained(str(folder)).base_model_name_or_path


def own_adapters(model: str) -> tuple[str, Lora] | None:
    """The base and the settings of the adapters of a model, which training continues with; None if it has none."""
    folder = find_model(model)
    if folder is None or (base := adapter_base(folder)) is None:
        return None
    config: Any = PeftConfig.from_pretrained(str(folder))
    return base, Lora(config.r, config.lora_alpha)


def check_lora(model: str, lora: Lora | None, recipe: Recipe) -> None:
    """Check that the adapters of a model, if it has some, can be trained further by a recipe.

    ValueError if new ones are requested, if they act on other rows of a forward pass or have another draft head, or if
    the recipe needs length tokens and they have none.
    """
    if lora is not None and not isinstance(lora, Lora):
        raise ValueError(f"lora={lora!r} is not a Lora; write lora=diffusify.Lora(16)")
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe={recipe!r} is not a Recipe; write recipe=diffusify.block() or another of these")
    if (folder := find_model(model)) is None or (base := adapter_base(folder)) is None:
        return
    own, merge = DiffusionConfig.load(folder), f"diffusify merge {model} --out DIR"
    if own.adapters != recipe.adapters:
        raise ValueError(
            f"{model} holds adapters='{own.adapters}', and the recipe needs adapters='{recipe.adapters}'; omit "
            f"--recipe, or start from the base {base}"
        )
    if own.draft_head != recipe.draft_head:
        raise ValueError(
            f"{model} has draft_head={own.draft_head}, and the recipe needs draft_head={recipe.draft_head}; omit "
            f"--recipe, or start from the base {base}"
        )
    if recipe.length_noise is not None and own.length_tokens is None:
        raise ValueError(
            f"{model} holds adapters that train no length tokens, which variable_length=True needs; start from the "
            f"base {base}, or merge them into full weights first: {merge}"
        )
    if lora is not None:
        raise ValueError(
            f"{model} holds adapters, and training continues with these; omit --lora, or merge them into full weights "
            f"first: {merge}"
        )


def load_lora(
    network: PreTrainedModel, folder: Path, mask_token_id: int = 0, rows: Literal["all", "masks"] = "all"
) -> None:
    """Add the adapters of a folder to their base. ValueError for a missing or unexpected tensor."""
    config: Any = PeftConfig.from_pretrained(str(folder))
    if rows == "masks":
        add_mask_adapters(network, config.r, config.lora_alpha, mask_token_id, config.base_model_name_or_path)
    else:
        _attach(network, config)
    load_lora_weights(network, folder)


def load_lora_weights(network: PreTrainedModel, folder: Path) -> None:
    """Set the weights of the network's adapters to a folder's. ValueError for a missing or unexpected tensor."""
    if find_mask_rows(network) is not None:
        load_mask_adapter_weights(network, folder)
        return
    weights = read_adapter_weights(folder, get_peft_model_state_dict(network, save_embedding_layers=False))
    result: Any = set_peft_model_state_dict(network, weights)
    assert not result.unexpected_keys


def merge_lora(network: PreTrainedModel) -> None:
    """Add the adapters to the base weights and remove PEFT's layers, which leaves a stock network.

    Adapters that act on masks only stay, since the base weights must not change for other rows.
    """
    if find_mask_rows(network) is not None or not has_lora(network):
        return
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer) and not layer.merged:
            layer.merge()
    wrappers = [(name, m) for name, m in network.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    stock = {name: wrapper.unload_and_optionally_merge_module(False, False, None) for name, wrapper in wrappers}
    stock |= {
        name: layer.get_base_layer()
        for name, layer in network.named_modules()
        if isinstance(layer, LoraLayer) and not name.endswith(".base_layer")  # the layers of experts are nested
    }
    for name, module in stock.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module)
    network.tie_weights()
    del network.peft_config
    network._hf_peft_config_loaded = False


def _attach(network: PreTrainedModel, config: PeftConfig) -> None:
    base = config.base_model_name_or_path
    with quiet_transformers():
        network.add_adapter(config)
    config.base_model_name_or_path = base  # `add_adapter` overwrites it with the network's own
