"""Runs of several processes (laws 8 and 12): they equal a single process's run, and stop, skip and save together."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from diffusify.models.saving import load_denoiser
from diffusify.training.adapt import adapt
from tests.training import worlds
from tests.training.worlds import losses, run_world, start_process, train_and_save

BATCH = 8
STEPS: dict[str, Any] = {"max_steps": 5}
pytestmark = pytest.mark.slow


def batch_split(processes: int, accumulation: int = 1) -> dict[str, Any]:
    """Training options with which the processes have BATCH rows per step in total."""
    return {
        "per_device_train_batch_size": BATCH // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
    }


@pytest.fixture(scope="module")
def single(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    out = tmp_path_factory.mktemp("single")
    process = start_process(train_and_save, causal_base, corpus, out, STEPS | batch_split(1))
    process.join()
    assert process.exitcode == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_the_split_over_processes_changes_nothing(
    causal_base: str, corpus: str, tmp_path: Path, single: Path, processes: int, accumulation: int
) -> None:
    assert run_world(
        processes, train_and_save, causal_base, corpus, tmp_path, STEPS | batch_split(processes, accumulation)
    ) == ([0] * processes)
    assert losses(tmp_path) == pytest.approx(losses(single), rel=1e-6)
    for name, tensor in weights(single).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_weights_are_the_same_weights(
    causal_base: str, corpus: str, tmp_path: Path, single: Path, processes: int
) -> None:
    """FSDP2: the body and the head, which are called separately, get full weights, and full weights are saved."""
    options = STEPS | batch_split(processes) | {"sharded": True}
    assert run_world(processes, train_and_save, causal_base, corpus, tmp_path, options) == [0] * processes
    assert losses(tmp_path) == pytest.approx(losses(single), rel=1e-6)
    assert set(weights(tmp_path)) == set(weights(single))
    for name, tensor in weights(single).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, atol=1e-6, rtol=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    load_denoiser(tmp_path / "model")


def test_a_checkpoint_of_four_processes_resumes_with_fewer(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """Sharded or not, with an optimizer that has a state."""
    saves = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-4}
    first = {"max_steps": 3} | saves | batch_split(4) | {"sharded": True}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start_process(train_and_save, causal_base, corpus, whole, {"max_steps": 6} | saves | batch_split(1)).join()
    assert run_world(4, train_and_save, causal_base, corpus, parts, first) == [0] * 4
    state = torch.load(parts / "checkpoint-3" / "optimizer.pt")
    assert {len(state["state"]), len(state["param_groups"][0]["params"] + state["param_groups"][1]["params"])} == {
        len(torch.load(whole / "checkpoint-3" / "optimizer.pt")["state"])
    }
    for processes, sharded in [(1, False), (2, True), (2, False)]:
        out = tmp_path / f"{processes}-{sharded}"
        shutil.copytree(parts / "checkpoint-3", out / "checkpoint-3")
        rest = {"max_steps": 6} | saves | batch_split(processes) | {"sharded": sharded, "resume": True}
        assert run_world(processes, train_and_save, causal_base, corpus, out, rest) == [0] * processes
        assert losses(out) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_one_nan_skips_the_step_on_all_ranks(causal_base: str, corpus: str, tmp_path: Path, sharded: bool) -> None:
    options = {"max_steps": 2, "sharded": sharded, "prepare": worlds.nan_loss_at_last_rank} | batch_split(2, 2)
    assert run_world(2, train_and_save, causal_base, corpus, tmp_path / "bad", options) == [0, 0]
    assert run_world(
        2, train_and_save, causal_base, corpus, tmp_path / "good", options | {"max_steps": 1, "prepare": None}
    ) == [
        0,
        0,
    ]
    log = json.loads((tmp_path / "bad" / "log.json").read_text())
    assert [entry.get("skipped") for entry in log if "loss" in entry] == [None, 1]
    for name, tensor in weights(tmp_path / "good").items():
        assert torch.equal(weights(tmp_path / "bad")[name], tensor), name


def test_a_signal_to_one_process_stops_all(causal_base: str, corpus: str, tmp_path: Path) -> None:
    options = {"max_steps": 9, "prepare": worlds.sigterm_at_last_rank} | batch_split(2)
    assert run_world(2, train_and_save, causal_base, corpus, tmp_path, options) == [143, 143]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_save_that_fails_on_one_rank_stops_none(causal_base: str, corpus: str, tmp_path: Path) -> None:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "sharded": True}
    options |= {"prepare": worlds.full_disk_at_first_rank} | batch_split(2)
    assert run_world(2, train_and_save, causal_base, corpus, tmp_path, options) == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


def test_minutes_end_all_processes_at_the_same_step(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """Otherwise one would stop while the other waits for it."""
    options = {"max_steps": 1000, "minutes": 0.1, "prepare": worlds.slower_clock_at_last_rank} | batch_split(2)
    assert run_world(2, train_and_save, causal_base, corpus, tmp_path, options) == [0, 0]
    assert max(entry["step"] for entry in json.loads((tmp_path / "log.json").read_text())) == 6


RESTARTED = """
import os, signal, sys
from diffusify.training.adapt import adapt
from diffusify.training.trainer import DiffusionTrainer

real, first = DiffusionTrainer.training_step, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

def training_step(trainer, *args, **kwargs):
    if first and os.environ["RANK"] == "1" and trainer.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(trainer, *args, **kwargs)

DiffusionTrainer.training_step = training_step
adapt(sys.argv[1], sys.argv[2], sys.argv[3], steps=5, length=32, held_out=64, per_device_train_batch_size=2,
      gradient_accumulation_steps=2, bf16=False, save_strategy="steps", save_steps=2)
"""


def test_torchrun_restarts_all_processes_when_one_dies(causal_base: str, corpus: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RESTARTED)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    script = [str(tmp_path / "script.py"), causal_base, corpus, str(tmp_path / "run")]
    # With a shared store, restarted processes would look for the killed ones (pytorch issue 135712).
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launch, *script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint-2" in done.stderr  # where the run was resumed
    options = {
        "steps": 5, "length": 32, "held_out": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "bf16": False,
    }  # fmt: skip
    assert run_world(2, worlds.adapt_until_killed, None, causal_base, corpus, tmp_path / "undisturbed", options) == [
        0,
        0,
    ]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "undisturbed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_resumes_with_fewer_processes_and_the_same_rows_per_step(
    causal_base: str, corpus: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"steps": 4, "length": 32, "held_out": 64, "bf16": False, "optim": "sgd"}
    options |= {"save_strategy": "steps", "save_steps": 1}
    two: dict[str, Any] = options | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    one: dict[str, Any] = options | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    codes = run_world(2, worlds.adapt_until_killed, 2, causal_base, corpus, tmp_path / "run", two)
    assert codes == [-signal.SIGKILL] * 2
    with pytest.raises(ValueError, match="started with 4 rows per step, but the settings now give 2"):
        adapt(causal_base, corpus, tmp_path / "run", **{**one, "gradient_accumulation_steps": 2})
    adapt(causal_base, corpus, tmp_path / "run", **one)
    adapt(causal_base, corpus, tmp_path / "whole", **one)
    run, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    for name, tensor in whole.items():
        torch.testing.assert_close(run[name], tensor, atol=1e-6, rtol=1e-5)
