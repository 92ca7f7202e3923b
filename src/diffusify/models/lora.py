"""Low-rank adapters: little to train, little to save, the base left as it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from diffusify.models.bundled import resolve_model
from diffusify.models.loading import embedding_rows
from diffusify.models.logging import quiet_transformers

_WEIGHTS, _PREFIX = "adapter_model.safetensors", "base_model.model."  # PEFT's own names


@dataclass(frozen=True)
class Lora:
    """An adapter of `rank` on every linear layer, scaled by alpha / rank (alpha: twice the rank if unset).

    `embeddings` are trained too: the mask token's, which the base hardly knows, or `all` (DiffuLLaMA).
    """

    rank: int = 16
    alpha: int | None = None
    embeddings: Literal["mask", "all"] = "mask"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank {self.rank} must be at least 1; 16 is usual")


def add_lora(network: PreTrainedModel, lora: Lora, mask_token_id: int, base: str) -> None:
    """Put fresh adapters into a network, which they do not change yet; all other weights are frozen."""
    rows = embedding_rows(network)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),
        trainable_token_indices=[mask_token_id] if lora.embeddings == "mask" else list(range(rows)),
        base_model_name_or_path=str(Path(base).absolute()) if Path(base).exists() else base,
    )
    _attach(network, config)


def save_lora(network: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapters as PEFT does, with the name of their base; `weights` stand in for the network's own."""
    adapters = get_peft_model_state_dict(network, state_dict=weights, save_embedding_layers=False)
    save_file({_PREFIX + name: weight.contiguous() for name, weight in adapters.items()}, folder / _WEIGHTS)
    network.peft_config["default"].save_pretrained(str(folder))


def has_lora(network: PreTrainedModel) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in network.modules())


def base_of(folder: Path) -> str | None:
    """The base that a LoRA folder stands on; None for a folder of whole weights."""
    if not (folder / "adapter_config.json").is_file():
        return None
    return PeftConfig.from_pretrained(str(folder)).base_model_name_or_path


def check_lora(model: str, lora: Lora | None) -> None:
    """ValueError for new adapters where there are some: these are trained on."""
    if lora is not None and base_of(resolve_model(model)) is not None:
        raise ValueError(
            f"{model} holds adapters, which are trained on; leave --lora out, or make whole weights of them first: "
            f"diffusify merge {model} --out DIR"
        )


def open_lora(network: PreTrainedModel, folder: Path) -> None:
    """Put the adapters of a folder into their base, strictly."""
    _attach(network, PeftConfig.from_pretrained(str(folder)))
    load_lora(network, folder)


def load_lora(network: PreTrainedModel, folder: Path) -> None:
    """Set the adapters' weights to a folder's. ValueError for a missing or unexpected tensor."""
    weights = {name.removeprefix(_PREFIX): weight for name, weight in load_file(folder / _WEIGHTS).items()}
    expected = get_peft_model_state_dict(network, save_embedding_layers=False)
    if set(weights) != set(expected):
        odd = sorted(set(weights) ^ set(expected))
        raise ValueError(f"the adapters in {folder} do not fit their base: {len(odd)} tensors differ, such as {odd[0]}")
    result: Any = set_peft_model_state_dict(network, weights)
    assert not result.unexpected_keys


def merge_lora(network: PreTrainedModel) -> None:
    """Add the adapters to the weights, for speed; `unmerge_lora` takes them out again."""
    for layer in _layers(network):
        if not layer.merged:
            layer.merge()


def unmerge_lora(network: PreTrainedModel) -> None:
    for layer in _layers(network):
        if layer.merged:
            layer.unmerge()


def bake_lora(network: PreTrainedModel) -> None:
    """Make the adapters part of the weights for good: a plain network is left."""
    merge_lora(network)
    parts = [(name, part) for name, part in network.named_modules() if isinstance(part, AuxiliaryTrainingWrapper)]
    plain = {name: part.unload_and_optionally_merge_module(False, False, None) for name, part in parts}
    plain |= {name: layer.get_base_layer() for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    for name, module in plain.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module)
    network.tie_weights()
    del network.peft_config
    network._hf_peft_config_loaded = False


def _attach(network: PreTrainedModel, config: PeftConfig) -> None:
    base = config.base_model_name_or_path
    with quiet_transformers():
        network.add_adapter(config)
    config.base_model_name_or_path = base  # else the network's own notion of its name


def _layers(network: PreTrainedModel) -> list[BaseTunerLayer]:
    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
