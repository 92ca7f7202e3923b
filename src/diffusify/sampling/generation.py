"""Generation of a batch of texts, and its results."""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from time import perf_counter
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import BlockCausal
from diffusify.diffusion.constraints import Automaton, Constraint
from diffusify.diffusion.length_tokens import SpanLengths
from diffusify.diffusion.rng import RowGenerators
from diffusify.diffusion.span_ends import SpanEnds
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.guidance import GuidedDenoiser
from diffusify.sampling.kv_cache import BlockCache, WindowCache
from diffusify.sampling.reranking import ar_log_likelihood
from diffusify.sampling.row_text import Answer, Continuation, Infilling, leading_tokens
from diffusify.sampling.sampler import DenoiseFn, Frame, denoise, end_tokens, generated_ends
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.sampling.shadow import ShadowDenoiser
from diffusify.sampling.speculative import Speculative
from diffusify.text.stop_strings import find_stop

_RERANK_TEMPERATURE = 0.5  # at which candidates are sampled if the first of them is greedy


@dataclass(frozen=True)
class Generation:
    """A generated text. `forwards` (network forward passes) and `seconds` are those of its whole batch.

    `tokens` are those of the text, without an end token or what follows a stop string. `finish_reason` is "stop" after
    an end token or a stop string, "length" if all tokens were used, and None when infilling.
    """

    text: str
    tokens: int
    forwards: int
    seconds: float
    seed: int
    completion: str | None = None  # the generated text without the prompt
    spans: tuple[str, ...] | None = None  # the text generated for each masked span, when infilling
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens per forward pass of the batch."""
        return self.tokens / max(1, self.forwards)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of the batch's run time."""
        return self.tokens / max(1e-9, self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """The fields and rates as JSON-serializable values, without fields that are None."""
        plain = asdict(self) | {
            "tokens_per_forward": round(self.tokens_per_forward, 3),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
        }
        return {key: value for key, value in plain.items() if value is not None}


class GenerationRun:
    """A running generation: an iterator over the frames of a batch, with `results()` at its end.

    Every `num_candidates` consecutive rows of the canvas are candidates for one text. The result is the candidate with
    the highest mean log-probability per token, or with the highest likelihood under the AR half if the settings say
    `rerank`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        canvas: Canvas,
        settings: list[SamplingConfig],
        text: Continuation | Answer | Infilling,
        *,
        end_token_id: int | tuple[int, ...] | None = None,
        banned: tuple[int, ...] = (),
        num_candidates: int = 1,
        lengths: SpanLengths | SpanEnds | None = None,
        automata: Mapping[str, Automaton] | None = None,
    ) -> None:
        """`settings` has one entry per text; `text` turns a row of the canvas into a text. `lengths` says which masked
        spans the model may resize.

        Any `end_token_id` ends a text; constrained ones end with the first. `automata` maps the regular expressions of
        the settings to their compiled form. Raises ValueError if a masked span is too short for every text that its
        regular expression matches.
        """
        self.canvas, self.forwards, self.seconds = canvas.to(denoiser.device), 0, 0.0
        self.settings = [_of_candidate(each, index) for each in settings for index in range(num_candidates)]
        self.end_token_id, self._banned, self._text = end_token_id, banned, text
        self._lengths = None if lengths is None else lengths.to(denoiser.device)
        spare = int(lengths.spare.sum(1).max()) if isinstance(lengths, SpanLengths) else 0
        self.width = canvas.tokens.shape[1] + spare  # the largest number of positions that a row may get
        self._stopped: dict[int, dict[str, Any]] = {}  # the text fields of rows that a stop string has ended
        self.num_candidates = num_candidates
        self._frames = self._run(denoiser)
        self.score = torch.zeros_like(self.canvas.tokens, dtype=torch.float32)
        self._likelihood: Tensor | None = None  # of each row under the AR half, by which candidates are ranked
        first_end = end_token_id[0] if isinstance(end_token_id, tuple) else end_token_id
        constraint_of = cache(partial(_constraint, automata or {}, first_end))
        self._constraints = [constraint_of(each.regex, each.suppress_tokens) for each in self.settings]
        rows = torch.tensor(self._possible_rows(), dtype=torch.long, device=denoiser.device)
        self.canvas = self.canvas[rows]

    def _possible_rows(self) -> list[int]:
        """Every row, or another candidate for its text where its length is impossible under its constraint."""
        rows: list[int] = []
        for start in range(0, len(self.settings), self.num_candidates):
            candidates, constraint = range(start, start + self.num_candidates), self._constraints[start]
            possible = [
                row for row in candidates if constraint is None or constraint.possible_rows(self.canvas[row : row + 1])
            ]
            if constraint is not None and not possible:
                constraint.check(self.canvas[start : start + 1])
            rows += [row if row in possible else possible[row % len(possible)] for row in candidates]
        return rows

    def __iter__(self) -> Iterator[Frame]:
        return self._frames

    def _run(self, denoiser: Denoiser) -> Iterator[Frame]:
        start_time = perf_counter()
        for frame in self._end_at_stops(self._steps(denoiser)):
            self.canvas, self.forwards, self.score = frame.canvas, frame.forwards, frame.score
            self.seconds = perf_counter() - start_time
            yield frame
        if self.settings and self.settings[0].rerank:
            self._likelihood = ar_log_likelihood(denoiser, self.canvas)
            self.forwards, self.seconds = self.forwards + 1, perf_counter() - start_time

    def _end_at_stops(self, steps: Generator[Frame, Canvas | None, None]) -> Iterator[Frame]:
        """The frames of `steps`, in which rows end before the first stop string in their final text."""
        frame = None
        while True:
            try:
                frame = steps.send(None if frame is None else frame.canvas)
            except StopIteration:
                break
            frame = replace(frame, canvas=self._without_stops(frame.canvas, frame.settled))
            yield frame
        if frame is not None:  # a policy that remasks settles its last window at the end
            settled = torch.full_like(frame.settled, frame.canvas.tokens.shape[1])
            canvas = self._without_stops(frame.canvas, settled)
            if canvas is not frame.canvas:
                yield replace(frame, canvas=canvas, settled=settled)

    def _without_stops(self, canvas: Canvas, settled: Int[Tensor, " b"]) -> Canvas:
        """The canvas with rows that end before the first stop string in their first `settled` positions."""
        for row, settings in enumerate(self.settings):
            if not settings.stop or row in self._stopped:
                continue
            assert not isinstance(self._text, Infilling), "prepare_infilling refuses stop strings"
            final = canvas[row : row + 1, : int(settled[row])]
            completion = self._text.completion(final)
            if stop := find_stop(completion, settings.stop):
                self._stopped[row] = self._text.fields(final, completion[stop.start :])
                canvas = canvas.end_row(row, leading_tokens(self._text, final, completion[: stop.start]))
        return canvas

    def _steps(self, denoiser: Denoiser) -> Generator[Frame, Canvas | None, None]:
        config, settings = (
            denoiser.diffusion_config,
            self.settings[0],
        )  # only fields that are equal in all rows are used
        noise, pattern = config.mask_token_id, config.attention
        in_order = isinstance(pattern, BlockCausal) and pattern.sides == "left"
        rng = RowGenerators.from_seeds([each.seed for each in self.settings])
        lengths = self._lengths if isinstance(self._lengths, SpanLengths) else None
        denoiser = denoiser if lengths is None else denoiser.resizing
        samplers = [
            each.sampler(config.policy, banned=self._banned, end_token_id=self.end_token_id, constraint=constraint)
            for each, constraint in zip(self.settings, self._constraints, strict=True)
        ]
        if settings.tolerance is not None:
            ends = self._lengths if isinstance(self._lengths, SpanEnds) else None
            decoding = Speculative(denoiser, settings.tolerance)
            return decoding(self.canvas, samplers, noise=noise, rng=rng, span_ends=ends)

        def denoise_fn() -> DenoiseFn:
            if getattr(samplers[0].policy, "needs_shadow", False):
                return ShadowDenoiser(denoiser)
            if settings.cache in ("prefix", "dual"):
                return WindowCache(denoiser, settings.cache)
            cached = settings.cache == "exact" and in_order and denoiser.supports_kv_cache
            return BlockCache(denoiser) if cached else denoiser.predict

        model = denoise_fn()
        if settings.guidance:  # each of the two has a KV cache of its own
            model = GuidedDenoiser(model, denoise_fn(), settings.guidance, noise)
        n = self.canvas.tokens.shape[1]
        if isinstance(pattern, BlockCausal):
            windows = pattern.block_starts(self.canvas).cumsum(1) - 1
        else:
            widths = torch.tensor([[each.window or n] for each in self.settings], device=denoiser.device)
            windows = self.canvas.position_ids // widths
        return denoise(model, self.canvas, samplers, windows, noise=noise, rng=rng, lengths=lengths)

    @property
    def resizes(self) -> bool:
        """Whether the model may change the lengths of masked spans."""
        return self._lengths is not None

    def results(self) -> list[Generation]:
        """Run all remaining steps and return the finished texts."""
        for _ in self._frames:
            pass
        tokens = self._generated().sum(1).tolist()
        return [self._result(row, tokens[row]) for row in self.best_rows]

    def _result(self, row: int, tokens: int) -> Generation:
        canvas = self.canvas[row : row + 1]
        fields = self._stopped.get(row) or self._text.fields(canvas)
        ended = row in self._stopped or tokens < int(canvas.written.sum())
        return Generation(
            tokens=tokens,
            forwards=self.forwards,
            seconds=self.seconds,
            seed=self.settings[row - row % self.num_candidates].seed,
            finish_reason=None if self.end_token_id is None else "stop" if ended else "length",
            **fields,
        )

    @property
    def best_rows(self) -> list[int]:
        """The row of the best candidate for each text."""
        generated, size = self._generated(), self.num_candidates
        mean = (self.score * generated).sum(1) / generated.sum(1).clamp_min(1)
        mean = mean if self._likelihood is None else self._likelihood
        best = mean.view(-1, size).argmax(1) + torch.arange(0, len(mean), size, device=mean.device)
        return best.tolist()

    def _generated(self) -> Bool[Tensor, "b n"]:
        """Mask of the generated tokens before the first generated end token."""
        ends = end_tokens([self.end_token_id] * len(self.canvas.tokens), self.canvas.tokens.device)
        return self.canvas.written & (generated_ends(self.canvas, ends).long().cumsum(1) == 0)


def _constraint(
    automata: Mapping[str, Automaton], end_token_id: int | None, regex: str | None, suppressed: tuple[int, ...]
) -> Constraint | None:
    """The constraint of a regular expression, without texts that have suppressed tokens."""
    if regex is None or regex not in automata:
        return None
    automaton = automata[regex].without(suppressed) if suppressed else automata[regex]
    return Constraint(automaton, None if end_token_id in suppressed else end_token_id)


def _of_candidate(settings: SamplingConfig, index: int) -> SamplingConfig:
    """The settings of one of a text's candidates. The first is decoded as it would be alone, the others are sampled."""
    if not settings.rerank or index == 0:
        return settings
    temperature, seed = settings.temperature or _RERANK_TEMPERATURE, (settings.seed + 1_000_003 * index) % 2**63
    return replace(settings, temperature=temperature, seed=seed)
