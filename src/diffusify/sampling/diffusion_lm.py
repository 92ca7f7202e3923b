"""A diffusion model as its users hold it: strings in, strings out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import torch

from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.constraints import Automaton
from diffusify.models.denoiser import Denoiser
from diffusify.models.saving import load_denoiser
from diffusify.sampling.generation import Generation, GenerationRun
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.chat_template import ChatTemplate
from diffusify.text.grammar import automaton
from diffusify.text.prompts import Holed, continuation_canvas, hole_choices, infill_canvas, read, read_spans
from diffusify.text.tokenizer import TextTokenizer

Message = dict[str, Any]  # {"role": "user", "content": "..."}
Settings = SamplingConfig | Sequence[SamplingConfig]


class DiffusionLM:
    """A denoiser and its tokenizer."""

    def __init__(self, denoiser: Denoiser, tokenizer: TextTokenizer) -> None:
        self.denoiser, self.tokenizer = denoiser, tokenizer
        self.form = lru_cache(16)(self._form)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "DiffusionLM":
        """Open a folder that `diffusify adapt` wrote. ValueError when it does not hold a whole diffusion model."""
        denoiser, tokenizer = load_denoiser(folder, dtype=dtype, device=device)
        return cls(denoiser, TextTokenizer(tokenizer, denoiser.diffusion_config.mask_token_id))

    @property
    def config(self) -> DiffusionConfig:
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
        """Continue a prompt (or write from nothing), or a batch of prompts. `sampling` are fields of `SamplingConfig`.

        There is room for `max_new_tokens`, one number for all or one each; unset, as many as the length head tells,
        else 64.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        results = self.prepare_generation(prompts, max_new_tokens, SamplingConfig(**sampling)).results()
        return results[0] if isinstance(prompt, str) else results

    @overload
    def infill(self, text: str, **sampling: Any) -> Generation: ...
    @overload
    def infill(self, text: list[str], **sampling: Any) -> list[Generation]: ...
    def infill(self, text: str | list[str], **sampling: Any) -> Generation | list[Generation]:
        """Fill the holes of a text: `[[8]]` has eight tokens, `[[3-12]]` as many as are written with most confidence.

        ValueError if the model cannot see ahead.
        """
        texts = [text] if isinstance(text, str) else text
        results = self.prepare_infilling(texts, SamplingConfig(**sampling)).results()
        return results[0] if isinstance(text, str) else results

    def chat(self, messages: list[Message], max_new_tokens: int | None = None, **sampling: Any) -> Generation:
        """The assistant's next answer, as `completion` and `text`."""
        return self.prepare_chat([messages], max_new_tokens, SamplingConfig(**sampling)).results()[0]

    def stream(self, prompt: str = "", max_new_tokens: int | None = None, **sampling: Any) -> Iterator[Canvas]:
        """Every canvas on the way, the finished one last; `model.read(canvas)` gives its text."""
        for frame in self.prepare_generation([prompt], max_new_tokens, SamplingConfig(**sampling)):
            yield frame.canvas

    def read(self, canvas: Canvas) -> str:
        """The text of a canvas, with `_` for what is still open."""
        return read(self.tokenizer, canvas)[0]

    def prepare_generation(
        self, prompts: Sequence[str | list[int]], room: int | list[int] | None, settings: Settings
    ) -> GenerationRun:
        """The writing of continuations; prompts are texts or token ids, settings are for all or one each."""

        def tell(canvas: Canvas) -> dict[str, Any]:
            return {"text": self.read(canvas), "completion": "".join(read_spans(self.tokenizer, canvas)[0])}

        return self._continue(prompts, room, settings, self.tokenizer.end_token_id, tell)

    def prepare_chat(self, chats: list[list[Message]], room: int | None, settings: Settings) -> GenerationRun:
        """The writing of the assistant's next answers."""
        template = self.chat_template

        def tell(canvas: Canvas) -> dict[str, Any]:
            answer = template.read(canvas.tokens[canvas.written].tolist())
            return {"text": answer, "completion": answer}

        prompts = [template.prompt(messages) for messages in chats]
        return self._continue(prompts, room, settings, template.end_token_id, tell)

    def prepare_infilling(self, texts: Sequence[Holed], settings: Settings) -> GenerationRun:
        """The writing of infills. ValueError if the model writes from left to right and cannot see what follows."""
        if not self.config.sees_right_context:
            raise ValueError(
                f"this model ({self.config.recipe} recipe, {self.config.attention}) writes a hole without seeing the "
                "text behind it, so it cannot infill; adapt the base with `--recipe ar`, with `-o infilling=0.25`, or "
                "with `--recipe mlm` for a masked model"
            )

        def tell(canvas: Canvas) -> dict[str, Any]:
            return {"text": self.read(canvas), "spans": tuple(read_spans(self.tokenizer, canvas)[0])}

        ends = {self.tokenizer.start_token_id, self.tokenizer.end_token_id}
        denoiser = self.denoiser.infiller
        each, choices = _one_each(settings, len(texts), denoiser.diffusion_config), hole_choices(texts)
        canvas = infill_canvas(self.tokenizer, texts, context=self.denoiser.context, choices=choices)
        banned, forms = tuple(sorted(ends)), self._forms(each)
        return GenerationRun(denoiser, canvas, each, tell, banned=banned, beam=choices, forms=forms)

    def _form(self, regex: str) -> Automaton:
        """The automaton of the texts that match a regular expression. ValueError for one that cannot be followed."""
        return automaton(self.tokenizer, regex)

    def _forms(self, settings: list[SamplingConfig]) -> dict[str, Automaton]:
        return {each.regex: self.form(each.regex) for each in settings if each.regex is not None}

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.tokenizer)

    def _continue(
        self,
        prompts: Sequence[str | list[int]],
        room: int | list[int] | None,
        settings: Settings,
        end: int,
        tell: Callable[[Canvas], dict[str, Any]],
    ) -> GenerationRun:
        each, beam = _one_each(settings, len(prompts), self.config), 1
        if room is None and self.denoiser.length_head is not None:
            beam = min(each[0].length_beam, self.denoiser.length_head.longest)
            room = self._lengths(prompts, beam)
            prompts = [prompt for prompt in prompts for _ in range(beam)]
        canvas = continuation_canvas(
            self.tokenizer, prompts, 64 if room is None else room, context=self.denoiser.context
        )
        return GenerationRun(self.denoiser, canvas, each, tell, end=end, beam=beam, forms=self._forms(each))

    @torch.inference_mode()
    def _lengths(self, prompts: Sequence[str | list[int]], beam: int) -> list[int]:
        """The likeliest `beam` lengths for each prompt, as far as they fit."""
        canvas = continuation_canvas(self.tokenizer, prompts, 1, context=self.denoiser.context)
        lengths = self.denoiser.lengths(canvas.to(self.denoiser.device)).topk(beam).indices.cpu() + 1
        if self.denoiser.context is not None:
            given = (canvas.real & ~canvas.editable).sum(1, keepdim=True)
            lengths = torch.minimum(lengths, self.denoiser.context - given)
        return lengths.flatten().tolist()


def _one_each(settings: Settings, count: int, card: DiffusionConfig) -> list[SamplingConfig]:
    """Settings for each text; one for all gives each text the next seed. ValueError for what does not go together.

    Texts of a batch share their forwards, and so all that decides what a forward is.
    """
    if isinstance(settings, SamplingConfig):
        return [replace(settings, seed=settings.seed + i) for i in range(count)]
    if len(settings) != count:
        raise ValueError(f"{len(settings)} settings for {count} texts; give one for all, or one for each")
    shared = ["cache", "guidance", "tolerance", "length_beam"]
    if any(each.tolerance is not None for each in settings):
        shared += ["temperature", "top_k", "top_p", "suppress_tokens"]
    for name in shared:
        if len({getattr(each, name) for each in settings}) > 1:
            raise ValueError(f"{name} must be the same for all texts of a batch; write them apart")
    if len({getattr(each.sampler(card.policy).policy, "needs_shadow", False) for each in settings}) > 1:
        raise ValueError("a policy that revokes must be that of all texts of a batch; write them apart")
    return list(settings)


load = DiffusionLM.from_pretrained
