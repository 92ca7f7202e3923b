"""Law 8 and law 12 for many processes: whoever does the work, a run is the same, and what stops one stops all."""

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
from tests.training.worlds import learn, losses, start, world

BATCH = 8
STEPS: dict[str, Any] = {"max_steps": 5}


def share(processes: int, accumulation: int = 1) -> dict[str, Any]:
    """What each process does of a step of BATCH rows."""
    return {
        "per_device_train_batch_size": BATCH // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
    }


@pytest.fixture(scope="module")
def alone(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    out = tmp_path_factory.mktemp("alone")
    process = start(learn, causal_base, corpus, out, STEPS | share(1))
    process.join()
    assert process.exitcode == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_who_does_the_work_changes_nothing(
    causal_base: str, corpus: str, tmp_path: Path, alone: Path, processes: int, accumulation: int
) -> None:
    assert world(processes, learn, causal_base, corpus, tmp_path, STEPS | share(processes, accumulation)) == (
        [0] * processes
    )
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-6)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("processes", [2, 4])
def test_weights_that_are_shared_out_are_the_same_weights(
    causal_base: str, corpus: str, tmp_path: Path, alone: Path, processes: int
) -> None:
    """FSDP2: the body and the head, which stand beside each other, see whole weights; what is saved is whole."""
    options = STEPS | share(processes) | {"sharded": True}
    assert world(processes, learn, causal_base, corpus, tmp_path, options) == [0] * processes
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-6)
    assert set(weights(tmp_path)) == set(weights(alone))
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, atol=1e-6, rtol=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    load_denoiser(tmp_path / "model")


def test_a_checkpoint_of_four_goes_on_with_one_two_or_three(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """Shared out or not, with an optimizer that remembers."""
    saves = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-4}
    first = {"max_steps": 3} | saves | share(4) | {"sharded": True}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(learn, causal_base, corpus, whole, {"max_steps": 6} | saves | share(1)).join()
    assert world(4, learn, causal_base, corpus, parts, first) == [0] * 4
    state = torch.load(parts / "checkpoint-3" / "optimizer.pt")
    assert {len(state["state"]), len(state["param_groups"][0]["params"] + state["param_groups"][1]["params"])} == {
        len(torch.load(whole / "checkpoint-3" / "optimizer.pt")["state"])
    }
    for processes, sharded in [(1, False), (2, True), (2, False)]:
        out = tmp_path / f"{processes}-{sharded}"
        shutil.copytree(parts / "checkpoint-3", out / "checkpoint-3")
        rest = {"max_steps": 6} | saves | share(processes) | {"sharded": sharded, "resume": True}
        assert world(processes, learn, causal_base, corpus, out, rest) == [0] * processes
        assert losses(out) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_one_bad_number_skips_the_step_for_all(causal_base: str, corpus: str, tmp_path: Path, sharded: bool) -> None:
    options = {"max_steps": 2, "sharded": sharded, "prepare": worlds.bad_step_at_last_rank} | share(2, 2)
    assert world(2, learn, causal_base, corpus, tmp_path / "bad", options) == [0, 0]
    assert world(2, learn, causal_base, corpus, tmp_path / "good", options | {"max_steps": 1, "prepare": None}) == [
        0,
        0,
    ]
    log = json.loads((tmp_path / "bad" / "log.json").read_text())
    assert [entry.get("skipped") for entry in log if "loss" in entry] == [None, 1]
    for name, tensor in weights(tmp_path / "good").items():
        assert torch.equal(weights(tmp_path / "bad")[name], tensor), name


def test_one_that_is_told_to_stop_stops_all(causal_base: str, corpus: str, tmp_path: Path) -> None:
    options = {"max_steps": 9, "prepare": worlds.told_to_stop_at_last_rank} | share(2)
    assert world(2, learn, causal_base, corpus, tmp_path, options) == [143, 143]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_disk_that_is_full_for_one_stops_nobody(causal_base: str, corpus: str, tmp_path: Path) -> None:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "sharded": True}
    options |= {"prepare": worlds.full_disk_at_first_rank} | share(2)
    assert world(2, learn, causal_base, corpus, tmp_path, options) == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


def test_minutes_pass_for_all_alike(causal_base: str, corpus: str, tmp_path: Path) -> None:
    """Else one would stop, and the other wait for it."""
    options = {"max_steps": 1000, "minutes": 0.1, "prepare": worlds.clocks_that_differ} | share(2)
    assert world(2, learn, causal_base, corpus, tmp_path, options) == [0, 0]
    assert max(entry["step"] for entry in json.loads((tmp_path / "log.json").read_text())) == 6


RESTARTED = """
import os, signal, sys
from diffusify.training.adapt import adapt
from diffusify.training.trainer import DiffusionTrainer

real, first = DiffusionTrainer.training_step, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

def training_step(trainer, *given, **more):
    if first and os.environ["RANK"] == "1" and trainer.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(trainer, *given, **more)

DiffusionTrainer.training_step = training_step
adapt(sys.argv[1], sys.argv[2], sys.argv[3], steps=5, length=32, held_out=64, per_device_train_batch_size=2,
      gradient_accumulation_steps=2, bf16=False, save_strategy="steps", save_steps=2)
"""


@pytest.mark.slow
def test_torchrun_starts_all_again_when_one_dies(causal_base: str, corpus: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(RESTARTED)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    given = [str(tmp_path / "script.py"), causal_base, corpus, str(tmp_path / "run")]
    # Without a store of their own, those who start again look for those that died (pytorch issue 135712).
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    made = subprocess.run([sys.executable, "-m", *launch, *given], env=env, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "checkpoint-2" in made.stderr  # where it went on
    options = {
        "steps": 5, "length": 32, "held_out": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "bf16": False,
    }  # fmt: skip
    assert world(2, worlds.adapt_until, None, causal_base, corpus, tmp_path / "calm", options) == [0, 0]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "calm"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_goes_on_with_fewer_processes_and_as_many_rows(causal_base: str, corpus: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "length": 32, "held_out": 64, "bf16": False, "optim": "sgd"}
    options |= {"save_strategy": "steps", "save_steps": 1}
    two: dict[str, Any] = options | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    one: dict[str, Any] = options | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    codes = world(2, worlds.adapt_until, 2, causal_base, corpus, tmp_path / "run", two)
    assert codes == [-signal.SIGKILL] * 2
    with pytest.raises(ValueError, match="begun with 4 rows in a step, and here are 2"):
        adapt(causal_base, corpus, tmp_path / "run", **{**one, "gradient_accumulation_steps": 2})
    adapt(causal_base, corpus, tmp_path / "run", **one)
    adapt(causal_base, corpus, tmp_path / "whole", **one)
    run, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    for name, tensor in whole.items():
        torch.testing.assert_close(run[name], tensor, atol=1e-6, rtol=1e-5)
