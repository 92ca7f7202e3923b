"""Fused layers for inference on a CPU: the transformer layers of the Llama family in fewer operations.

In a pass over a few tokens, a stock layer spends as much time between its matrix products as in them. A fused layer
uses the same weights: one product gives queries, keys and values, one gives both halves of the MLP, and norms and
rotary embeddings take a few operations. A layer is only replaced if its output stays the same in an experiment.

Axes: b texts, m positions, d hidden size, e head size.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffusify.models.fast_training import transformer_layers
from diffusify.models.grouped_attention import grouped_attention
from diffusify.models.prepacking import PrepackedLinear, can_prepack

_PROBE_LENGTH = 4
# The largest difference of a fused layer's output, relative to the largest value of the stock layer's change.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def fuse_layers(network: PreTrainedModel) -> None:
    """Fuse those layers of a network that are built like Llama's (Llama, Mistral, Qwen2, Qwen3, ...)."""
    if network.device.type == "cpu" and can_prepack(network.dtype):
        for layer in transformer_layers(network):
            if _looks_like_llama(layer):
                _fuse(layer)


class FusedForward:
    """The forward method of a fused layer, on the modules of the stock one."""

    def __init__(self, layer: Any) -> None:
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = PrepackedLinear.join(self.attention, ("q_proj", "k_proj", "v_proj"))
        self.out = PrepackedLinear.join(self.attention, ("o_proj",))
        self.gate_up = PrepackedLinear.join(self.mlp, ("gate_proj", "up_proj"))
        self.down = PrepackedLinear.join(self.mlp, ("down_proj",))

    def __call__(
        self,
        hidden_states: Float[Tensor, "b m d"],
        attention_mask: Tensor | None = None,
        *,
        position_embeddings: tuple[Float[Tensor, "_ m e"], Float[Tensor, "_ m e"]],
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Float[Tensor, "b m d"]:
        attention = self.attention
        size = attention.head_dim
        qkv = self.qkv.forward(_rms_norm(self.norms[0], hidden_states)).unflatten(-1, (-1, size))
        key_heads = self.qkv.sizes[1] // size
        if hasattr(attention, "q_norm"):
            query, key = qkv[:, :, : -2 * key_heads], qkv[:, :, -2 * key_heads : -key_heads]
            qk = torch.cat([attention.q_norm(query), attention.k_norm(key)], 2)
        else:
            qk = qkv[:, :, :-key_heads]
        cos, sin = (each[:, :, None] for each in position_embeddings)
        left, right = qk.chunk(2, -1)
        qk = (qk * cos + torch.cat([-right, left], -1) * sin).transpose(1, 2)
        query, key, value = qk[:, :-key_heads], qk[:, -key_heads:], qkv[:, :, -key_heads:].transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        mixed, _ = grouped_attention(attention, query, key, value, attention_mask, scaling=attention.scaling)
        hidden_states = self.out.add_to(hidden_states, mixed.flatten(2))
        gate, up = self.gate_up.forward(_rms_norm(self.norms[1], hidden_states)).chunk(2, -1)
        return self.down.add_to(hidden_states, self.mlp.act_fn(gate) * up)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _looks_like_llama(layer: Any) -> bool:
    """Whether a layer has the modules that a fused layer needs."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    parts = [
        (attention, ("q_proj", "k_proj", "v_proj", "o_proj")),
        (mlp, ("gate_proj", "up_proj", "down_proj")),
    ]
    linear = all(type(getattr(module, name, None)) is nn.Linear for module, names in parts for name in names)
    norms = [getattr(layer, "input_layernorm", None), getattr(layer, "post_attention_layernorm", None)]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return (
        linear
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and all(hasattr(attention, name) for name in ("head_dim", "layer_idx", "scaling"))
        and hasattr(mlp, "act_fn")
    )


@torch.no_grad()
def _fuse(layer: Any) -> None:
    """Fuse a layer if this keeps its output."""
    dtype, size = layer.self_attn.q_proj.weight.dtype, layer.self_attn.head_dim
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _PROBE_LENGTH, layer.self_attn.q_proj.in_features, generator=generator).to(dtype)
    angles = torch.arange(_PROBE_LENGTH)[:, None] * torch.rand(size // 2, generator=generator).repeat(2)
    position_embeddings = (angles.cos().to(dtype)[None], angles.sin().to(dtype)[None])
    mask = torch.zeros(1, 1, _PROBE_LENGTH, _PROBE_LENGTH, dtype=dtype)
    mask[..., 1:, 0] = torch.finfo(dtype).min
    inputs = {"hidden_states": hidden, "attention_mask": mask, "position_embeddings": position_embeddings}
    plain = {
        name: dict(module.named_children()) for name, module in (("self_attn", layer.self_attn), ("mlp", layer.mlp))
    }
    try:
        expected = layer(**inputs)
        fused = FusedForward(layer)
        error = (fused(**inputs) - expected).abs().max()
        same = bool(error <= _TOLERANCE[dtype] * (expected - hidden).abs().max())
    except (AttributeError, RuntimeError, TypeError, ValueError):  # another kind of layer
        same = False
    if same:
        layer.forward = fused
    else:
        for name, children in plain.items():
            for child, module in children.items():
                setattr(getattr(layer, name), child, module)
