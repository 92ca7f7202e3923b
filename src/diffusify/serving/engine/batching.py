"""Continuous batching of forward passes: many sampling loops share one network.

Each loop runs as if it were alone, in a greenlet. It is suspended where it calls the network, and the calls of all
suspended loops run as one forward pass.

Axes: k output positions, d hidden size, v vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from diffusify.diffusion.attention_inputs import AttentionInputs, BatchedInputs
from diffusify.diffusion.logits import CHUNK_SIZE
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.kv_cache import ColumnCache
from diffusify.serving.engine.kv_pool import KVPool


@dataclass(frozen=True)
class _BodyCall:
    """A suspended call of the network's body, for a number of `texts`."""

    inputs: AttentionInputs
    index: Tensor
    past: ColumnCache | None
    texts: int


@dataclass(frozen=True)
class _HeadCall:
    """A suspended call of the network's head."""

    hidden: Tensor


class BatchedDenoiser(Denoiser):
    """A denoiser for the loops of a `PassBatcher`: each call suspends its loop until the next shared forward pass."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.network, denoiser.diffusion_config)
        self.length_head, self.draft_head = denoiser.length_head, denoiser.draft_head
        self.unused_token_ids = denoiser.unused_token_ids
        self.last_texts = 1  # of the last shared pass

    def texts_per_pass(self, texts: int) -> int:
        return max(texts, self.last_texts)

    def hidden_states(
        self, inputs: AttentionInputs, index: Int[Tensor, " k"], *, past: Cache | None = None
    ) -> Float[Tensor, "k d"]:
        assert past is None or isinstance(past, ColumnCache)
        texts = len(inputs.tokens if past is None else past.columns)
        if past is None:  # a cache has done so in its first pass
            inputs, index = inputs.run_equal_rows_once(index)
        return _suspend(_BodyCall(inputs, index, past, texts))

    def project(self, hidden: Float[Tensor, "k d"]) -> Float[Tensor, "k v"]:
        return self._without_length_tokens(_suspend(_HeadCall(hidden)))


def _suspend(call: _BodyCall | _HeadCall) -> Any:
    batcher = getcurrent().parent
    assert batcher is not None, "a BatchedDenoiser must be called from a loop of its PassBatcher"
    return batcher.switch(call)


@dataclass(eq=False)
class Loop:
    """A sampling loop that calls a `BatchedDenoiser`, and the call at which it is suspended."""

    greenlet: greenlet
    pending: _BodyCall | _HeadCall | None = None
    rows: dict[ColumnCache, list[int]] = field(default_factory=dict)  # rows of the pool, by the loop's own caches


class PassBatcher:
    """Runs loops side by side. They may join and leave between forward passes, and do not influence each other."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = BatchedDenoiser(denoiser)
        self.loops: list[Loop] = []
        self.pool = KVPool(denoiser)
        self.passes = 0

    def join(self, work: Callable[[], None]) -> Loop:
        """Start a loop and run it up to its first call. What it raises is raised here, or later by `advance`."""
        loop = Loop(greenlet(work))
        self.loops.append(loop)
        self._resume(loop)
        return loop

    def leave(self, loop: Loop) -> None:
        """Abort a loop."""
        if loop in self.loops:
            loop.greenlet.throw()
            self._remove(loop)

    def advance(self) -> None:
        """Run one forward pass for every loop. A loop has to catch its own errors: what it raises is raised here."""
        for group in _groups([loop for loop in self.loops if isinstance(loop.pending, _BodyCall)]):
            self._run_body(group)
        while waiting := [loop for loop in self.loops if isinstance(loop.pending, _HeadCall)]:
            self._run_head(_head_batch(waiting))

    def _run_body(self, loops: list[Loop]) -> None:
        calls = [loop.pending for loop in loops if isinstance(loop.pending, _BodyCall)]
        width = self._prepare_pool(loops, calls)
        past = None if width is None else self.pool
        inputs = BatchedInputs.from_inputs(tuple(call.inputs for call in calls), width)
        index = torch.cat(list(_batched_index(calls, inputs.tokens.shape[1])))
        self.passes += 1
        self.denoiser.last_texts = sum(call.texts for call in calls)
        try:
            hidden = Denoiser.hidden_states(self.denoiser, inputs, index, past=past)
        except Exception as error:
            for loop in loops:
                self._resume(loop, error=error)
            return
        for loop, call in zip(loops, calls, strict=True):
            if call.past is not None and len(call.inputs.tokens) < call.texts:
                self.pool.copy_first(loop.rows[call.past])
        for loop, result in zip(loops, hidden.split([len(call.index) for call in calls]), strict=True):
            self._resume(loop, result)

    def _prepare_pool(self, loops: list[Loop], calls: list[_BodyCall]) -> int | None:
        """Select the pool's rows for the next pass; its number of key columns, or None if no loop has a cache."""
        pasts, rows = [call.past for call in calls if call.past is not None], []
        if not pasts:
            return None
        for loop, call, past in zip(loops, calls, pasts, strict=True):
            if past not in loop.rows:
                loop.rows[past] = self.pool.allocate(len(past.columns), past.n)
            mine = loop.rows[past] if past.kept is None else [loop.rows[past][row] for row in past.kept]
            rows.append(mine[: len(call.inputs.tokens)])
        return self.pool.prepare(rows, pasts)

    def _run_head(self, loops: list[Loop]) -> None:
        hidden = [loop.pending.hidden for loop in loops if isinstance(loop.pending, _HeadCall)]
        logits = Denoiser.project(self.denoiser.resizing, torch.cat(hidden))
        for loop, result in zip(loops, logits.split([len(each) for each in hidden]), strict=True):
            self._resume(loop, result)

    def _resume(self, loop: Loop, result: Tensor | None = None, *, error: Exception | None = None) -> None:
        """Return a result to a loop, and keep its next call."""
        call = loop.greenlet.throw(error) if error else loop.greenlet.switch(*[] if result is None else [result])
        loop.pending = call if isinstance(call, _BodyCall | _HeadCall) else None
        if loop.greenlet.dead:
            self._remove(loop)

    def _remove(self, loop: Loop) -> None:
        self.loops.remove(loop)
        for rows in loop.rows.values():
            self.pool.free(rows)


def _groups(loops: list[Loop]) -> Iterator[list[Loop]]:
    """Groups of loops for one forward pass each: all with a cache or all without, none over twice as long as another.

    Padding costs as much as text.
    """
    for cached in (False, True):
        group: list[Loop] = []
        calls = [(loop, loop.pending) for loop in loops if isinstance(loop.pending, _BodyCall)]
        lengths = [(loop, call.inputs.tokens.shape[1]) for loop, call in calls if (call.past is not None) == cached]
        longest = 0
        for loop, m in sorted(lengths, key=lambda pair: -pair[1]):
            if group and 2 * m < longest:
                yield group
                group = []
            longest = longest if group else m
            group.append(loop)
        if group:
            yield group


def _head_batch(loops: list[Loop]) -> list[Loop]:
    """The first loops that have at most `CHUNK_SIZE` positions together, at least one loop."""
    chosen, positions = [], 0
    for loop in loops:
        assert isinstance(loop.pending, _HeadCall)
        positions += len(loop.pending.hidden)
        if chosen and positions > CHUNK_SIZE:
            break
        chosen.append(loop)
    return chosen


def _batched_index(calls: list[_BodyCall], m: int) -> Iterator[Int[Tensor, " k"]]:
    """The output index of each call, in a batch of all their rows padded to length m."""
    first_row = 0
    for call in calls:
        b, length = call.inputs.tokens.shape
        yield (call.index // length + first_row) * m + call.index % length
        first_row += b
