"""Sharded weights and optimizer states are saved in full, and a full optimizer state is sharded again."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from diffusify.training.resilience.sharding import (
    full_optimizer_state_dict,
    full_state_dict,
    full_tensors,
    load_full_optimizer_state,
)
from tests.training.worlds import fork_ranks


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight


def adam_after_one_step(module: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for weight in module.parameters():
        weight.grad = weight.detach().clone()
    optimizer.step()
    return optimizer


def sharded(module: Tied) -> Tied:
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(module.first.weight.detach(), mesh, [Shard(0)]))
    module.first.weight = module.second.weight = weight
    return module


def save_and_load(rank: int) -> None:
    whole, parts = Tied(), sharded(Tied())
    whole_adam, parts_adam = adam_after_one_step(whole), adam_after_one_step(parts)
    weights = full_state_dict(parts, keep=rank == 0)
    state = full_optimizer_state_dict(parts_adam, keep=rank == 0)
    if rank == 0:
        assert weights is not None and weights["first.weight"] is weights["second.weight"]
        assert torch.equal(weights["first.weight"], whole.first.weight)
        expected = whole_adam.state_dict()["state"][0]
        assert state["state"][0].keys() == expected.keys()
        assert all(torch.equal(state["state"][0][name], expected[name]) for name in expected)
    else:
        assert weights == {} and state["state"][0] == {}
    path = Path(f"optimizer-{rank}.pt")
    torch.save(whole_adam.state_dict(), path)
    fresh = torch.optim.AdamW(parts.parameters(), lr=0.1)
    load_full_optimizer_state(fresh, path)
    loaded, own = fresh.state_dict()["state"][0], parts_adam.state_dict()["state"][0]
    for name in own:
        assert isinstance(loaded[name], DTensor) == isinstance(own[name], DTensor) == name.startswith("exp_avg")
        one, other = (value.to_local() if isinstance(value, DTensor) else value for value in (loaded[name], own[name]))
        assert torch.equal(one, other)


def test_two_processes_save_and_load_full_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fork_ranks(2, save_and_load, tmp_path) == [0, 0]


def test_weights_that_are_not_sharded_are_left_as_they_are() -> None:
    module = Tied()
    assert full_state_dict(module, keep=True) is None
    assert full_tensors({"weight": module.first.weight, "step": 3}, keep=False) == {}
    kept = full_tensors({"weight": module.first.weight, "step": 3}, keep=True)
    assert torch.equal(kept["weight"], module.first.weight) and kept["step"] == 3
