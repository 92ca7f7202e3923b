"""What decides the attention masks of a network: its sliding windows, its first position id, and doing without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel


@contextmanager
def without_mask(network: PreTrainedModel) -> Iterator[None]:
    """Inside, the network attends in both directions without a mask, on the attention kernel's fast path."""
    config: Any = network.config
    causal: list[Any] = [
        module for module in (config, *network.modules()) if getattr(module, "is_causal", None) is True
    ]
    unset = not hasattr(config, "is_causal")
    for module in causal:
        module.is_causal = False
    if unset:
        config.is_causal = False
    try:
        yield
    finally:
        for module in causal:
            module.is_causal = True
        if unset:
            del config.is_causal


def position_offset(network: PreTrainedModel) -> int:
    """The network's first position id: RoBERTa's is one past the padding id, all others' is 0."""
    embeddings: Any = getattr(network.base_model, "embeddings", None)
    counts_from_padding = hasattr(embeddings, "create_position_ids_from_input_ids")
    return embeddings.padding_idx + 1 if counts_from_padding else 0


def sliding_windows(network: PreTrainedModel) -> dict[str, int | None]:
    """The attention window of each layer type (None: no limit); empty if no layer has one."""
    config = network.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return {}
    width = window + 1 if type(network).__name__.endswith("MaskedLM") else window  # masked networks count inclusively
    if kinds is None:
        return {"sliding_attention": width}
    return {kind: width if kind == "sliding_attention" else None for kind in kinds}
