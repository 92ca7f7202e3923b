"""The devices a run can be planned for, and the parsing of device counts and token amounts."""

import math
import os
import re
from dataclasses import dataclass
from time import perf_counter

import torch

from diffusify.config import nearest

MAX_DEVICES = 100_000
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Device:
    """An accelerator's specifications.

    `half` and `single` are dense peak rates in TFLOP/s: in bfloat16 (float16 if unsupported), and in float32 without
    TF32. `memory` is in GiB, as the driver reports it. `utilisation` is the share of the peak a plan assumes.
    """

    name: str
    half: float
    single: float
    memory: float
    utilisation: float = 0.35
    dtype: str = "bfloat16"  # the default to compute in

    def peak(self, dtype: str) -> float:
        """The peak rate in FLOP/s. ValueError if the device does not support the dtype."""
        if dtype == "bfloat16" and self.dtype == "float16":
            raise ValueError(f"{self.name} has no bfloat16; give --dtype float16 or float32")
        return 1e12 * (self.single if dtype == "float32" else self.half)


# Peak rates are from NVIDIA's data sheets (the SXM variant if there are several; half of the rate "with sparsity"), for
# the RTX4090 from the Ada white paper, accumulating in float32. Utilisation: a Llama 2 7B under FSDP reaches about 0.55
# on A100 and 0.35 on H100 (3,700 and 7,500 tokens/s of 4,096-token rows: foundation-model-stack/fms-fsdp, README),
# Llama 3 0.38 to 0.43 on H100 (arXiv 2407.21783, table 4). Their kernels are faster than ours; the values of the other
# devices are assumptions.
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
class DeviceGroup:
    """A number of devices of one kind. ValueError if `count` is not between 1 and `MAX_DEVICES`."""

    device: Device
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_DEVICES:
            raise ValueError(f"{self.count} x {self.device.name} must be 1 to {MAX_DEVICES:,} devices, as 8xH100")

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}" if self.count > 1 else self.device.name

    @classmethod
    def parse(cls, text: str) -> "DeviceGroup":
        """Parse text such as `H100`, `64xH100` or `cpu`. ValueError for an unknown device or an invalid count."""
        count, name = re.fullmatch(r"(?:(-?\d+)\s*[xX*]\s*)?(.*)", text.strip(), re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
        known = {device.lower(): device for device in (*DEVICES, "cpu")}
        if name.lower() not in known:
            raise ValueError(f'device "{name}" is not known{nearest(name, known.values())}; write it as 8xH100')
        group = cls(DEVICES.get(known[name.lower()], Device("cpu", 0.0, 0.0, 0.0)), int(count or 1))
        return cls(detect_cpu(), group.count) if group.device.name == "cpu" else group


def detect_cpu() -> Device:
    """The current machine, with rates measured by a matrix product (about a second)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    half, single = matmul_rate(torch.bfloat16), matmul_rate(torch.float32)
    return Device("cpu", half, single, memory, utilisation=0.5, dtype="bfloat16" if half > single else "float32")


def matmul_rate(dtype: torch.dtype, device: str = "cpu", size: int = 1024, repeats: int = 5) -> float:
    """The rate of a square matrix product in TFLOP/s: the best of `repeats`, after one to warm up."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        start = perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(perf_counter() - start)
    return 2 * size**3 / min(seconds[1:]) / 1e12


def parse_amount(text: str, name: str = "tokens") -> float:
    """Parse a number above 0 such as `65B`, `300M`, `1e9` or `2,000`. ValueError for anything else."""
    match = re.fullmatch(r"([+-]?[\d.,_]*\d(?:\.)?(?:e[+-]?\d+)?)\s*([a-z]?)", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{name}={text} is not a number; write 65B, 300M or 1e9 (units: K, M, B, T)")
    try:
        number = float(match[1].replace(",", "").replace("_", "")) * _UNITS[match[2].upper()]
    except ValueError:
        raise ValueError(f"{name}={text} is not a number; write 65B, 300M or 1e9 (units: K, M, B, T)") from None
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={text} must be above 0 and finite, as 65B")
    return number
