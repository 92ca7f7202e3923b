"""LoRA: low-rank adapters inside a network, by PEFT's layers; the base weights stay unchanged."""

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

from diffusify.models.bundled import find_model
from diffusify.models.loading import num_embeddings
from diffusify.models.logging import quiet_transformers

_WEIGHTS, _PREFIX = "adapter_model.safetensors", "base_model.model."  # PEFT's own names


@dataclass(frozen=True)
class Lora:
    """The settings of LoRA adapters on every linear layer, scaled by alpha / rank (alpha: twice the rank if unset).

    `embeddings` names the embeddings that are trained as well: the mask token's, which the base was hardly trained on,
    or `all` (DiffuLLaMA). ValueError if the rank is below 1.
    """

    rank: int = 16
    alpha: int | None = None
    embeddings: Literal["mask", "all"] = "mask"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank {self.rank} must be at least 1; 16 is usual")


def add_lora(network: PreTrainedModel, lora: Lora, mask_token_id: int, base: str) -> None:
    """Add new adapters, which do not change the network's outputs yet, and freeze all other weights."""
    rows = num_embeddings(network)
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
    """Write the adapters in PEFT's format, with the name of their base; `weights` replace the network's own."""
    adapters = get_peft_model_state_dict(network, state_dict=weights, save_embedding_layers=False)
    save_file({_PREFIX + name: weight.contiguous() for name, weight in adapters.items()}, folder / _WEIGHTS)
    network.peft_config["default"].save_pretrained(str(folder))


def has_lora(network: PreTrainedModel) -> bool:
    """Whether a network contains adapters."""
    return any(isinstance(module, BaseTunerLayer) for module in network.modules())


def adapter_base(folder: Path) -> str | None:
    """The name of the base model of an adapter folder; None for a folder of full weights."""
    if not (folder / "adapter_config.json").is_file():
        return None
    return PeftConfig.from_pretrained(str(folder)).base_model_name_or_path


def check_lora(model: str, lora: Lora | None) -> None:
    """Check that no new adapters are requested for a model that has some. ValueError if they are."""
    if lora is not None and (folder := find_model(model)) is not None and adapter_base(folder) is not None:
        raise ValueError(
            f"{model} holds adapters, and training continues with these; omit --lora, or merge them into full weights "
            f"first: diffusify merge {model} --out DIR"
        )


def load_lora(network: PreTrainedModel, folder: Path) -> None:
    """Add the adapters of a folder to their base. ValueError for a missing or unexpected tensor."""
    _attach(network, PeftConfig.from_pretrained(str(folder)))
    load_lora_weights(network, folder)


def load_lora_weights(network: PreTrainedModel, folder: Path) -> None:
    """Set the weights of the network's adapters to a folder's. ValueError for a missing or unexpected tensor."""
    weights = {name.removeprefix(_PREFIX): weight for name, weight in load_file(folder / _WEIGHTS).items()}
    expected = get_peft_model_state_dict(network, save_embedding_layers=False)
    if set(weights) != set(expected):
        wrong = sorted(set(weights) ^ set(expected))
        raise ValueError(
            f"the adapters in {folder} do not fit their base: {len(wrong)} tensors differ, such as {wrong[0]}"
        )
    result: Any = set_peft_model_state_dict(network, weights)
    assert not result.unexpected_keys


def merge_lora(network: PreTrainedModel) -> None:
    """Add the adapters to the base weights and remove PEFT's layers, which leaves a stock network."""
    if not has_lora(network):
        return
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer) and not layer.merged:
            layer.merge()
    wrappers = [(name, m) for name, m in network.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    stock = {name: wrapper.unload_and_optionally_merge_module(False, False, None) for name, wrapper in wrappers}
    stock |= {name: layer.get_base_layer() for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
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
