"""A network's output head alone, run by the network's own forward method."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel


def logits_without_body(network: PreTrainedModel, output: Any) -> Float[Tensor, "k v"]:
    """The logits of a network whose body is replaced by one that returns `output`, with hidden states [1, k, d]."""
    prefix, body = network.base_model_prefix, network.base_model
    setattr(network, prefix, _FixedBody(output))
    try:
        return network(input_ids=torch.zeros_like(output.last_hidden_state[..., 0], dtype=torch.long)).logits[0]
    finally:
        setattr(network, prefix, body)


class _FixedBody(nn.Module):
    """A stand-in for a network's body that returns a given output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output
