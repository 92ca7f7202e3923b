"""Faster training steps: tiled attention, half-width frozen weights and residual stream, compiled layers."""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from diffusify.models.tiled_attention import use_tiled_attention

_FEW_ROWS = 8  # of an embedding that are trained: the mask token's and those of the length tokens
_PLAIN = (nn.Embedding, nn.Linear)  # other classes of embeddings may scale their outputs


def optimize_for_training(
    network: PreTrainedModel, *, autocast_dtype: torch.dtype | None = None, compiled: bool = False
) -> None:
    """Make a network's training steps faster; its outputs stay the same up to rounding.

    On a CPU, attention is computed in tiles. A few trained rows of an embedding are used beside the frozen ones, not
    copied into the matrix in every pass. Under autocast, the outputs of embeddings and norms are cast to the autocast
    dtype at once, so the residual stream is half as wide and no linear layer casts it again. Frozen matrices are kept
    in the `autocast_dtype` alone, if it is given, which saves casting them in every pass and half their memory. With
    `compiled`, each layer is compiled: a CPU needs a C++ compiler for it; on a GPU, flex attention then skips fully
    masked blocks.
    """
    use_tiled_attention(network)
    _separate_trained_rows(network)
    if autocast_dtype is not None:
        _narrow_frozen_weights(network, autocast_dtype)
        for module in network.modules():
            if isinstance(module, LoraLayer):
                module.cast_input_dtype_enabled = False  # autocast casts the input once, PEFT for every adapter
    if compiled and network.device.type == "cuda" and network._supports_flex_attn:
        network.set_attn_implementation("flex_attention")
    for module in network.modules():
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Norm"):
            module.register_forward_hook(_cast_to_autocast_dtype)
    if compiled:
        for layer in transformer_layers(network):
            layer.compile()


def transformer_layers(network: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers of a network: the longest module list in its body."""
    lists = [module for module in network.base_model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


class _SeparateRows:
    """The forward method of an embedding or output head of which a few rows are trained, by PEFT's layer for them."""

    def __init__(self, layer: TrainableTokensLayer) -> None:
        self.layer, self.base = layer, layer.get_base_layer()
        (self.name,) = layer.token_indices

    def __call__(self, x: Tensor) -> Tensor:
        output, ids = self.base(x), self.layer.token_indices[self.name]
        rows: Tensor = self.layer.trainable_tokens_delta[self.name]
        if isinstance(self.base, nn.Embedding):
            for token_id, row in zip(ids, rows, strict=True):
                output = torch.where((x == token_id)[..., None], row.to(output.dtype), output)
        else:
            output[..., ids] = F.linear(x, rows).to(output.dtype)
        return output


def _separate_trained_rows(network: PreTrainedModel) -> None:
    """Use the trained rows of plain embeddings and heads without copying them into the matrices."""
    for module in network.modules():
        if not isinstance(module, TrainableTokensLayer) or type(module.get_base_layer()) not in _PLAIN:
            continue
        if max(map(len, module.token_indices.values())) <= _FEW_ROWS:
            module.forward = _SeparateRows(module)


def _narrow_frozen_weights(network: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep frozen matrices in `dtype`.

    Not those into which trained rows are copied, since their gradients need float32, and not embeddings of a class of
    their own, which may compute with their outputs before these are cast.
    """
    separate = {id(m) for m in network.modules() if isinstance(getattr(m, "forward", None), _SeparateRows)}
    special = (
        module
        for module in network.modules()
        if (isinstance(module, AuxiliaryTrainingWrapper) and id(getattr(module, "token_adapter", None)) not in separate)
        or (isinstance(module, nn.Embedding) and type(module) is not nn.Embedding)
    )
    kept = {id(weight) for module in special for weight in module.parameters()}
    for module in network.modules():
        if type(module) in (nn.Linear, nn.Embedding, Conv1D):
            weight: Any = module.weight
            if not weight.requires_grad and weight.dtype == torch.float32 and id(weight) not in kept:
                weight.data = weight.data.to(dtype)


def _cast_to_autocast_dtype(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output
