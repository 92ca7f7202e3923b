"""The training arguments of a run, and what its options change."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusify.training import run_folder
from diffusify.training.adapt import adapt
from diffusify.training.budget import Budget
from diffusify.training.run_folder import fast_bfloat16, training_arguments
from diffusify.training.trainer import DiffusionTrainer
from tests.families import tiny_denoiser


@pytest.mark.parametrize(
    ("options", "dtypes"), [({}, (True, False)), ({"fp16": True}, (False, True)), ({"bf16": False}, (False, False))]
)
def test_options_replace_the_default_data_type(
    options: dict[str, Any], dtypes: tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "fast_bfloat16", lambda: True)
    args = training_arguments(tmp_path, Budget(1), tiny_denoiser("llama"), 0, options)
    assert (args.bf16, args.fp16) == dtypes


def test_emulated_bfloat16_is_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not fast_bfloat16()


@pytest.mark.parametrize(
    ("options", "evaluated", "saved"),
    [
        ({}, [0, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5]),
        ({"eval_steps": 4, "save_steps": 4}, [0, 4, 6], [4, 6]),
        ({"eval_strategy": "steps", "eval_steps": 3, "eval_delay": 3}, [3, 6], [1, 2, 3, 4, 5]),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [0, 6], [6]),
        ({"eval_strategy": "no", "save_strategy": "no"}, [], []),
    ],
)
def test_options_replace_the_default_schedule(
    causal_base: str,
    corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    evaluated: list[int],
    saved: list[int],
) -> None:
    """A step takes a thousand seconds, and a checkpoint is due after ten minutes."""
    monkeypatch.setattr("diffusify.training.budget.perf_counter", itertools.count(step=1000).__next__)
    saves, real = list[int](), DiffusionTrainer._save_checkpoint

    def save(trainer: DiffusionTrainer, *args: Any) -> None:
        saves.append(trainer.state.global_step)
        real(trainer, *args)

    monkeypatch.setattr(DiffusionTrainer, "_save_checkpoint", save)
    out = adapt(causal_base, corpus, tmp_path, steps=6, length=32, held_out=64, bf16=False, **options)
    log = json.loads((out / "training.json").read_text())["log"]
    assert ([entry["step"] for entry in log if "eval_bound" in entry], saves) == (evaluated, saved)
