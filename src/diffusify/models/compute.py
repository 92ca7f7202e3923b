"""How a network computes while it is trained: attention in tiles, a narrow stream, compiled layers, kept memory."""

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffusify.models.tiles import use_tiles

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # as glibc's malloc.h numbers them


def quicken(network: PreTrainedModel, *, compiled: bool = False) -> None:
    """Make a network's training steps fast, and its answers the same up to rounding.

    On a CPU attention is computed in tiles. Under autocast what embeddings and norms put out is narrowed at once: the
    stream between layers is half as wide, and no linear layer narrows it for itself. With `compiled` each layer is
    compiled; on a CPU that needs a C++ compiler.
    """
    use_tiles(network)
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


def keep_memory() -> None:
    """From now on freed memory stays with this process, where the C library is glibc.

    A training step frees gigabytes and asks for as much again; a page that comes back from the system is cleared first,
    which took up to a tenth of a step.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def _narrowed(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    kind = out.device.type
    return out.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else out
