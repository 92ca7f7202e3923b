"""The device and the data type that a model is opened with."""

import pytest
import torch

import diffusify
from diffusify.models.accelerator import choose_device, choose_dtype


class Machine:
    """Replaces `torch.accelerator` by that of a machine with some GPUs."""

    def __init__(self, kind: str | None, count: int) -> None:
        self.kind, self.count = kind, count

    def current_accelerator(self, check_available: bool = False) -> torch.device | None:
        return torch.device(self.kind) if self.kind else None

    def device_count(self) -> int:
        return self.count


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_accelerator_in_half_precision_is_the_default(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "accelerator", Machine(kind, 2))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert choose_device() == torch.device(kind)
    assert choose_dtype("auto", torch.device(kind)) == torch.bfloat16
    assert choose_device("cpu") == torch.device("cpu") and choose_device(f"{kind}:1") == torch.device(kind, 1)
    for wrong in (f"{kind}:2", "nonsense", "cuda:7", "xla"):
        with pytest.raises(ValueError, match=f'device "{wrong}" .* cpu, {kind}:0, {kind}:1; or give auto'):
            choose_device(wrong)


def test_without_an_accelerator_it_is_the_cpu_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "accelerator", Machine(None, 0))
    assert choose_device() == torch.device("cpu") and choose_dtype("auto", torch.device("cpu")) == torch.float32
    with pytest.raises(ValueError, match='device "cuda" is not on this machine, which has cpu'):
        choose_device("cuda")


def test_a_gpu_without_bfloat16_computes_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16


def test_a_given_type_is_kept_and_an_unknown_one_refused() -> None:
    assert choose_dtype("bfloat16", torch.device("cpu")) == choose_dtype(torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError, match='dtype "fp8" is not known; give auto, float32, bfloat16 or float16'):
        diffusify.load("smollm2-block", dtype="fp8")
