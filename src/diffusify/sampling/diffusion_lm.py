"""The main class of the library, a diffusion language model that takes and returns strings."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, overload

import torch

from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.constraints import Automaton
from diffusify.diffusion.length_tokens import LengthTokens
from diffusify.models.accelerator import choose_device, choose_dtype
from diffusify.models.denoiser import Denoiser
from diffusify.models.fast_inference import optimize_for_inference
from diffusify.models.loading import diffusion_folder, load_base
from diffusify.models.make_denoiser import make_denoiser
from diffusify.models.recipes import as_is
from diffusify.models.saving import load_denoiser
from diffusify.sampling.generation import Generation, GenerationRun
from diffusify.sampling.row_text import Answer, Continuation, Infilling
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.chat_template import ChatTemplate
from diffusify.text.grammar import compile_regex
from diffusify.text.prompts import (
    InfillText,
    continuation_canvas,
    count_length_candidates,
    decode_canvas,
    infill_canvas,
    open_ended_canvas,
    resizable_canvas,
)
from diffusify.text.tokenizer import TextTokenizer

Message = dict[str, Any]  # {"role": "user", "content": "..."}
Settings = SamplingConfig | Sequence[SamplingConfig]


class DiffusionLM:
    """A diffusion language model: a denoiser and its tokenizer.

    Keyword arguments `**sampling` of its methods are fields of `SamplingConfig`.
    """

    def __init__(self, denoiser: Denoiser, tokenizer: TextTokenizer) -> None:
        self.denoiser, self.tokenizer = denoiser, tokenizer
        denoiser.limit_vocabulary(tokenizer.token_ids)
        self.compile_regex = lru_cache(16)(partial(compile_regex, tokenizer))

    @classmethod
    def from_pretrained(
        cls, model: Path | str, *, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto"
    ) -> "DiffusionLM":
        """Load a diffusion model, or a base as it is.

        A diffusion model is a folder written by `diffusify adapt` or `tune`, the name of a bundled model, or OWNER/NAME
        on the Hugging Face Hub, which is downloaded unless it is cached. A base is whatever `adapt` takes: an AR model
        continues prompts one token per forward pass, and a masked LM also fills masked spans. By default the model is
        on the accelerator (CUDA, XPU or MPS) in bfloat16 if there is one, else on the CPU in float32. Raises ValueError
        if there is no such model, if it is incomplete, or if there is no such device.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        if folder := diffusion_folder(model):
            denoiser, own_tokenizer = load_denoiser(folder, dtype=dtype, device=device)
            config = denoiser.diffusion_config
            tokenizer = TextTokenizer(own_tokenizer, config.mask_token_id, config.frame)
        else:
            base = load_base(str(model), dtype=dtype, device=device)
            denoiser, tokenizer = make_denoiser(base, as_is(masked=base.masked))
        optimize_for_inference(denoiser.eval().requires_grad_(False).network)
        return cls(denoiser, tokenizer)

    @property
    def config(self) -> DiffusionConfig:
        """The model's diffusion config (`diffusion_config.json`)."""
        return self.denoiser.diffusion_config

    @overload
    def generate(self, prompt: str = "", max_new_tokens: int | None = None, **sampling: Any) -> Generation: ...
    @overload
    def generate(
        self, prompt: list[str], max_new_tokens: int | list[int] | None = None, **sampling: Any
    ) -> list[Generation]: ...
    def generate(
        self, prompt: str | list[str] = "", max_new_tokens: int | list[int] | None = None, **sampling: Any
    ) -> Generation | list[Generation]:
        """Continue a prompt or a batch of prompts. Without a prompt, generation is unconditional.

        `max_new_tokens` is one number, or one per prompt. It defaults to the prediction of the length head if the model
        has one, else to 64.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        results = self.prepare_generation(prompts, max_new_tokens, SamplingConfig(**sampling)).results()
        return results[0] if isinstance(prompt, str) else results

    @overload
    def infill(self, text: str, **sampling: Any) -> Generation: ...
    @overload
    def infill(self, text: list[str], **sampling: Any) -> list[Generation]: ...
    def infill(self, text: str | list[str], **sampling: Any) -> Generation | list[Generation]:
        """Fill the masked spans of a text or a batch of texts.

        `[[8]]` is a span of eight tokens, `[[3-12]]` one of three to twelve, and `[[...]]` one of unknown length. A
        block model writes such spans until they are complete, and a model trained with `variable_length` lengthens and
        shortens them while it fills them; others fill several lengths and keep the most confident text. Raises
        ValueError if the model cannot attend to the text after a span.
        """
        texts = [text] if isinstance(text, str) else text
        results = self.prepare_infilling(texts, SamplingConfig(**sampling)).results()
        return results[0] if isinstance(text, str) else results

    def chat(self, messages: list[Message], max_new_tokens: int | None = None, **sampling: Any) -> Generation:
        """Generate the assistant's next message, returned as both `text` and `completion`.

        `max_new_tokens` defaults to the prediction of the length head if the model has one, else to 64 for a
        bidirectional model and 256 for others, as far as the context has room.
        """
        return self.prepare_chat([messages], max_new_tokens, SamplingConfig(**sampling)).results()[0]

    def stream(self, prompt: str = "", max_new_tokens: int | None = None, **sampling: Any) -> Iterator[Canvas]:
        """Yield the canvas after every step; `model.read(canvas)` returns its text."""
        for frame in self.prepare_generation([prompt], max_new_tokens, SamplingConfig(**sampling)):
            yield frame.canvas

    def with_defaults(self, settings: SamplingConfig, *, infilling: bool = False) -> SamplingConfig:
        """The settings with this model's defaults for continuations, or infilling (`SamplingConfig.for_model`)."""
        config = self.config.infiller if infilling else self.config
        return settings.for_model(config) if self.denoiser.supports_kv_cache else settings

    def read(self, canvas: Canvas) -> str:
        """The text of the first row of a canvas, with `_` for each open position."""
        return decode_canvas(self.tokenizer, canvas)[0]

    def prepare_generation(
        self, prompts: Sequence[str | list[int]], max_new_tokens: int | list[int] | None, settings: Settings
    ) -> GenerationRun:
        """Prepare the continuation of prompts (texts or token ids), with settings for all of them or one per prompt.

        The result is an iterator over the steps, whose `results()` runs them and returns the generated texts.
        """
        text = Continuation(self.tokenizer)
        ends = self.tokenizer.end_token_ids
        return self._prepare(prompts, max_new_tokens, settings, ends, text, default_length=64)

    def prepare_chat(
        self, chats: Sequence[list[Any]], max_new_tokens: int | list[int] | None, settings: Settings
    ) -> GenerationRun:
        """Prepare the assistant's next message of each chat (see `prepare_generation`).

        A chat is a list of messages, or of the token ids of `ChatTemplate.prompt`.
        """
        template = self.chat_template
        prompts = [chat if chat and isinstance(chat[0], int) else template.prompt(chat) for chat in chats]
        default = 64 if self.config.sees_right_context else 256  # an answer that is written in order ends by itself
        ends = template.end_token_ids
        return self._prepare(prompts, max_new_tokens, settings, ends, Answer(template), default_length=default)

    def prepare_infilling(self, texts: Sequence[InfillText], settings: Settings) -> GenerationRun:
        """Prepare the infilling of texts (see `infill` and `prepare_generation`)."""
        if not self.config.sees_right_context:
            raise ValueError(
                f"this model ({self.config.recipe} recipe, {self.config.attention}) cannot infill, because it does not "
                "attend to the text after a masked span; adapt the base model with `--recipe ar`, with "
                "`-o infilling=0.5`, or, for a masked language model, with `--recipe mlm`"
            )
        denoiser = self.denoiser.infiller
        per_text = [self.with_defaults(each, infilling=True) for each in _one_per_text(settings, len(texts))]
        if stops := next((each.stop for each in per_text if each.stop), ()):
            raise ValueError(f"stop={stops[0]!r} ends a continuation, but a masked span has a length; leave out stop")
        _check_batch(per_text, denoiser.diffusion_config)
        rerank = per_text[0].rerank if per_text else None
        if rerank and not self.config.keeps_ar_model:
            raise ValueError(
                f"rerank={rerank} needs a model that keeps its AR half, such as block(4, infilling=0.25); leave it out"
            )
        (candidates, tokens), context, lengths = self.count_infillings(texts, per_text), denoiser.context_length, None
        banned = {self.tokenizer.start_token_id, *self.tokenizer.end_token_ids}
        if tokens == "end":
            canvas, lengths = open_ended_canvas(
                self.tokenizer,
                texts,
                [each.temperature > 0 and not rerank for each in per_text],
                context=context,
                candidates=candidates,
            )
            banned -= {lengths.end_token_id}
            if any(lengths.end_token_id in each.suppress_tokens for each in per_text):
                raise ValueError(
                    f"suppress_tokens has {lengths.end_token_id}, which ends masked spans of unknown length; leave it "
                    "out, or give the spans a length"
                )
        elif tokens is not None:
            canvas, lengths = resizable_canvas(self.tokenizer, texts, tokens, context=context, candidates=candidates)
        else:
            canvas = infill_canvas(self.tokenizer, texts, context=context, candidates=candidates)
        return GenerationRun(
            denoiser,
            canvas,
            per_text,
            Infilling(self.tokenizer),
            banned=tuple(sorted(banned)),
            num_candidates=candidates,
            lengths=lengths,
            automata=self._automata(per_text),
        )

    def count_infillings(
        self, texts: Sequence[InfillText], settings: Sequence[SamplingConfig]
    ) -> tuple[int, LengthTokens | Literal["end"] | None]:
        """How many rows fill each text, and how the model finds the lengths of its spans itself, if it does.

        It has length tokens, or writes an "end" token where a span is complete.
        """
        rerank, num_lengths = settings[0].rerank if settings else None, count_length_candidates(texts)
        # A constraint and an observer are about fixed positions.
        is_fixed = num_lengths == 1 or any(each.regex is not None or each.observer is not None for each in settings)
        ends = bool(settings) and self.with_defaults(settings[0], infilling=True).tolerance is not None
        tokens = None if is_fixed else "end" if ends else self.config.length_tokens
        return rerank or (num_lengths if tokens is None else 1), tokens

    def _automata(self, settings: list[SamplingConfig]) -> dict[str, Automaton]:
        return {each.regex: self.compile_regex(each.regex) for each in settings if each.regex is not None}

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer)

    def _prepare(
        self,
        prompts: Sequence[str | list[int]],
        max_new_tokens: int | list[int] | None,
        settings: Settings,
        end_token_id: int | tuple[int, ...],
        text: Continuation | Answer,
        *,
        default_length: int,
    ) -> GenerationRun:
        per_text, beam = [self.with_defaults(each) for each in _one_per_text(settings, len(prompts))], 1
        _check_batch(per_text, self.config)
        if per_text and per_text[0].rerank:
            raise ValueError(f"rerank={per_text[0].rerank} is for masked spans, not for continuations; leave it out")
        if max_new_tokens is None:
            if (head := self.denoiser.length_head) is not None:
                beam = min(per_text[0].length_beam, head.max_length)
            max_new_tokens = self._default_lengths(prompts, default_length, beam)
            prompts = [prompt for prompt in prompts for _ in range(beam)]
        canvas = continuation_canvas(self.tokenizer, prompts, max_new_tokens, context=self.denoiser.context_length)
        return GenerationRun(
            self.denoiser,
            canvas,
            per_text,
            text,
            end_token_id=end_token_id,
            num_candidates=beam,
            automata=self._automata(per_text),
        )

    @torch.inference_mode()
    def _default_lengths(self, prompts: Sequence[str | list[int]], length: int, beam: int) -> list[int]:
        """The `beam` most likely lengths of each prompt's answer, or `length` for each without a length head.

        They are at most what fits into the context.
        """
        context = self.denoiser.context_length
        canvas = continuation_canvas(self.tokenizer, prompts, 1, context=context)
        lengths = torch.full((len(prompts), 1), length)
        if self.denoiser.length_head is not None:
            lengths = self.denoiser.length_logits(canvas.to(self.denoiser.device)).topk(beam).indices.cpu() + 1
        if context is not None:
            lengths = torch.minimum(lengths, context - (canvas.real & ~canvas.editable).sum(1, keepdim=True))
        return lengths.flatten().tolist()


def _one_per_text(settings: Settings, count: int) -> list[SamplingConfig]:
    """One entry of settings per text; shared settings give text i the seed `seed + i`."""
    if isinstance(settings, SamplingConfig):
        return [replace(settings, seed=settings.seed + i) for i in range(count)]
    if len(settings) != count:
        raise ValueError(f"{len(settings)} settings for {count} texts; give one for all texts, or one per text")
    return list(settings)


def _check_batch(settings: list[SamplingConfig], config: DiffusionConfig) -> None:
    """Raise ValueError if settings differ that a whole batch has to share, because they change the forward pass."""
    shared = ["cache", "guidance", "tolerance", "length_beam", "rerank"]
    for name in shared:
        if len({getattr(each, name) for each in settings}) > 1:
            raise ValueError(f"{name} must be the same for all texts of a batch; generate them in separate calls")
    if len({getattr(each.sampler(config.policy).policy, "needs_shadow", False) for each in settings}) > 1:
        raise ValueError(
            "a policy with shadow masks (Wino) must be that of all texts of a batch; generate them in separate calls"
        )


load = DiffusionLM.from_pretrained
