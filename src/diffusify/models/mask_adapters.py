"""Adapters for masks: low-rank terms of linear layers that are added only where the input is a mask.

All other rows of a forward pass are computed as by the base, so the AR half of a block model stays the base itself.

Axes: b rows, m positions, d inputs of a layer, e its outputs, r rank.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_WEIGHTS, _PREFIX = "adapter_model.safetensors", "base_model.model."  # PEFT's own names


class MaskRows:
    """Which inputs of the current forward pass are masks; all adapters of a network share one.

    While `is_mask` is None, as in a call of the network by `transformers`, no adapter acts. `base` is the base's name.
    """

    def __init__(self, base: str) -> None:
        self.base = base
        self._columns: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._is_mask: Bool[Tensor, "b m"] | None = None

    @property
    def is_mask(self) -> Bool[Tensor, "b m"] | None:
        return self._is_mask

    @is_mask.setter
    def is_mask(self, is_mask: Bool[Tensor, "b m"] | None) -> None:
        self._is_mask, self._columns = is_mask, {}
        self.__dict__.pop("start", None)

    @cached_property
    def start(self) -> int | None:
        """The first column of masks, if all columns from there on are masks in every row; None if masks are elsewhere.

        It reads the device, so it is for CPUs.
        """
        assert self._is_mask is not None
        start = int((~self._is_mask).sum(1).amin())
        in_place = torch.arange(self._is_mask.shape[1], device=self._is_mask.device) >= start
        return start if bool((self._is_mask == in_place).all()) else None

    def select(self, output: Float[Tensor, "b m d"]) -> Float[Tensor, "b m 1"]:
        """1 for the rows of a layer's output that are masks, else 0. ValueError if the layer has other rows."""
        assert self._is_mask is not None
        kind = output.device, output.dtype
        if kind not in self._columns:
            self._columns[kind] = self._is_mask[..., None].to(*kind)  # once a pass, for all layers
        column = self._columns[kind]
        if column.shape[:-1] == output.shape[:-1]:
            return column
        if column.numel() != output.shape[:-1].numel():
            raise ValueError(
                f"a layer runs {tuple(output.shape[:-1])} rows of {tuple(self._is_mask.shape)} inputs, so adapters "
                "cannot tell its masks; use adapters='all'"
            )
        return column.reshape(*output.shape[:-1], 1)


class MaskAdapter(nn.Module):
    """A low-rank term that is added to a linear layer's output where the input is a mask."""

    def __init__(self, layer: Any, rank: int, alpha: int, rows: MaskRows) -> None:
        super().__init__()
        inputs, outputs = layer.weight.shape if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
        device = layer.weight.device
        self.lora_A = nn.Linear(inputs, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, outputs, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.rows, self.scale = rows, alpha / rank
        layer.add_module("mask_adapter", self)
        layer.register_forward_hook(self.add_to_output)

    def add_to_output(self, layer: nn.Module, args: Any, output: Float[Tensor, "b m e"]) -> Float[Tensor, "b m e"]:
        if self.rows.is_mask is None:
            return output
        low_rank = self.lora_A(args[0].to(_compute_dtype(self.lora_A.weight)))
        term = self.lora_B(low_rank * (self.scale * self.rows.select(low_rank)))
        return output + term.to(output.dtype)


class MaskEmbedding(nn.Module):
    """The embedding of masks, which replaces that of the mask token only where the input is a mask."""

    def __init__(self, embedding: Any, mask_token_id: int, rows: MaskRows) -> None:
        super().__init__()
        with torch.no_grad():
            start = embedding(torch.tensor([mask_token_id], device=embedding.weight.device))[0].float()
        self.weight, self.rows = nn.Parameter(start), rows
        embedding.add_module("mask_embedding", self)
        embedding.register_forward_hook(self.replace_output)

    def replace_output(self, embedding: nn.Module, args: Any, output: Float[Tensor, "b m d"]) -> Tensor:
        if self.rows.is_mask is None:
            return output
        return torch.where(self.rows.select(output).bool(), self.weight, output).to(output.dtype)


def add_mask_adapters(network: PreTrainedModel, rank: int, alpha: int, mask_token_id: int, base: str) -> None:
    """Add new adapters to every linear layer but the head, and freeze all other weights.

    They do not change the network's outputs yet.
    """
    network.requires_grad_(False)
    rows, head = MaskRows(base), network.get_output_embeddings()
    for layer in list(network.modules()):
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head:
            MaskAdapter(layer, rank, alpha, rows)
    MaskEmbedding(network.get_input_embeddings(), mask_token_id, rows)


def find_mask_rows(network: nn.Module) -> MaskRows | None:
    """What tells a network's adapters which inputs are masks; None for a network without such adapters."""
    return next((module.rows for module in network.modules() if isinstance(module, MaskEmbedding)), None)


def save_mask_adapters(network: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapters in PEFT's format, with the name of their base; `weights` replace the network's own."""
    write_adapter_weights(_named_for_file(dict(network.named_parameters()) if weights is None else weights), folder)
    adapter = next(module for module in network.modules() if isinstance(module, MaskAdapter))
    rank = adapter.lora_A.out_features
    config = peft_config(network, rank, round(adapter.scale * rank), adapter.rows.base, inference_mode=True)
    config.save_pretrained(str(folder))


@torch.no_grad()
def load_mask_adapter_weights(network: PreTrainedModel, folder: Path) -> None:
    """Set the weights of the network's adapters to a folder's. ValueError for a missing or unexpected tensor."""
    own = _named_for_file(dict(network.named_parameters()))
    weights = read_adapter_weights(folder, own)
    for name, weight in own.items():
        weight.copy_(weights[name])


def peft_config(network: nn.Module, rank: int, alpha: int, base: str, **settings: Any) -> LoraConfig:
    """PEFT's description of adapters on every linear layer of a network."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),
        base_model_name_or_path=base,
        **settings,
    )


def write_adapter_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Write adapters to a folder in PEFT's format."""
    save_file({_PREFIX + name: weight.contiguous() for name, weight in weights.items()}, folder / _WEIGHTS)


def read_adapter_weights(folder: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapters of a folder. ValueError unless they have the names and shapes of the `expected` ones."""
    weights = read_adapter_tensors(folder)
    other_shapes = [name for name in set(weights) & set(expected) if weights[name].shape != expected[name].shape]
    if wrong := sorted(set(weights) ^ set(expected)) or sorted(other_shapes):
        raise ValueError(
            f"the adapters in {folder} do not fit their base: {len(wrong)} tensors differ, such as {wrong[0]}"
        )
    return weights


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's adapters, by the names of the modules that they adapt."""
    return {name.removeprefix(_PREFIX): weight for name, weight in load_file(folder / _WEIGHTS).items()}


def _named_for_file(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of adapters among a network's, by their names in a file, which are PEFT's."""
    return {
        name.replace(".mask_adapter.", "."): weight
        for name, weight in weights.items()
        if ".mask_adapter." in name or name.endswith(".mask_embedding.weight")
    }


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which autocast computes a product with this weight."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
