"""Weights and optimizer states that processes share out among them (FSDP2), made whole for saving, and shared again.

What is on disk never depends on how many processes there were.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(values: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """The values with all tensors in full, on the CPU; nothing for a process that does not `keep` them.

    All processes take part. Tied tensors stay one.
    """
    made: dict[int, Any] = {}
    for value in values.values():
        if id(value) not in made:
            full: Any = value.full_tensor() if isinstance(value, DTensor) else value
            kept = full.detach().cpu() if isinstance(full, torch.Tensor) and keep else full
            made[id(value)] = kept if keep else None
    return {name: made[id(value)] for name, value in values.items()} if keep else {}


def whole_weights(module: nn.Module, *, keep: bool) -> dict[str, Any] | None:
    """A module's weights in full, as `whole`; None if they are not shared out, so that its own will do."""
    if not any(isinstance(weight, DTensor) for weight in module.parameters()):
        return None
    return whole(module.state_dict(keep_vars=True), keep=keep)


def whole_optimizer(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """An optimizer's state in full, as it would be in a single process."""
    state = optimizer.state_dict()
    return state | {"state": {i: whole(part, keep=keep) for i, part in state["state"].items()}}


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Set an optimizer's state to one in full; each process takes its part of it."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state["state"] = {
        i: {name: _part(value, weights[i]) for name, value in values.items()} for i, values in state["state"].items()
    }
    optimizer.load_state_dict(state)


def _part(value: Any, like: torch.Tensor) -> Any:
    """This process's part of a tensor that is shared out like another of the same shape."""
    if not (
        isinstance(like, DTensor) and isinstance(value, torch.Tensor) and value.dim() and value.shape == like.shape
    ):
        return value
    mesh = like.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
