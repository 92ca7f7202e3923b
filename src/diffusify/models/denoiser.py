"""A pretrained network behind the one contract: `Denoiser(canvas).logits[b, i]` is about position i, always.

Axes: b texts, n canvas positions, k asked positions, j positions of the AR co-loss, v vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import AttentionInputs, AttentionPattern, BlockCausal
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.objectives import Loss
from diffusify.models.length_head import LengthHead, prompts


@dataclass(frozen=True)
class Prediction:
    """Logits about canvas positions: all of them, `[b, n, v]`, or the asked ones row by row, `[k, v]`.

    The mask token is never an answer: its logit is -inf. `ar_logits` are the clean text's next-token predictions,
    `lengths` the length head's logits for each text with editable positions, where it was asked. Where a `loss` was
    asked for, it is all that is kept of the logits.
    """

    logits: Float[Tensor, "*asked v"]
    ar_logits: Float[Tensor, "j v"]
    lengths: Float[Tensor, "d l"] | None = None
    loss: Loss | None = None


class Denoiser(nn.Module):
    """Any stock `transformers` language model, made to answer one question: what belongs at each position?

    The shift of left-to-right networks, the ban on the mask token, the attention pattern and the networks' own ways
    of taking a mask live here and nowhere else. Only asked positions are projected to the vocabulary.
    """

    def __init__(self, network: PreTrainedModel, config: DiffusionConfig) -> None:
        super().__init__()
        kernel = network.config._attn_implementation
        if kernel not in ("sdpa", "eager", "flex_attention"):
            raise ValueError(
                f"attention kernel {kernel!r} would ignore the attention mask; load with sdpa, eager or flex_attention"
            )
        self.network, self.diffusion_config = network, config
        accepts = inspect.signature(network.forward).parameters
        if "position_ids" not in accepts:
            raise ValueError(
                f"{type(network).__name__} takes no position_ids, so documents and blocks could not be placed; "
                "give a network of another family"
            )
        self._settings: dict[str, Any] = {"use_cache": False} if "use_cache" in accepts else {}
        self.supports_kv_cache = "past_key_values" in accepts  # whether keys and values can be kept between passes
        self.vocabulary: int = network.config.get_text_config().vocab_size
        self._offset = _position_offset(network)
        self._windows = _windows(network)
        self._says: Any = None  # the class of what the body says
        self._head_learns: tuple[list[int], tuple[Tensor, ...]] = ([], ())
        self.length_head: LengthHead | None = None
        if config.longest_answer is not None:
            self.add_length_head(config.longest_answer)

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def config(self) -> Any:
        """The network's own configuration; `transformers.Trainer` asks for it."""
        return self.network.config

    @property
    def context(self) -> int | None:
        """How many tokens fit, as far as the network says."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else limit - self._offset

    @property
    def infiller(self) -> "Denoiser":
        """This network under the card by which it fills holes."""
        other = copy(self)
        other.diffusion_config = self.diffusion_config.infiller
        return other

    def predictable(self, clean: Canvas) -> Canvas:
        """The canvas with only those positions editable that have an answer: under shift, not a document's first."""
        return replace(clean, editable=clean.editable & (clean.position_ids >= self.diffusion_config.shift))

    def forward(
        self,
        canvas: Canvas,
        clean: Int[Tensor, "texts n"] | None = None,
        *,
        positions: Bool[Tensor, "b n"] | None = None,
        ar_positions: Bool[Tensor, "b n"] | None = None,
        attention: AttentionPattern | None = None,
        lengths: bool = False,
        loss: Callable[[LazyLogits, LazyLogits], Loss] | None = None,
    ) -> Prediction:
        """Answers for all positions, or for those in `positions`, and for the clean text's in `ar_positions`.

        `clean` is the finished text while training (once for several canvases of it, which stand below each other).
        `attention` stands in for the card's pattern (annealing).
        `lengths` asks the length head too, which sees nothing but the prompts. `loss` is given both kinds of answers
        before they are projected to the vocabulary, and is kept in their place.
        """
        pattern = self.diffusion_config.attention if attention is None else attention
        if positions is not None and clean is None and isinstance(pattern, BlockCausal):
            canvas, positions = _crop(canvas, positions, pattern.size)
        inputs = pattern(canvas, clean, shift=self.diffusion_config.shift)
        if positions is not None and clean is not None and isinstance(pattern, BlockCausal):
            views = len(positions) // len(clean)
            inputs = inputs.keep_only(pattern.read(canvas, positions, views=views, shift=self.diffusion_config.shift))
        index = inputs.flat_index(inputs.output_index, torch.ones_like(canvas.open) if positions is None else positions)
        ar_index = index[:0] if ar_positions is None else inputs.flat_index(inputs.ar_output_index, ar_positions)
        hidden, parts = self.hidden_states(inputs, torch.cat([index, ar_index])), [len(index), len(ar_index)]
        told = self.lengths(canvas) if lengths else None
        if loss is not None:
            nothing = hidden.new_empty(0, self.vocabulary)
            learns = self.head_parameters(hidden)
            return Prediction(nothing, nothing, told, loss(*(self.lazy_logits(h, learns) for h in hidden.split(parts))))
        about, ar_logits = self._head(hidden).split(parts)
        return Prediction(about.unflatten(0, canvas.tokens.shape) if positions is None else about, ar_logits, told)

    def lengths(self, canvas: Canvas) -> Float[Tensor, "d l"]:
        """The length head's logits: index i is an answer of i + 1 tokens, its end token included."""
        assert self.length_head is not None, "asked for lengths without a length head"
        given = prompts(canvas)
        inputs = self.diffusion_config.attention(given, shift=self.diffusion_config.shift)
        return self.length_head(self._body(inputs).last_hidden_state, given)

    def project(
        self, inputs: AttentionInputs, index: Int[Tensor, " k"], *, past: Cache | None = None
    ) -> Float[Tensor, "k v"]:
        """Run the network on a scene and give the logits of the wanted outputs (indices into b * m).

        A part of a scene looks at keys and values in `past`, which takes in its own.
        """
        return self._head(self.hidden_states(inputs, index, past=past))

    def predict(self, canvas: Canvas, *, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        """What calling gives, but projected to the vocabulary only when it is looked at; not for training."""
        if self.diffusion_config.block_size is not None:
            canvas, positions = _crop(canvas, positions, self.diffusion_config.block_size)
        inputs = self.diffusion_config.attention(canvas, shift=self.diffusion_config.shift)
        return self.lazy_logits(self.hidden_states(inputs, inputs.flat_index(inputs.output_index, positions)))

    def hidden_states(
        self, inputs: AttentionInputs, index: Int[Tensor, " k"], *, past: Cache | None = None
    ) -> Float[Tensor, "k d"]:
        """What the network's body makes of a scene, at the wanted outputs (see `project`)."""
        said = self._body(inputs, past)
        self._says = type(said)
        return said.last_hidden_state.flatten(0, 1)[index]

    def lazy_logits(self, hidden: Float[Tensor, "k d"], learns: tuple[Tensor, ...] = ()) -> LazyLogits:
        """Hidden states, to be projected by the network's head; its weights `learns` are taught with them."""
        return LazyLogits(hidden, lambda part, index: self._head(part), learns)

    def head_parameters(self, hidden: Float[Tensor, "k d"]) -> tuple[Tensor, ...]:
        """The weights that the head learns, found by experiment: tied ones may stand anywhere in the network."""
        if not hidden.requires_grad:
            return ()
        learning = [weight for weight in self.network.parameters() if weight.requires_grad]
        numbers = [id(weight) for weight in learning]
        if self._head_learns[0] != numbers:
            one = self._head(hidden[:1].detach())
            found = torch.autograd.grad(one.sum(), learning, allow_unused=True) if one.requires_grad else ()
            used = tuple(weight for weight, grad in zip(learning, found, strict=False) if grad is not None)
            self._head_learns = numbers, used
        return self._head_learns[1]

    def _head(self, hidden: Float[Tensor, "k d"]) -> Float[Tensor, "k v"]:
        """Logits of hidden states, by the network's own forward with its body standing aside."""
        prefix, body = self.network.base_model_prefix, self.network.base_model
        setattr(self.network, prefix, _Said(self._says(last_hidden_state=hidden[None])))
        try:
            logits = self.network(input_ids=torch.zeros_like(hidden[None, :, 0], dtype=torch.long)).logits[0]
        finally:
            setattr(self.network, prefix, body)
        logits.detach()[:, self.diffusion_config.mask_token_id] = -torch.inf  # what cannot be has no gradient either
        return logits

    def _body(self, inputs: AttentionInputs, past: Cache | None = None) -> Any:
        """What the network without its head makes of a scene."""
        settings = self._settings if past is None else {"past_key_values": past, "use_cache": True}
        reach = (inputs.position_ids if inputs.key_position_ids is None else inputs.key_position_ids).shape[1]
        windows = {kind: w if w and w < reach else None for kind, w in self._windows.items()}
        limited = any(windows.values())
        with _unmasked(self.network) if inputs.unmasked and not limited else nullcontext(inputs) as shown:
            return self.network.base_model(
                input_ids=inputs.tokens,
                position_ids=inputs.position_ids + self._offset,
                attention_mask=None if shown is None else self._mask(shown, windows if limited else {}),
                **settings,
            )

    def _mask(self, inputs: AttentionInputs, windows: dict[str, int | None]) -> Any:
        """A scene's mask as the attention kernel takes it, or one for each kind of layer where some see a window."""
        flex = self.network.config._attn_implementation == "flex_attention"
        make = inputs.block_mask if flex else partial(inputs.bias, self.network.dtype)
        masks = {kind: make(window) for kind, window in windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values())) if masks else make()

    def add_length_head(self, longest: int) -> None:
        """From now on the model also learns to tell an answer's length, up to `longest` tokens."""
        self.diffusion_config = replace(self.diffusion_config, longest_answer=longest)
        self.length_head = LengthHead(self.config.get_text_config().hidden_size, longest).to(self.device)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self.network.activation_checkpointing_enable(**kwargs)


def _crop(canvas: Canvas, positions: Bool[Tensor, "b n"], size: int) -> tuple[Canvas, Bool[Tensor, "b m"]]:
    """The canvas up to the end of the last asked block: what comes later is not seen."""
    at = torch.arange(positions.shape[1], device=positions.device)
    ends = torch.where(positions, at - canvas.position_ids % size + size, 0)
    end = min(int(ends.max()), positions.shape[1])
    return canvas[:, :end], positions[:, :end]


class _Said(nn.Module):
    """Stands in for a network's body, and says again what that has said."""

    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.said


@contextmanager
def _unmasked(network: PreTrainedModel) -> Iterator[None]:
    """Here the network sees everything without any mask, on the attention kernel's fast path."""
    config: Any = network.config
    causal: list[Any] = [part for part in (config, *network.modules()) if getattr(part, "is_causal", None) is True]
    silent = not hasattr(config, "is_causal")
    for part in causal:
        part.is_causal = False
    if silent:
        config.is_causal = False
    try:
        yield
    finally:
        for part in causal:
            part.is_causal = True
        if silent:
            del config.is_causal


def _position_offset(network: PreTrainedModel) -> int:
    """Where the network's own position ids start: RoBERTa's first is one past the padding id."""
    embeddings: Any = getattr(network.base_model, "embeddings", None)
    counts_from_padding = hasattr(embeddings, "create_position_ids_from_input_ids")
    return embeddings.padding_idx + 1 if counts_from_padding else 0


def _windows(network: PreTrainedModel) -> dict[str, int | None]:
    """How far each kind of layer sees (None: no limit); empty when no layer is limited."""
    config = network.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return {}
    reach = window + 1 if type(network).__name__.endswith("MaskedLM") else window  # masked networks count inclusively
    if kinds is None:
        return {"sliding_attention": reach}
    return {kind: reach if kind == "sliding_attention" else None for kind in kinds}
