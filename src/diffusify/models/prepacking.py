"""Prepacked weights: linear layers whose weights are stored in oneDNN's own layout, for networks that are only read.

A matrix product on a CPU first packs the weight into the processor's layout. For the few rows of a decoding step this
costs more than the product itself, so here it is done once.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diffusify.models.mask_adapters import MaskAdapter, MaskRows

_ROWS = 16  # the number of input rows that the layout is made for; any number may be used


class PrepackedLinear(nn.Module):
    """Linear layers of one input with a joint prepacked weight, on a CPU and without gradients.

    Its output is that of all layers, one after the other. It stays on the CPU, in its dtype.
    """

    def __init__(self, layers: list[nn.Linear | Conv1D]) -> None:
        super().__init__()
        weights = [each.weight.t() if isinstance(each, Conv1D) else each.weight for each in layers]
        self.sizes = [len(weight) for weight in weights]
        biases = [each.bias for each in layers]
        self.bias = None
        if any(bias is not None for bias in biases):
            filled = [
                weights[0].new_zeros(size) if bias is None else bias
                for bias, size in zip(biases, self.sizes, strict=True)
            ]
            self.bias = torch.cat([bias.detach() for bias in filled])
        weight = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
        self._packed = _pack(weight)
        self._adapter = PackedAdapter.join(layers, self.sizes)

    @classmethod
    def join(cls, parent: nn.Module, names: tuple[str, ...]) -> "PrepackedLinear":
        """Join children of a module that have the same input; each of them becomes a part of the joint layer."""
        joint = cls([getattr(parent, name) for name in names])
        for name, end, size in zip(names, accumulate(joint.sizes), joint.sizes, strict=True):
            setattr(parent, name, PrepackedPart(joint, slice(end - size, end)))
        return joint

    @property
    def weight(self) -> Tensor:
        """A plain copy of the weight, [outputs, inputs]."""
        return self._packed.to_dense(self._packed.dtype)

    @property
    def memory(self) -> tuple[int, int]:
        """The address and the size in bytes of the packed weight."""
        return torch.ops.mkldnn.data_ptr(self._packed), torch.ops.mkldnn._nbytes(self._packed)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("prepacked weights have no gradients; load the model for training, by `load_denoiser`")
        return self._adapted(torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], ""), x)

    def add_to(self, other: Tensor, x: Tensor) -> Tensor:
        """`other` plus the output for `x`, in one operation."""
        return self._adapted(_linear_plus(x, self._packed, self.bias, other), x)

    def _adapted(self, output: Tensor, x: Tensor) -> Tensor:
        return output if self._adapter is None else self._adapter.add_to(output, x)


class PackedAdapter:
    """The mask adapters of linear layers with one input, in two plain products.

    These are float32 whatever the layers' dtype: for so few rows and columns, oneDNN takes much longer to begin.
    """

    def __init__(self, adapters: list[MaskAdapter | None], sizes: list[int]) -> None:
        present = [each for each in adapters if each is not None]
        self.rows: MaskRows = present[0].rows
        self._down = torch.cat([each.lora_A.weight.detach() for each in present]).float().t().contiguous()
        up = [torch.zeros(size, 0) if each is None else each.scale * each.lora_B.weight.detach().float()
              for each, size in zip(adapters, sizes, strict=True)]  # fmt: skip
        self._up = torch.block_diag(*up).t().contiguous()

    @classmethod
    def join(cls, layers: list[Any], sizes: list[int]) -> "PackedAdapter | None":
        """The adapters of some layers; None if none of them has one."""
        adapters = [getattr(layer, "mask_adapter", None) for layer in layers]
        if not any(adapters):
            return None
        return cls(adapters, sizes)

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """The output of the layers for `x`, with the terms of the adapters; it may be changed in place."""
        if self.rows.is_mask is None:
            return output
        start = self.rows.start
        if start is None or output.shape[:-1] != self.rows.is_mask.shape:
            low_rank = x.float() @ self._down
            return output + ((low_rank * self.rows.select(low_rank)) @ self._up).to(output.dtype)
        if start < output.shape[1]:
            output[:, start:] += (x[:, start:].float() @ self._down) @ self._up
        return output


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)


def _linear_plus(x: Tensor, packed: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, "add")


class PrepackedPart(nn.Module):
    """One of the linear layers of a `PrepackedLinear`. Its state dict has the plain weight."""

    joint: PrepackedLinear

    def __init__(self, joint: PrepackedLinear, part: slice) -> None:
        super().__init__()
        object.__setattr__(self, "joint", joint)  # not a child module, since several parts share it
        self._part = part
        self._whole = len(joint.sizes) == 1

    @property
    def weight(self) -> Tensor:
        """A plain copy of the weight, [outputs, inputs]."""
        return self.joint.weight[self._part]

    @property
    def bias(self) -> Tensor | None:
        bias = self.joint.bias
        return None if bias is None else bias[self._part]

    def forward(self, x: Tensor) -> Tensor:
        out = self.joint(x)
        return out if self._whole else out[..., self._part]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Ignore a weight that is tied again, by `tie_weights`: the packed weight has the same values."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> "PrepackedPart":
        old = self.joint._packed
        moved = fn(torch.empty(0, dtype=old.dtype))
        if (moved.device.type, moved.dtype) != ("cpu", old.dtype):
            raise ValueError(
                f"prepacked weights stay on the CPU in {old.dtype}; for {moved.device} and {moved.dtype}, load the "
                "model with these as `device` and `dtype`"
            )
        return self


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this processor gains from prepacked weights of a dtype: float32 or bfloat16 by oneDNN on x86."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepack(network: nn.Module) -> None:
    """Replace a network's linear layers on the CPU by prepacked ones, where the processor gains from it.

    Weights that other modules use as well, such as tied embeddings, keep their plain copy there.
    """
    for parent in list(network.modules()):
        if isinstance(parent, MaskAdapter):
            continue  # packed together with its layer
        for name, child in list(parent.named_children()):
            weight: Any = child.weight if type(child) in (nn.Linear, Conv1D) else None
            if weight is None or weight.device.type != "cpu":
                continue
            if can_prepack(weight.dtype):
                PrepackedLinear.join(parent, (name,))


def packed_memory(network: nn.Module) -> list[tuple[int, int]]:
    """The address and the size in bytes of every prepacked weight."""
    joint = {module.joint for module in network.modules() if isinstance(module, PrepackedPart)}
    return [each.memory for each in joint]
