"""The devices and the data type that a model is opened with, and the memory that opening takes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffusify
from diffusify.models.accelerator import choose_device, choose_dtype
from diffusify.models.loading import load_base
from diffusify.models.memory import return_freed_memory
from tests import pretend_accelerator
from tests.families import tiny_network
from tests.text import makers


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_go_to_the_device_one_by_one(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host never holds more than a few of them, however they are stored; and this would be noticed."""
    network: Any = tiny_network("llama", vocab_size=320, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    network.to(stored).save_pretrained(tmp_path, max_shard_size="32MB")
    makers.byte_level().tokenizer.save_pretrained(tmp_path)
    numbers = sum(weight.numel() for weight in network.parameters())
    del network

    def peak_host_memory(open: Callable[[], Any]) -> int:
        """The most anonymous memory beside that of the pretended device, at any move, in bytes."""
        before, on_device, peak = anonymous_memory(), 0, 0

        def move(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
            nonlocal on_device, peak
            peak = max(peak, anonymous_memory() - before - on_device)
            on_device += tensor.nbytes
            return plain_move(ctx, tensor, device)

        plain_move = pretend_accelerator._Move.forward
        with pretend_accelerator.accelerator(), monkeypatch.context() as patch:
            patch.setattr(pretend_accelerator._Move, "forward", staticmethod(move))
            opened = open()
        assert {weight.dtype for weight in opened.parameters()} == {torch.bfloat16} and on_device >= 2 * numbers
        return peak

    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    direct = peak_host_memory(lambda: load_base(str(tmp_path), dtype=torch.bfloat16, device="cuda").network)
    plain: Any = load_base
    copied = peak_host_memory(lambda: plain(str(tmp_path)).network.to("cuda", torch.bfloat16))
    assert direct < numbers and copied > 2 * numbers


def anonymous_memory() -> int:
    """The memory that this process uses and no file backs, in bytes."""
    return_freed_memory()
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])
