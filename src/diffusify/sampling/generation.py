"""A diffusion model as its users hold it: strings in, strings out."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from diffusify.canvas import Canvas
from diffusify.config import DiffusionConfig
from diffusify.diffusion.picking import Draw, Greedy
from diffusify.diffusion.policies import Policy, Threshold, Unmask
from diffusify.models.denoiser import Denoiser
from diffusify.models.saving import load_denoiser
from diffusify.sampling.sampler import Frame, Sampler
from diffusify.text.prompts import continuation_canvas, infill_canvas, read, read_spans
from diffusify.text.tokens import TextTokenizer


@dataclass(frozen=True)
class SamplingConfig:
    """How a model writes. Unset values are the model's own, as its card has them.

    `steps` denoising steps in all; `threshold` writes every token with a higher probability at once (and, where
    `steps` are given too, never fewer than they ask for); `temperature` 0 takes the likeliest token.
    """

    steps: int | None = None
    threshold: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0; 0 takes the likeliest token")
        self.sampler(Unmask())

    def sampler(self, default: Policy, *, banned: tuple[int, ...] = (), end: int | None = None) -> Sampler:
        """The loop with these settings. ValueError for one that is out of bounds."""
        pick = Greedy() if self.temperature == 0 else Draw(float(self.temperature), self.top_k, float(self.top_p))
        policy = default if self.threshold is None else Unmask(quota=Threshold(float(self.threshold)))
        return Sampler(pick, policy, self.steps, banned=banned, end_token_id=end)


@dataclass(frozen=True)
class Generation:
    """A written text and what it took: tokens written, network forwards, seconds."""

    text: str
    tokens: int
    forwards: int
    seconds: float
    seed: int
    spans: tuple[str, ...] | None = None  # what was written into each hole, when there were holes

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(1, self.forwards)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, self.seconds)

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self) | {
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
        }
        return {key: value for key, value in plain.items() if value is not None}


class DiffusionLM:
    """A denoiser and its tokenizer."""

    def __init__(self, denoiser: Denoiser, tokenizer: TextTokenizer) -> None:
        self.denoiser, self.tokenizer = denoiser, tokenizer

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "DiffusionLM":
        """Open a folder that `diffusify adapt` wrote. ValueError when it does not hold a whole diffusion model."""
        denoiser, tokenizer = load_denoiser(folder, dtype=dtype, device=device)
        return cls(denoiser, TextTokenizer(tokenizer, denoiser.diffusion.mask_token_id))

    @property
    def config(self) -> DiffusionConfig:
        return self.denoiser.diffusion

    def generate(self, prompt: str = "", max_new_tokens: int = 64, **sampling: Any) -> Generation:
        """Continue a prompt (or write from nothing). `sampling` are fields of `SamplingConfig`."""
        settings = SamplingConfig(**sampling)
        return self._finish(self.frames(prompt, max_new_tokens, settings), settings, spans=False)

    def infill(self, text: str, **sampling: Any) -> Generation:
        """Fill the holes of a text, written `[[8]]` for eight tokens. ValueError if the model cannot see ahead."""
        settings = SamplingConfig(**sampling)
        return self._finish(self.infill_frames(text, settings), settings, spans=True)

    def stream(self, prompt: str = "", max_new_tokens: int = 64, **sampling: Any) -> Iterator[Canvas]:
        """Every canvas on the way, the finished one last; `model.read(canvas)` gives its text."""
        for frame in self.frames(prompt, max_new_tokens, SamplingConfig(**sampling)):
            yield frame.canvas

    def read(self, canvas: Canvas) -> str:
        """The text of a canvas, with `_` for what is still open."""
        return read(self.tokenizer, canvas)[0]

    def frames(self, prompt: str, max_new_tokens: int, settings: SamplingConfig) -> Iterator[Frame]:
        """The steps of a continuation."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        sampler = settings.sampler(self.config.policy, end=self.tokenizer.end_token_id)
        context = self.denoiser.context
        canvas = continuation_canvas(self.tokenizer, [prompt], max_new_tokens, context=context)
        return self._run(sampler, canvas, settings)

    def infill_frames(self, text: str, settings: SamplingConfig) -> Iterator[Frame]:
        """The steps of an infill. ValueError if the model writes from left to right and cannot see what follows."""
        if not self.config.sees_right_context:
            raise ValueError(
                f"this model ({self.config.recipe} recipe, {self.config.attention}) writes a hole without seeing the "
                "text behind it, so it cannot infill; adapt the base with `--recipe ar` (or `mlm` for a masked model)"
            )
        ends = {self.tokenizer.start_token_id, self.tokenizer.end_token_id}
        sampler = settings.sampler(self.config.policy, banned=tuple(sorted(ends)))
        return self._run(sampler, infill_canvas(self.tokenizer, [text], context=self.denoiser.context), settings)

    def _run(self, sampler: Sampler, canvas: Canvas, settings: SamplingConfig) -> Iterator[Frame]:
        device = self.denoiser.device
        canvas = canvas.to(device)
        size = self.config.block_size
        window = canvas.positions // size if size else None
        generator = torch.Generator(device).manual_seed(settings.seed)
        return sampler(self.denoiser, canvas, window, noise=self.tokenizer.mask_token_id, generator=generator)

    def _finish(self, frames: Iterator[Frame], settings: SamplingConfig, *, spans: bool) -> Generation:
        begun = perf_counter()
        *_, last = frames
        return self.result(last, perf_counter() - begun, settings.seed, spans=spans)

    def result(self, frame: Frame, seconds: float, seed: int, *, spans: bool = False) -> Generation:
        """What a last frame amounts to."""
        canvas = frame.canvas
        ended = (canvas.editable & ~canvas.open & (canvas.tokens == self.tokenizer.end_token_id)).long().cumsum(1) > 0
        tokens = int((canvas.editable & ~canvas.open & ~ended).sum())
        written = tuple(read_spans(self.tokenizer, canvas)[0]) if spans else None
        return Generation(self.read(canvas), tokens, frame.forwards, seconds, seed, written)


load = DiffusionLM.from_pretrained
