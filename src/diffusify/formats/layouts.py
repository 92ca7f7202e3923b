"""The formats that diffusion models are released in: the stock network inside each, and its names and settings.

One description of each format serves import and export: tensor names and settings are read in both directions.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

# What describes no network, and settings that no forward pass without a cache depends on.
_BOOKKEEPING = {"architectures", "auto_map", "dtype", "is_causal", "mask_token_id", "torch_dtype"}
_NO_EFFECT = {"initializer_range", "output_router_logits", "pretraining_tp", "router_aux_loss_coef", "use_cache"}

# Stock settings that a released config under other names may leave out.
_OPTIONAL = re.compile(r"_token_id$|^num_key_value_heads$|_dropout$|_bias$|^rope_scaling$|^hidden_act$|^vocab_size$")


@dataclass(frozen=True)
class Layout:
    """The release format of a family of diffusion models.

    `networks` maps each released model type to the stock one inside and to the released class. `tensor_names` are
    regular expressions and replacements that turn stock tensor names into released ones, applied in order. `settings`
    maps the released name of each setting to the stock one; without it, settings have their stock names. `fixed` gives
    the values that other released settings may have, the usual one first, and `constants` the stock settings that
    follow. `mask_token_ids` maps the number of embeddings to the mask token, for releases whose files do not name it;
    with `fixed_mask`, programs know only this one. `blocks` is whether models of this family decode in blocks, of
    `block_size` where the config gives none under `block_key`. `code` is a repository with the released classes, the
    config class there and the network's module, which exported configs refer to.
    """

    networks: Mapping[str, tuple[str, str]]
    shift: int
    tensor_names: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, str] | None = None
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    mask_token_ids: Mapping[int, int] = field(default_factory=dict)
    fixed_mask: bool = False
    blocks: tuple[bool, ...] = (False,)
    block_size: int | None = None
    block_key: str = "block_size"
    code: tuple[str, str, str] | None = None

    def released_name(self, name: str) -> str:
        """The released name of a stock tensor."""
        for pattern, replacement in self.tensor_names:
            name = re.sub(pattern, replacement, name)
        return name


_ROPE_AND_TOKENS = {
    key: key for key in ("rope_theta", "rms_norm_eps", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
}

LAYOUTS = {
    "diffugpt": Layout(
        {"gpt2": ("gpt2", "GPT2LMHeadModel")},
        shift=1,
        tensor_names=((r"^transformer\.wte\.", "embed_tokens."), (r"^transformer\.", "denoise_model.")),
        constants={"tie_word_embeddings": True},
        mask_token_ids={50257: 10541, 50258: 50257},
    ),
    "diffullama": Layout({"llama": ("llama", "LlamaForCausalLM")}, shift=1, mask_token_ids={32000: 811}),
    "dream": Layout(
        {"Dream": ("qwen2", "DreamModel")},
        shift=1,
        code=("Dream-org/Dream-v0-Instruct-7B", "configuration_dream.DreamConfig", "modeling_dream"),
    ),
    "llada": Layout(
        {"llada": ("llama", "LLaDAModelLM")},
        shift=0,
        tensor_names=(
            (r"^model\.embed_tokens\.", "model.transformer.wte."),
            (r"^model\.norm\.", "model.transformer.ln_f."),
            (r"^lm_head\.", "model.transformer.ff_out."),
            (r"^model\.layers\.", "model.transformer.blocks."),
            (r"\.input_layernorm\.", ".attn_norm."),
            (r"\.post_attention_layernorm\.", ".ff_norm."),
            (r"\.self_attn\.o_proj\.", ".attn_out."),
            (r"\.self_attn\.", "."),
            (r"\.mlp\.gate_proj\.", ".ff_proj."),
            (r"\.mlp\.up_proj\.", ".up_proj."),
            (r"\.mlp\.down_proj\.", ".ff_out."),
        ),
        settings=_ROPE_AND_TOKENS
        | {
            "d_model": "hidden_size",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "n_layers": "num_hidden_layers",
            "mlp_hidden_size": "intermediate_size",
            "max_sequence_length": "max_position_embeddings",
            "weight_tying": "tie_word_embeddings",
            "embedding_size": "vocab_size",
            "attention_dropout": "attention_dropout",
        },
        fixed={
            "block_type": ("llama",),
            "block_group_size": (1, None),
            "activation_type": ("silu",),
            "layer_norm_type": ("rms",),
            "layer_norm_with_affine": (True, None),
            "bias_for_layer_norm": (False, None),
            "attention_layer_norm": (False, None),
            "input_emb_norm": (False, None),
            "rope": (True,),
            "alibi": (False, None),
            "include_bias": (False, None),
            "include_qkv_bias": (False, None),
            "scale_logits": (False, None),
        },
        code=("GSAI-ML/LLaDA-8B-Instruct", "configuration_llada.LLaDAConfig", "modeling_llada"),
    ),
    "llada_moe": Layout(
        {"llada": ("qwen3_moe", "LLaDAMoEModelLM"), "llada_moe": ("qwen3_moe", "LLaDAMoEModelLM")},
        shift=0,
        settings=_ROPE_AND_TOKENS
        | {
            key: key
            for key in (
                *("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_act"),
                *("max_position_embeddings", "tie_word_embeddings", "attention_bias", "attention_dropout"),
                *("num_experts_per_tok", "rope_scaling"),
            )
        }
        | {
            "num_experts": "num_local_experts",
            "expert_intermediate_size": "moe_intermediate_size",
            "dense_intermediate_size": "intermediate_size",
        },
        fixed={
            "qk_layernorm": (True,),
            "moe_router_score_function": ("softmax", None),
            "moe_router_enable_expert_bias": (False, None),
            "shared_expert_intermediate_size": (None, 0),
            "router_num_group": (None,),
            "router_topk_group": (None,),
            "routed_scaling_factor": (1.0, None),
            "clip_qkv": (None,),
            "norm_topk_prob": (None, False),
        },
        constants={"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        mask_token_ids={157184: 156895},
    ),
    "sdar": Layout(
        {"sdar": ("qwen3", "SDARForCausalLM")},
        shift=0,
        mask_token_ids={151936: 151669},
        fixed_mask=True,
        blocks=(True,),
        block_size=4,
        code=("JetLM/SDAR-1.7B-Chat", "configuration_sdar.SDARConfig", "modeling_sdar"),
    ),
    "a2d": Layout(
        {
            "a2d-qwen3": ("qwen3", "A2DQwen3LMHeadModel"),
            "a2d-qwen2": ("qwen2", "A2DQwen2LMHeadModel"),
            "a2d-llama": ("llama", "A2DLlamaLMHeadModel"),
        },
        shift=0,
        blocks=(False, True),
    ),
    "fast_dllm": Layout(
        {"Fast_dLLM_Qwen": ("qwen2", "Fast_dLLM_QwenForCausalLM")},
        shift=1,
        mask_token_ids={151936: 151665, 152064: 151665},
        fixed_mask=True,
        blocks=(True,),
        block_size=32,
        block_key="bd_size",
        code=("Efficient-Large-Model/Fast_dLLM_v2_7B", "configuration.Fast_dLLM_QwenConfig", "modeling"),
    ),
}


def stock_config(layout: Layout, released: dict[str, Any], vocab_size: int, source: str) -> PreTrainedConfig:
    """The config of the stock network inside a released model. ValueError if the released config does not fit it."""
    model_type, _ = layout.networks[released["model_type"]]
    network = CONFIG_MAPPING[model_type]
    for key, allowed in layout.fixed.items():
        if released.get(key) not in allowed:
            raise ValueError(
                f"{source} has {key}={released.get(key)!r}, which stock {model_type} networks do not support; only "
                f"{key}={allowed[0]!r} can be imported"
            )
    if layout.settings is None:
        dropped = _BOOKKEEPING | {"model_type", "transformers_version", layout.block_key}
        stock = {key: value for key, value in released.items() if key not in dropped and not key.startswith("_")}
    else:
        released = _with_implied(released)
        given = {key: released.get(name) for name, key in layout.settings.items()}
        missing = [name for name, key in layout.settings.items() if given[key] is None and not _OPTIONAL.search(key)]
        if missing:
            raise ValueError(f"the config.json of {source} does not give {', '.join(missing)}")
        stock: dict[str, Any] = {
            key: value for key, value in given.items() if value is not None or key.endswith("_token_id")
        }
        stock["head_dim"] = stock["hidden_size"] // stock["num_attention_heads"]  # as the released classes have it
    try:
        return network.from_dict(stock | dict(layout.constants) | {"vocab_size": vocab_size})
    except Exception as error:  # each family validates its settings with exceptions of its own
        raise ValueError(f"the config.json of {source} describes no valid {model_type} network ({error})") from error


def released_config(
    layout: Layout, config: PreTrainedConfig, mask_token_id: int, block_size: int | None, source: str
) -> dict[str, Any]:
    """The released config of a stock network: what `stock_config` reads.

    ValueError if the layout has no word for a setting of the network, so that reading it would give another network.
    """
    model_type, released_class = next(
        (name, released) for name, (stock, released) in layout.networks.items() if stock == config.model_type
    )
    stock = _plain_settings(config)
    names = {key: key for key in stock} if layout.settings is None else layout.settings
    released = {key: allowed[0] for key, allowed in layout.fixed.items()}
    released |= {name: stock.get(key) for name, key in names.items()}
    released |= {"architectures": [released_class], "model_type": model_type, "mask_token_id": mask_token_id}
    if layout.code is not None:
        repository, config_class, module = layout.code
        network = f"{repository}--{module}.{released_class}"
        released["auto_map"] = {
            "AutoConfig": f"{repository}--{config_class}", "AutoModel": network, "AutoModelForCausalLM": network
        }  # fmt: skip
    if block_size is not None:
        released[layout.block_key] = block_size
    again = _plain_settings(stock_config(layout, released, config.vocab_size, source))
    for key in sorted(stock.keys() - _NO_EFFECT):
        if stock[key] != again.get(key):
            raise ValueError(
                f"{source} has {key}={stock[key]!r}, for which {released_class} has no word; use --to hf, which keeps "
                "every setting"
            )
    return released


def _plain_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a stock network, with the rotary embedding under the names of released configs."""
    general = PreTrainedConfig().to_dict().keys() | _BOOKKEEPING
    plain = {key: value for key, value in config.to_dict().items() if key not in general and not key.startswith("_")}
    if rope := plain.pop("rope_parameters", None):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        plain["rope_theta"] = rope["rope_theta"]
        plain["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    return plain


def _with_implied(released: dict[str, Any]) -> dict[str, Any]:
    """A LLaDA config with the settings that others imply."""
    implied = {"embedding_size": released.get("vocab_size")}
    if (width := released.get("d_model")) is not None:
        implied["mlp_hidden_size"] = released.get("mlp_ratio", 4) * width
    if released.get("multi_query_attention"):
        implied["n_kv_heads"] = 1
    return released | {key: value for key, value in implied.items() if released.get(key) is None}
