"""The training arguments of a run, and what its options change."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusify.training import run_folder
from diffusify.training.budget import Budget
from diffusify.training.run_folder import fast_bfloat16, training_arguments
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
