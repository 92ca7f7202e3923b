"""Tiny random networks of every tested family."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import AttentionPattern, Bidirectional
from diffusify.models.denoiser import Denoiser

VOCABULARY = 48
MASK = 47
llama_like = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
bert_like = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip

CAUSAL = {
    "llama": llama_like,
    "qwen2": llama_like,
    "qwen3": llama_like,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": bert_like,
    "gemma2": llama_like,
    "gemma3_text": llama_like,
    "olmo2": llama_like,
    "phi3": llama_like,
    "mistral": llama_like,
}
MASKED = {
    "bert": bert_like,
    "roberta": bert_like | {"max_position_embeddings": 65},
    "xlm-roberta": bert_like | {"max_position_embeddings": 65},
    "modernbert": bert_like,
    "albert": bert_like | {"embedding_size": 16},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    "electra": bert_like | {"embedding_size": 16},
}
FAMILIES = CAUSAL | MASKED
MIXTURES = {
    "qwen3_moe": llama_like
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": False}
}


def tiny_network(family: str, kernel: str = "sdpa", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random network with weights so large that every token changes the logits."""
    settings = {"vocab_size": VOCABULARY} | (FAMILIES | MIXTURES)[family] | changes
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(seed)
    auto = AutoModelForMaskedLM if family in MASKED else AutoModelForCausalLM
    network = auto.from_config(config, attn_implementation=kernel)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() > 1 and "norm" not in name.lower():
                weight.mul_(5.0)
    return network.eval()


def tiny_denoiser(
    family: str = "llama", attention: AttentionPattern = Bidirectional(), shift: int | None = None, **changes: Any
) -> Denoiser:
    """A denoiser around `tiny_network`; the shift defaults to that of the family's kind."""
    network = tiny_network(family, **changes)
    shift = int(family in CAUSAL) if shift is None else shift
    return Denoiser(network, DiffusionConfig(MASK, shift, attention, type(network).__name__)).eval()
