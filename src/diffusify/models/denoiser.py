"""A pretrained network wrapped so that `Denoiser(canvas).logits[b, i]` always predicts the token at position i.

Axes: b rows, n canvas positions, k requested positions, j positions of the AR co-loss, d hidden size, v vocabulary,
t texts with editable positions, l possible lengths.
"""

import inspect
from collections.abc import Callable, Collection
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.attention import AttentionPattern, BlockCausal, training_inputs
from diffusify.diffusion.attention_inputs import AttentionInputs
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.objectives import Loss
from diffusify.models import grouped_attention
from diffusify.models.attention_masks import position_offset, sliding_windows, without_mask
from diffusify.models.draft_head import DraftHead
from diffusify.models.length_head import LengthHead, prompt_canvas
from diffusify.models.mask_adapters import find_mask_rows
from diffusify.models.output_head import logits_without_body
from diffusify.models.stock_attention import IGNORES_IS_CAUSAL


@dataclass(frozen=True)
class Prediction:
    """The output of `Denoiser.forward`.

    `logits` has shape `[b, n, v]` for all canvas positions, or `[k, v]` for the requested ones, row by row; the mask
    token's is always -inf. `ar_logits` are the next-token logits of the clean text. `length_logits` are the length
    head's, one row for each text with editable positions, if requested. With a `loss`, both other logits are empty.
    `layers` are the outputs of all layers, if requested.
    """

    logits: Float[Tensor, "*positions v"]
    ar_logits: Float[Tensor, "j v"]
    length_logits: Float[Tensor, "t l"] | None = None
    loss: Loss | None = None
    layers: tuple[Float[Tensor, "b m d"], ...] = ()


class Denoiser(nn.Module):
    """A stock `transformers` language model that predicts the token at each canvas position.

    The shift of autoregressive networks, the ban on the mask token, the attention pattern and each family's mask format
    are handled here and nowhere else. Only requested positions are projected to the vocabulary. ValueError if the
    network's attention kernel ignores masks, or if the network takes no position_ids.
    """

    def __init__(self, network: PreTrainedModel, config: DiffusionConfig) -> None:
        super().__init__()
        kernel = network.config._attn_implementation
        if kernel not in ("sdpa", "eager", "flex_attention", grouped_attention.NAME):
            raise ValueError(
                f"attention kernel {kernel!r} would ignore the attention mask; load with sdpa, eager or flex_attention"
            )
        self.network, self.diffusion_config = network, config
        accepts = inspect.signature(network.forward).parameters
        if "position_ids" not in accepts:
            raise ValueError(
                f"{type(network).__name__} takes no position_ids, which packed documents and blocks need; "
                "use a network of another family"
            )
        self._forward_kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in accepts else {}
        self.supports_kv_cache = "past_key_values" in accepts
        self.vocab_size: int = network.config.get_text_config().vocab_size
        self._position_offset = position_offset(network)
        self._sliding_windows = sliding_windows(network)
        self._mask_rows = find_mask_rows(network)
        self._output_class: Any = None  # of the body's output, set by its first forward pass
        # The ids of all trainable weights when the head's were last looked up, and the head's.
        self._head_parameters: tuple[list[int], tuple[Tensor, ...]] = ([], ())
        self.unused_token_ids: Tensor | None
        self.register_buffer("unused_token_ids", None, persistent=False)
        self.resizes_spans = False  # whether the length tokens are predicted in inference
        self.length_head: LengthHead | None = None
        if config.longest_answer is not None:
            self.add_length_head(config.longest_answer)
        self.draft_head: DraftHead | None = None
        if config.draft_head is not None:
            self.draft_head = DraftHead(self.config.get_text_config().hidden_size, config.draft_head).to(self.device)

    @property
    def device(self) -> torch.device:
        """The device of inputs and outputs: the network's, or that of its first layer if it lies on several."""
        return self.network.device

    @property
    def config(self) -> Any:
        """The network's own configuration, which `transformers.Trainer` reads."""
        return self.network.config

    @property
    def context_length(self) -> int | None:
        """The largest number of tokens per row; None if the network's config gives no limit."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else limit - self._position_offset

    @property
    def infiller(self) -> "Denoiser":
        """The same network under the diffusion config that it infills with; the weights are shared."""
        other = copy(self)
        other.diffusion_config = self.diffusion_config.infiller
        return other

    @property
    def resizing(self) -> "Denoiser":
        """The same network, which also predicts the length tokens (see `project`); the weights are shared."""
        other = copy(self)
        other.resizes_spans = True
        return other

    def texts_per_pass(self, texts: int) -> int:
        """The number of texts that share a forward pass with a call for `texts` of them: these alone."""
        return texts

    def limit_vocabulary(self, token_ids: Collection[int]) -> None:
        """Predict these ids only. Many networks have more embeddings than their tokenizer has tokens."""
        known = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
        known[[i for i in token_ids if i < self.vocab_size]] = True
        self.unused_token_ids = None if known.all() else (~known).nonzero()[:, 0]

    def predictable(self, clean: Canvas) -> Canvas:
        """The canvas without those editable positions that have no prediction: under shift, each document's first."""
        return replace(clean, editable=clean.editable & (clean.position_ids >= self.diffusion_config.shift))

    def forward(
        self,
        canvas: Canvas,
        clean: Int[Tensor, "texts n"] | None = None,
        *,
        positions: Bool[Tensor, "b n"] | None = None,
        ar_positions: Bool[Tensor, "b n"] | None = None,
        attention: AttentionPattern | None = None,
        return_lengths: bool = False,
        return_layers: bool = False,
        group: int = 1,
        loss: Callable[[LazyLogits, LazyLogits], Loss] | None = None,
    ) -> Prediction:
        """Predict the tokens at all positions, or at `positions` alone, and the clean text's at `ar_positions`.

        `clean` is the finished text, given in training only; several canvases of one text are consecutive rows that
        share it. `attention` replaces the diffusion config's pattern (annealing). `return_lengths` also runs the length
        head, which reads the prompts alone; `return_layers` returns the layers' outputs. In training with blocks, what
        every `group` texts begin with is computed once. `loss` receives the logits and the AR logits before they are
        projected to the vocabulary, and its result is returned in their place. The logits of a model with a draft head
        then also have those of any candidates `after_previous` tokens, which are those of the clean text.
        """
        pattern = self.diffusion_config.attention if attention is None else attention
        if positions is not None and clean is None and isinstance(pattern, BlockCausal):
            canvas, positions = pattern.crop(canvas, positions)
        shift = self.diffusion_config.shift
        inputs = training_inputs(pattern, canvas, clean, positions, shift=shift, group=group)
        index = inputs.flat_index(inputs.output_index, torch.ones_like(canvas.open) if positions is None else positions)
        ar_index = index[:0] if ar_positions is None else inputs.flat_index(inputs.ar_output_index, ar_positions)
        index, sizes = torch.cat([index, ar_index]), [len(index), len(ar_index)]
        layers, hidden = self.layer_states(inputs, index) if return_layers else ((), self.hidden_states(inputs, index))
        length_logits = self.length_logits(canvas) if return_lengths else None
        if loss is not None:
            empty = hidden.new_empty(0, self.vocab_size)
            weights = self.head_parameters(hidden)
            logits, ar_logits = (self.lazy_logits(chunk, weights) for chunk in hidden.split(sizes))
            if self.draft_head is not None and clean is not None and positions is not None:
                previous = clean.repeat_interleave(len(positions) // len(clean), 0).roll(1, 1)[positions]
                logits.after_previous = partial(self.draft_logits, hidden[: sizes[0]], previous[:, None])
            value = loss(logits, ar_logits)
            return Prediction(empty, empty, length_logits, value, layers)
        logits, ar_logits = self.project(hidden).split(sizes)
        logits = logits.unflatten(0, canvas.tokens.shape) if positions is None else logits
        return Prediction(logits, ar_logits, length_logits, layers=layers)

    def length_logits(self, canvas: Canvas) -> Float[Tensor, "t l"]:
        """The length head's logits; index i stands for an answer of i + 1 tokens, its end token included."""
        assert self.length_head is not None, "lengths were requested without a length head"
        prompts = prompt_canvas(canvas)
        inputs = self.diffusion_config.attention(prompts, shift=self.diffusion_config.shift)
        return self.length_head(self._run_body(inputs).last_hidden_state.to(self.device), prompts)

    def predict(self, canvas: Canvas, *, positions: Bool[Tensor, "b n"]) -> LazyLogits:
        """The logits of `forward` at `positions`, projected to the vocabulary only when read; not for training.

        Rows without any of these positions are not run.
        """
        pattern, needed = self.diffusion_config.attention, positions.any(1).nonzero()[:, 0]
        if 0 < len(needed) < len(positions):
            canvas, positions = canvas[needed], positions[needed]
        if isinstance(pattern, BlockCausal):
            canvas, positions = pattern.crop(canvas, positions)
        inputs = pattern(canvas, shift=self.diffusion_config.shift)
        return self.lazy_logits(self.hidden_states(inputs, inputs.flat_index(inputs.output_index, positions)))

    def hidden_states(
        self, inputs: AttentionInputs, index: Int[Tensor, " k"], *, past: Cache | None = None
    ) -> Float[Tensor, "k d"]:
        """The body's hidden states at `index`, which counts through all outputs of the batch.

        With `past`, the inputs are a chunk that attends to the whole cache after its own keys and values are added.
        """
        if self._mask_rows is not None and torch.is_grad_enabled() and inputs.clean_start and self._can_split:
            hidden = self._run_beside_frozen_text(inputs, inputs.clean_start)
        else:
            output = self._run_body(inputs, past)
            self._output_class, hidden = type(output), output.last_hidden_state
        hidden = hidden.flatten(0, 1)
        return hidden[index.to(hidden.device)].to(self.device)  # the last layer may lie on another device

    def layer_states(
        self, inputs: AttentionInputs, index: Int[Tensor, " k"]
    ) -> tuple[tuple[Float[Tensor, "b m d"], ...], Float[Tensor, "k d"]]:
        """The outputs of all layers, and the body's hidden states at `index` (see `hidden_states`)."""
        output = self._run_body(inputs, output_hidden_states=True)
        self._output_class = type(output)
        hidden = output.last_hidden_state.flatten(0, 1)[index.to(output.last_hidden_state.device)]
        return tuple(layer.to(self.device) for layer in output.hidden_states[1:]), hidden.to(self.device)

    def draft_logits(
        self, hidden: Float[Tensor, "b d"], previous: Int[Tensor, "b q"], candidates: Int[Tensor, "b c"]
    ) -> Float[Tensor, "b q c"]:
        """The logits of each mask's candidates after each of the tokens that may come before, by the draft head."""
        assert self.draft_head is not None, "the model has no draft head"
        hidden = self.draft_head(hidden[:, None].expand(-1, previous.shape[1], -1), self.embed(previous))
        return self.draft_head.logits_of(hidden, candidates, self.embed, self.project)

    def embed(self, tokens: Int[Tensor, "*k"]) -> Float[Tensor, "*k d"]:
        """The embeddings of tokens, as they are stored."""
        embedding: Any = self.network.get_input_embeddings()
        return nn.functional.embedding(tokens, embedding.weight).to(self.device)

    def lazy_logits(self, hidden: Float[Tensor, "k d"], weights: tuple[Tensor, ...] = ()) -> LazyLogits:
        """Logits that `project` computes from hidden states when they are read; `weights` get gradients, too."""
        return LazyLogits(hidden, lambda chunk, index: self.project(chunk), weights)

    def head_parameters(self, hidden: Float[Tensor, "k d"]) -> tuple[Tensor, ...]:
        """The trainable weights that the head uses, empty if `hidden` needs no gradient.

        They are found by a backward pass through the head, because tied weights may belong to any module.
        """
        if not hidden.requires_grad:
            return ()
        trainable = [weight for weight in self.network.parameters() if weight.requires_grad]
        ids = [id(weight) for weight in trainable]
        if self._head_parameters[0] != ids:
            logits = self.project(hidden[:1].detach())
            grads = torch.autograd.grad(logits.sum(), trainable, allow_unused=True) if logits.requires_grad else ()
            used = tuple(weight for weight, grad in zip(trainable, grads, strict=False) if grad is not None)
            self._head_parameters = ids, used
        return self._head_parameters[1]

    def project(self, hidden: Float[Tensor, "k d"]) -> Float[Tensor, "k v"]:
        """The logits of hidden states, by the network's own forward pass with its body replaced.

        So soft caps, scales and heads of several layers are the network's own. The logits of the mask token and of ids
        without a token are -inf, and in inference those of the length tokens, unless spans are to be resized.
        """
        logits = logits_without_body(self.network, self._output_class(last_hidden_state=hidden[None]))
        logits.detach()[:, self.diffusion_config.mask_token_id] = -torch.inf  # outside autograd, so its gradient is 0
        if self.unused_token_ids is not None:
            logits.detach().index_fill_(1, self.unused_token_ids, -torch.inf)
        return self._without_length_tokens(logits)

    def _without_length_tokens(self, logits: Float[Tensor, "k v"]) -> Float[Tensor, "k v"]:
        tokens = self.diffusion_config.length_tokens
        if tokens is not None and not (self.training or self.resizes_spans):
            logits.detach()[:, tokens.ids] = -torch.inf
        return logits

    @property
    def _can_split(self) -> bool:
        """Whether the network can run a chunk over the keys of another, for a backward pass."""
        return self.supports_kv_cache and not self.network.is_activation_checkpointing

    def _run_beside_frozen_text(self, inputs: AttentionInputs, clean_start: int) -> Float[Tensor, "b m d"]:
        """The body's hidden states in two passes: the clean text without gradients, then the canvases over its keys.

        Adapters that act on masks only leave the text as the base computes it, so it needs no gradients.
        """
        text, canvases = inputs.split(clean_start)
        past = DynamicCache()
        with torch.no_grad():
            text_hidden = self._run_body(text, past).last_hidden_state
        output = self._run_body(canvases, past)
        self._output_class = type(output)
        return torch.cat([output.last_hidden_state, text_hidden], 1)

    def _run_body(self, inputs: AttentionInputs, past: Cache | None = None, **more: Any) -> Any:
        """The output of the network without its head; `more` are arguments of the network."""
        kwargs = more | (self._forward_kwargs if past is None else {"past_key_values": past, "use_cache": True})
        width = (inputs.position_ids if inputs.key_position_ids is None else inputs.key_position_ids).shape[1]
        windows = {kind: w if w and w < width else None for kind, w in self._sliding_windows.items()}
        limited = any(windows.values())
        if self._mask_rows is not None:
            self._mask_rows.is_mask = inputs.is_mask
        reruns = torch.is_grad_enabled() and self.network.is_activation_checkpointing  # layers, after `without_mask`
        needs_mask = limited or not inputs.unmasked or (reruns and type(self.network).__name__ in IGNORES_IS_CAUSAL)
        with nullcontext(inputs) if needs_mask else without_mask(self.network) as masked:
            output = self.network.base_model(
                input_ids=inputs.tokens,
                position_ids=inputs.position_ids + self._position_offset,
                attention_mask=None if masked is None else self._mask(masked, windows if limited else {}),
                **kwargs,
            )
        if self._mask_rows is not None and not torch.is_grad_enabled():  # a backward pass may run layers again
            self._mask_rows.is_mask = None
        return output

    def _mask(self, inputs: AttentionInputs, windows: dict[str, int | None]) -> Any:
        """The mask in the attention kernel's format, or a dict of masks by layer type if some layers have a window."""
        flex = self.network.config._attn_implementation == "flex_attention"
        make = inputs.block_mask if flex else partial(inputs.bias, self.network.dtype)
        masks = {kind: make(window) for kind, window in windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values())) if masks else make()

    def add_length_head(self, max_length: int) -> None:
        """Add a length head for answers of up to `max_length` tokens, or let the present one grow."""
        hidden_size = self.config.get_text_config().hidden_size
        self.length_head = LengthHead(hidden_size, max_length, self.length_head).to(self.device)
        self.diffusion_config = replace(self.diffusion_config, longest_answer=self.length_head.max_length)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        self.network.activation_checkpointing_enable(**kwargs)
