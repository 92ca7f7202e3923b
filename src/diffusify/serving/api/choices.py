"""The choices of a request while they are generated: texts, and tool calls after them."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.sampling.generation import GenerationRun
from diffusify.serving.api.chat_schemas import ChatBody
from diffusify.serving.api.logprobs import TokenLogprob, TopLogprobs
from diffusify.serving.api.openai_schemas import OpenAIFields
from diffusify.serving.api.responses import JobTexts, usage
from diffusify.serving.api.service import Service
from diffusify.serving.api.tools import ToolUse
from diffusify.serving.engine.generation_progress import StartEvent, StepEvent, TextStream
from diffusify.text.tool_calls import ToolCall

DEFAULT_ANSWER_LENGTH = 256


@dataclass(frozen=True)
class EchoedPrompts:
    """The texts of the prompts before the choices, the log-probabilities of their tokens, and the passes for these."""

    texts: list[str]
    logprobs: list[list[TokenLogprob]]
    num_tokens: int
    forwards: int = 0


@dataclass(frozen=True)
class ParsedRequest:
    """A request as a generation: how to prepare it, and how its tokens become texts, `copies` of each prompt.

    With `tools` the texts may end in tool calls, or consist of them. Without `prepare` nothing is generated.
    """

    prepare: Callable[[DiffusionLM], GenerationRun] | None
    new_text: Callable[[int, list[int]], TextStream]
    copies: int
    echo: EchoedPrompts | None = None
    tools: ToolUse | None = None


@dataclass(frozen=True)
class Delta:
    """What is new in a choice: text, or tool calls, and at its end the reason why it is finished."""

    choice: int
    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None


Update = tuple[StartEvent | StepEvent | None, list[Delta]]


@dataclass
class Choices:
    """The choices of a request, which `updates` generates. `texts`, `calls` and `finish_reasons` are those so far."""

    service: Service
    request: Request
    lm: DiffusionLM
    body: OpenAIFields
    parsed: ParsedRequest
    texts: dict[int, str] = field(default_factory=dict)
    calls: dict[int, tuple[ToolCall, ...]] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._answers: JobTexts | None = None
        self._called: JobTexts | None = None
        self._top_logprobs: TopLogprobs | None = None

    async def updates(self) -> AsyncIterator[Update]:
        """The events of the generation, with what is new in the choices after each of them."""
        async for event, deltas in self._generate():
            for delta in deltas:
                self.texts[delta.choice] = self.texts.get(delta.choice, "") + delta.text
                self.calls[delta.choice] = self.calls.get(delta.choice, ()) + delta.calls
                if delta.finish_reason is not None:
                    self.finish_reasons[delta.choice] = delta.finish_reason
            yield event, deltas

    async def finish(self) -> None:
        """Generate all choices."""
        async for _ in self.updates():
            pass

    async def _generate(self) -> AsyncIterator[Update]:
        prepare, tools = self.parsed.prepare, self.parsed.tools
        if prepare is None:
            assert self.parsed.echo is not None
            yield None, [Delta(i, finish_reason="length") for i in range(len(self.parsed.echo.texts))]
            return
        if tools is None or not tools.required:
            async for update in self._answer(prepare):
                yield update
        if tools is not None:
            async for update in self._call(tools):
                yield update

    async def _answer(self, prepare: Callable[[DiffusionLM], GenerationRun]) -> AsyncIterator[Update]:
        """The texts of the choices, up to tool calls."""

        def prepare_with_logprobs(lm: DiffusionLM) -> GenerationRun:
            run = prepare(lm)
            observer = run.settings[0].observer
            self._top_logprobs = observer if isinstance(observer, TopLogprobs) else None
            return run

        await self.service.compile(self.lm, self.body.constraint)
        job = self.service.submit(self.body.model, prepare_with_logprobs, self.request)
        self._answers = answers = JobTexts(job, self.parsed.new_text, self.parsed.copies)
        async for new, event in answers.updates():
            deltas = []
            for i, (text, added) in enumerate(zip(answers.texts, new, strict=True)):
                reason = None if i in self.finish_reasons or text.finish_reason == "tool_calls" else text.finish_reason
                if added or reason or isinstance(event, StartEvent):
                    deltas.append(Delta(i, added, finish_reason=reason))
            yield event, deltas
        self.service.count(answers)

    async def _call(self, tools: ToolUse) -> AsyncIterator[Update]:
        """The tool calls of all choices, or of those whose text ends in the sign of a call."""
        assert isinstance(self.body, ChatBody)
        if self._answers is None:
            before = {i: ("", 0) for i in range(self.body.n)}
        else:
            texts = enumerate(self._answers.texts)
            before = {i: (t.before_call, len(t.tokens)) for i, t in texts if t.finish_reason == "tool_calls"}
        if not before:
            return
        await self.service.compile(self.lm, tools.regex)
        shortest = self.lm.compile_regex(tools.regex).shortest_length
        prompts: dict[int, list[int]] = {}
        lengths: dict[int, int] = {}
        for i, (text, used) in before.items():
            prompts[i] = tools.call_prompt(self.lm, text)
            room = self.service.room(self.lm, len(prompts[i]), len(before))
            lengths[i] = min((self.body.max_new_tokens or DEFAULT_ANSWER_LENGTH) - used, room)
        fitting = [i for i in before if shortest is not None and lengths[i] >= shortest]
        if self._answers is None and not fitting:
            raise ValueError(
                f"max_tokens={lengths[0]} is too few for a tool call, which needs at least {shortest} tokens"
            )
        if cut := [Delta(i, finish_reason="length") for i in before if i not in fitting]:
            yield None, cut
        if not fitting:
            return
        body = self.body.model_copy(update={"regex": tools.regex, "logprobs": None})
        settings = body.sampling_config(self.lm)

        def prepare(lm: DiffusionLM) -> GenerationRun:
            return lm.prepare_chat([prompts[i] for i in fitting], [lengths[i] for i in fitting], settings)

        job = self.service.submit(self.body.model, prepare, self.request)
        self._called = called = JobTexts(job, self._new_call_text, len(fitting))
        async for _, event in called.updates():
            yield event, []
        self.service.count(called)
        calls = [tuple(tools.format.parse(text.sent)) for text in called.texts]
        yield None, [Delta(i, "", each, "tool_calls") for i, each in zip(fitting, calls, strict=True)]

    def _new_call_text(self, _: int, positions: list[int]) -> TextStream:
        ends = frozenset(self.lm.chat_template.end_token_ids)
        return TextStream(positions, lambda ids: self.lm.tokenizer.decode(ids, continues=True), ends)

    def logprobs(self, choice: int) -> list[TokenLogprob] | None:
        """The tokens of a choice's text with their log-probabilities, if they were requested.

        After an echoed prompt with its own, the end token is among them, so that a prompt's tokens can be found by
        counting from both ends.
        """
        if self.body.num_top_logprobs is None:
            return None
        echo = self.parsed.echo
        tokens = [] if echo is None else list(echo.logprobs[choice])
        if self._answers is None:
            return tokens
        text, row = self._answers.texts[choice], self._answers.job.work.best_rows[choice]
        end = [] if echo is None or text.end_token is None else [text.end_token]
        found = {} if self._top_logprobs is None else self._top_logprobs.found
        return tokens + [
            TokenLogprob(token, log_prob, tuple(found.get((row, position), ())))
            for position, token, log_prob in [*text.tokens, *end]
        ]

    @property
    def usage(self) -> dict[str, Any]:
        """The tokens and forward passes of all choices."""
        jobs = [texts for texts in (self._answers, self._called) if texts is not None]
        echo = self.parsed.echo
        forwards = sum(texts.job.work.forwards for texts in jobs) + (0 if echo is None else echo.forwards)
        if not jobs:
            assert echo is not None
            return usage(echo.num_tokens, 0, forwards)
        return usage(jobs[0].prompt_tokens, sum(texts.completion_tokens for texts in jobs), forwards)
