"""The precision of sums and random numbers on a device."""

import torch


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on MPS, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64
