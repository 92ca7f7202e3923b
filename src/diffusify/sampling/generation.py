"""Texts on their way, and what becomes of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.constraints import Automaton, Constraint
from diffusify.diffusion.rng import RowGenerators
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.guidance import GuidedDenoiser
from diffusify.sampling.kv_cache import BlockCache, WindowCache
from diffusify.sampling.sampler import DenoiseFn, Frame, denoise
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.sampling.shadow import ShadowDenoiser
from diffusify.sampling.speculative import Speculative


@dataclass(frozen=True)
class Generation:
    """A written text and what it took: tokens written, network forwards, seconds (of the whole batch)."""

    text: str
    tokens: int
    forwards: int
    seconds: float
    seed: int
    completion: str | None = None  # without the prompt
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


class GenerationRun:
    """Texts on their way: iterate to see every step of the batch, then ask for the results.

    Of every `beam` neighbouring rows, candidates for one text, the surest is a result.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        canvas: Canvas,
        settings: list[SamplingConfig],
        tell: Callable[[Canvas], dict[str, Any]],
        *,
        end: int | None = None,
        banned: tuple[int, ...] = (),
        beam: int = 1,
        forms: Mapping[str, Automaton] | None = None,
    ) -> None:
        """`forms` are the automata of the settings' regular expressions. ValueError where there is no room for one."""
        self.canvas, self.forwards, self.seconds = canvas.to(denoiser.device), 0, 0.0
        self.settings = [each for each in settings for _ in range(beam)]
        self._end, self._banned, self._tell, self.beam = end, banned, tell, beam
        self._frames = self._run(denoiser)
        self.score = torch.zeros_like(self.canvas.tokens, dtype=torch.float32)
        constraints = {regex: Constraint(form, end) for regex, form in (forms or {}).items()}
        self._constraints = [constraints.get(each.regex or "") for each in self.settings]
        for row, constraint in enumerate(self._constraints):
            if constraint is not None:
                constraint.check(self.canvas[row : row + 1])

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def _run(self, denoiser: Denoiser) -> Iterator[Frame]:
        begun = perf_counter()
        for frame in self._steps(denoiser):
            self.canvas, self.forwards, self.score = frame.canvas, frame.forwards, frame.score
            self.seconds = perf_counter() - begun
            yield frame

    def _steps(self, denoiser: Denoiser) -> Iterator[Frame]:
        card, settings = denoiser.diffusion_config, self.settings[0]  # what is used of it, all rows share
        noise, size = card.mask_token_id, card.block_size
        rng = RowGenerators.seeded([each.seed for each in self.settings], denoiser.device)
        samplers = [
            each.sampler(card.policy, banned=self._banned, end=self._end, constraint=constraint)
            for each, constraint in zip(self.settings, self._constraints, strict=True)
        ]
        if settings.tolerance is not None:
            speculative = Speculative(
                denoiser, settings.pick, settings.tolerance, banned=samplers[0].banned, end_token_id=self._end
            )
            return speculative(self.canvas, noise=noise, rng=rng)

        def model() -> DenoiseFn:
            if getattr(samplers[0].policy, "needs_shadow", False):
                return ShadowDenoiser(denoiser)
            if settings.cache in ("prefix", "dual"):
                return WindowCache(denoiser, settings.cache)
            exact = settings.cache == "exact" and size is not None and denoiser.supports_kv_cache
            return BlockCache(denoiser) if exact else denoiser.predict

        chosen = GuidedDenoiser(model(), model(), settings.guidance, noise) if settings.guidance else model()
        n = self.canvas.tokens.shape[1]
        widths = torch.tensor([[size or each.window or n] for each in self.settings], device=denoiser.device)
        return denoise(chosen, self.canvas, samplers, self.canvas.position_ids // widths, noise=noise, rng=rng)

    def results(self) -> list[Generation]:
        """The finished texts; steps that nobody looked at yet are taken first."""
        for _ in self._frames:
            pass
        tokens = self._counted().sum(1).tolist()
        took = {"forwards": self.forwards, "seconds": self.seconds}
        return [
            Generation(
                tokens=tokens[row], seed=self.settings[row].seed, **took, **self._tell(self.canvas[row : row + 1])
            )
            for row in self.best
        ]

    @property
    def best(self) -> list[int]:
        """The rows that are results."""
        counted = self._counted()
        sure = (self.score * counted).sum(1) / counted.sum(1).clamp_min(1)
        best = sure.view(-1, self.beam).argmax(1) + torch.arange(0, len(sure), self.beam, device=sure.device)
        return best.tolist()

    def _counted(self) -> Bool[Tensor, "b n"]:
        """What was written, up to the end token."""
        written = self.canvas.written
        if self._end is None:
            return written
        ended = (written & (self.canvas.tokens == self._end)).long().cumsum(1) > 0
        return written & ~ended
