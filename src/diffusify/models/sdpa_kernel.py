"""What the attention kernels that replace transformers' `sdpa` have in common; each calls it for all that it lacks."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

_IN_PLACE_OF_SDPA = ("sdpa", "tiles", "grouped")
_EXTENSIONS = ("softcap", "s_aux", "position_bias", "cache")


def replace_sdpa(network: PreTrainedModel, name: str) -> None:
    """Make a network use a registered kernel instead of sdpa, or of an earlier replacement of it.

    A network that was loaded with another kernel keeps it.
    """
    if network.config._attn_implementation in _IN_PLACE_OF_SDPA and network._can_set_attn_implementation():
        network.set_attn_implementation(name)


def is_causal_call(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether a call of a kernel without a mask means causal attention."""
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def is_plain_call(mask: Tensor | None, dropout: float, arguments: dict[str, Any]) -> bool:
    """Whether a call has one additive mask for all heads or none, and no dropout or other extension of the scores."""
    extended = dropout or any(arguments.get(name) is not None for name in _EXTENSIONS)
    return not extended and (mask is None or (mask.is_floating_point() and mask.shape[1] == 1))
