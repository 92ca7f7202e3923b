"""Conversion of sharded weights and optimizer states (FSDP2) to full tensors for saving, and back.

Files on disk do not depend on the number of processes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensors(values: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """The values with all sharded tensors gathered to the CPU; an empty dict on processes with `keep=False`.

    All processes must call this. Tied tensors stay tied.
    """
    full: dict[int, Any] = {}
    for value in values.values():
        if id(value) not in full:
            gathered: Any = value.full_tensor() if isinstance(value, DTensor) else value
            kept = gathered.detach().cpu() if isinstance(gathered, torch.Tensor) and keep else gathered
            full[id(value)] = kept if keep else None
    return {name: full[id(value)] for name, value in values.items()} if keep else {}


def full_state_dict(module: nn.Module, *, keep: bool) -> dict[str, Any] | None:
    """A module's state dict in full tensors (see `full_tensors`); None if none of its weights are sharded."""
    if not any(isinstance(weight, DTensor) for weight in module.parameters()):
        return None
    return full_tensors(module.state_dict(keep_vars=True), keep=keep)


def full_optimizer_state_dict(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """An optimizer's state dict in full tensors, as a single process would have it."""
    state = optimizer.state_dict()
    return state | {"state": {i: full_tensors(values, keep=keep) for i, values in state["state"].items()}}


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load an optimizer's state from a file of full tensors; each process takes its shard of them."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state["state"] = {
        i: {name: _shard_like(value, weights[i]) for name, value in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict(state)


def _shard_like(value: Any, weight: torch.Tensor) -> Any:
    """A tensor sharded like a weight of the same shape; any other value unchanged."""
    if not (
        isinstance(weight, DTensor) and isinstance(value, torch.Tensor) and value.dim() and value.shape == weight.shape
    ):
        return value
    mesh = weight.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, weight.placements, src_data_rank=None)
