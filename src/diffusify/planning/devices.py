"""What a run may be trained on: devices by name, so many of them, and the words that numbers are given in."""

import math
import os
import re
from dataclasses import dataclass
from time import perf_counter

import torch

from diffusify.config import nearest

MOST_DEVICES = 100_000
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of an accelerator.

    `half` and `single` are dense peaks in TFLOP/s, of bfloat16 (float16 where there is none) and of float32 without
    TF32; `memory` is in GiB, as the driver tells it. `utilisation` is the share of the peak to reckon with.
    """

    name: str
    half: float
    single: float
    memory: float
    utilisation: float = 0.35
    dtype: str = "bfloat16"  # what it is at its best in

    def peak(self, dtype: str) -> float:
        """FLOP/s. ValueError for a dtype that the device does not compute in."""
        if dtype == "bfloat16" and self.dtype == "float16":
            raise ValueError(f"{self.name} has no bfloat16; give --dtype float16 or float32")
        return 1e12 * (self.single if dtype == "float32" else self.half)


# Peaks are of NVIDIA's data sheets (SXM where there are several forms; half of what is told "with sparsity"), for the
# RTX4090 of the Ada architecture's white paper, accumulating in float32. Utilisation: a Llama 2 7B under FSDP reaches
# about 0.55 on A100 and 0.35 on H100 (3,700 and 7,500 tokens/s of 4,096-token rows: foundation-model-stack/fms-fsdp,
# README), Llama 3 0.38 to 0.43 on H100 (arXiv 2407.21783, table 4). Their kernels are faster than ours; for the others
# it is an assumption.
DEVICES = {
    device.name: device
    for device in (
        Device("A100-40GB", 312.0, 19.5, 39.5, utilisation=0.45),
        Device("A100-80GB", 312.0, 19.5, 79.2, utilisation=0.45),
        Device("H100", 989.0, 66.9, 79.2),
        Device("H200", 989.0, 66.9, 139.8),
        Device("GH200", 989.0, 66.9, 94.5),
        Device("B200", 2250.0, 75.0, 178.3, utilisation=0.3),
        Device("L4", 121.0, 30.3, 22.0),
        Device("RTX4090", 165.2, 82.6, 23.5),
        Device("V100", 125.0, 15.7, 31.7, utilisation=0.3, dtype="float16"),
    )
}


@dataclass(frozen=True)
class Fleet:
    """So many devices of one kind."""

    device: Device
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_DEVICES:
            raise ValueError(f"{self.count} x {self.device.name} must be 1 to {MOST_DEVICES:,} devices, as 8xH100")

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}" if self.count > 1 else self.device.name

    @classmethod
    def parse(cls, text: str) -> "Fleet":
        """`H100`, `64xH100`, `cpu`. ValueError for a device that is not known, or a count that makes no sense."""
        count, name = re.fullmatch(r"(?:(-?\d+)\s*[xX*]\s*)?(.*)", text.strip(), re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
        known = {device.lower(): device for device in (*DEVICES, "cpu")}
        if name.lower() not in known:
            raise ValueError(f'device "{name}" is not known{nearest(name, known.values())}; write it as 8xH100')
        fleet = cls(DEVICES.get(known[name.lower()], Device("cpu", 0.0, 0.0, 0.0)), int(count or 1))
        return cls(this_cpu(), fleet.count) if fleet.device.name == "cpu" else fleet


def this_cpu() -> Device:
    """The machine at hand, its rates measured by a matrix product (about a second)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    half, single = matmul_rate(torch.bfloat16), matmul_rate(torch.float32)
    return Device("cpu", half, single, memory, utilisation=0.5, dtype="bfloat16" if half > single else "float32")


def matmul_rate(dtype: torch.dtype, device: str = "cpu", size: int = 1024, repeats: int = 5) -> float:
    """TFLOP/s of a square matrix product: the best of several, the first of which warms up."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    took = []
    for _ in range(repeats + 1):
        begun = perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        took.append(perf_counter() - begun)
    return 2 * size**3 / min(took[1:]) / 1e12


def read_amount(text: str, what: str = "tokens") -> float:
    """`65B`, `300M`, `1e9`, `2,000`: a number above 0. ValueError for anything else."""
    found = re.fullmatch(r"([+-]?[\d.,_]*\d(?:\.)?(?:e[+-]?\d+)?)\s*([a-z]?)", text.strip(), re.IGNORECASE)
    if not found or found[2].upper() not in _UNITS:
        raise ValueError(f"{what}={text} is no number; write 65B, 300M or 1e9 (units: K, M, B, T)")
    try:
        number = float(found[1].replace(",", "").replace("_", "")) * _UNITS[found[2].upper()]
    except ValueError:
        raise ValueError(f"{what}={text} is no number; write 65B, 300M or 1e9 (units: K, M, B, T)") from None
    if not 0 < number < math.inf:
        raise ValueError(f"{what}={text} must be above 0 and finite, as 65B")
    return number
