"""The device and the data type that a model is opened with."""

from typing import Literal, cast, get_args

import torch

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def choose_device(device: torch.device | str = "auto") -> torch.device:
    """The device of that name; `auto` is the accelerator (CUDA, XPU or MPS) if there is one, else the CPU.

    ValueError if this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        return accelerator or torch.device("cpu")
    count = torch.accelerator.device_count() if accelerator else 0
    available = ["cpu", *([f"{accelerator}:{index}" for index in range(count)])]
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    is_cpu = chosen is not None and chosen.type == "cpu"
    is_accelerator = chosen is not None and accelerator is not None and chosen.type == accelerator.type
    if chosen is None or not (is_cpu or (is_accelerator and (chosen.index or 0) < count)):
        raise ValueError(f'device "{device}" is not on this machine, which has {", ".join(available)}; or give auto')
    return chosen


def choose_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The data type of that name; `auto` is float32 on a CPU, where lossless decoding is then exact.

    On an accelerator `auto` is bfloat16, or float16 for a GPU that computes bfloat16 only by emulation. ValueError for
    another name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    names = get_args(DtypeName)
    if dtype not in names:
        raise ValueError(f'dtype "{dtype}" is not known; give {", ".join(names[:-1])} or {names[-1]}')
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    if device.type == "cpu":
        return torch.float32
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if emulated else torch.bfloat16
