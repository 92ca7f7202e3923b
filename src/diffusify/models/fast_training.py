"""How a network computes while it is trained: attention in tiles, a narrow stream, compiled layers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffusify.models.tiled_attention import use_tiled_attention


def optimize_for_training(network: PreTrainedModel, *, compiled: bool = False) -> None:
    """Make a network's training steps fast, and its answers the same up to rounding.

    On a CPU attention is computed in tiles. Under autocast what embeddings and norms put out is narrowed at once: the
    stream between layers is half as wide, and no linear layer narrows it for itself. With `compiled` each layer is
    compiled; on a CPU that needs a C++ compiler, on a GPU flex attention then leaves out what masks hide.
    """
    use_tiled_attention(network)
    if compiled and network.device.type == "cuda" and network._supports_flex_attn:
        network.set_attn_implementation("flex_attention")
    for module in network.modules():
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Norm"):
            module.register_forward_hook(_narrowed)
    if compiled:
        for layer in layers(network):
            layer.compile()


def layers(network: PreTrainedModel) -> list[nn.Module]:
    """The layers of a network's body: its longest list of modules."""
    lists = [module for module in network.base_model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def _narrowed(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    kind = out.device.type
    return out.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else out
