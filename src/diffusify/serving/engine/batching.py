"""Many loops, one network: each writes as if it were alone, and what they ask of the network is run together.

Axes: k positions that are answered, d hidden size, v vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from diffusify.diffusion.attention import AttentionInputs, BatchedInputs
from diffusify.diffusion.logits import TOGETHER
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.kv_cache import ColumnCache
from diffusify.serving.engine.kv_pool import KVPool


@dataclass(frozen=True)
class _Pass:
    """A loop waits for what the network's body makes of a scene."""

    inputs: AttentionInputs
    index: Tensor
    past: ColumnCache | None


@dataclass(frozen=True)
class _Projection:
    """A loop waits for the logits of hidden states."""

    hidden: Tensor


class BatchedDenoiser(Denoiser):
    """A denoiser for loops that `PassBatcher` runs: a loop that asks it anything waits there until all others ask too."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.network, denoiser.diffusion_config)
        self.length_head = denoiser.length_head

    def hidden_states(
        self, inputs: AttentionInputs, index: Int[Tensor, " k"], *, past: Cache | None = None
    ) -> Float[Tensor, "k d"]:
        assert past is None or isinstance(past, ColumnCache)
        return _wait(_Pass(inputs, index, past))

    def _head(self, hidden: Float[Tensor, "k d"]) -> Float[Tensor, "k v"]:
        return _wait(_Projection(hidden))


def _wait(ask: _Pass | _Projection) -> Any:
    outside = getcurrent().parent
    assert outside is not None, "a batched denoiser is asked by loops only"
    return outside.switch(ask)


@dataclass(eq=False)
class Loop:
    """A piece of work that asks a `BatchedDenoiser` denoiser."""

    run: greenlet
    ask: _Pass | _Projection | None = None
    rows: dict[ColumnCache, list[int]] = field(default_factory=dict)  # of the pool, by who keeps something there


class PassBatcher:
    """Loops side by side: they join and leave between passes, and none knows of the others."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = BatchedDenoiser(denoiser)
        self.loops: list[Loop] = []
        self.pool = KVPool(denoiser)
        self.passes = 0

    def join(self, work: Callable[[], None]) -> Loop:
        """Begin some work, up to its first question. What it raises is raised here, or from `advance`."""
        loop = Loop(greenlet(work))
        self.loops.append(loop)
        self._go_on(loop)
        return loop

    def leave(self, loop: Loop) -> None:
        """Give some work up."""
        if loop in self.loops:
            loop.run.throw()
            self._gone(loop)

    def advance(self) -> None:
        """One pass for every loop. Work that fails does so by itself: whoever began it has to catch."""
        for group in _alike([loop for loop in self.loops if isinstance(loop.ask, _Pass)]):
            self._pass(group)
        while waiting := [loop for loop in self.loops if isinstance(loop.ask, _Projection)]:
            self._project(_first(waiting))

    def _pass(self, loops: list[Loop]) -> None:
        asks = [loop.ask for loop in loops if isinstance(loop.ask, _Pass)]
        width = self._turn(loops, asks)
        past = None if width is None else self.pool
        inputs = BatchedInputs.of(tuple(ask.inputs for ask in asks), width)
        index = torch.cat(list(_places(asks, inputs.tokens.shape[1])))
        self.passes += 1
        try:
            hidden = Denoiser.hidden_states(self.denoiser, inputs, index, past=past)
        except Exception as error:
            for loop in loops:
                self._go_on(loop, error=error)
            return
        for loop, told in zip(loops, hidden.split([len(ask.index) for ask in asks]), strict=True):
            self._go_on(loop, told)

    def _turn(self, loops: list[Loop], asks: list[_Pass]) -> int | None:
        """Let the pool know whose pass comes; how many columns it looks at, None where nobody keeps anything."""
        pasts, rows = [ask.past for ask in asks if ask.past is not None], []
        if not pasts:
            return None
        for loop, past in zip(loops, pasts, strict=True):
            if past not in loop.rows:
                loop.rows[past] = self.pool.take(len(past.columns), past.n)
            rows += loop.rows[past]
        return self.pool.turn(rows, pasts)

    def _project(self, loops: list[Loop]) -> None:
        hidden = [loop.ask.hidden for loop in loops if isinstance(loop.ask, _Projection)]
        logits = Denoiser._head(self.denoiser, torch.cat(hidden))
        for loop, told in zip(loops, logits.split([len(each) for each in hidden]), strict=True):
            self._go_on(loop, told)

    def _go_on(self, loop: Loop, told: Tensor | None = None, *, error: Exception | None = None) -> None:
        """Let a loop have its answer, and take down what it asks next."""
        asked = loop.run.throw(error) if error else loop.run.switch(*[] if told is None else [told])
        loop.ask = asked if isinstance(asked, _Pass | _Projection) else None
        if loop.run.dead:
            self._gone(loop)

    def _gone(self, loop: Loop) -> None:
        self.loops.remove(loop)
        for rows in loop.rows.values():
            self.pool.free(rows)


def _alike(loops: list[Loop]) -> Iterator[list[Loop]]:
    """Loops whose scenes go well together: none is more than twice as long as another, or remembers where it does not.

    Padding costs as much as text.
    """
    for remembers in (False, True):
        group: list[Loop] = []
        asks = [(loop, loop.ask) for loop in loops if isinstance(loop.ask, _Pass)]
        some = [(loop, ask.inputs.tokens.shape[1]) for loop, ask in asks if (ask.past is not None) == remembers]
        longest = 0
        for loop, m in sorted(some, key=lambda pair: -pair[1]):
            if group and 2 * m < longest:
                yield group
                group = []
            longest = longest if group else m
            group.append(loop)
        if group:
            yield group


def _first(loops: list[Loop]) -> list[Loop]:
    """As many as make `TOGETHER` positions, one at least."""
    chosen, positions = [], 0
    for loop in loops:
        assert isinstance(loop.ask, _Projection)
        positions += len(loop.ask.hidden)
        if chosen and positions > TOGETHER:
            break
        chosen.append(loop)
    return chosen


def _places(asks: list[_Pass], m: int) -> Iterator[Int[Tensor, " k"]]:
    """Where each scene's wanted outputs stand when all scenes are rows of length m."""
    above = 0
    for ask in asks:
        b, own = ask.inputs.tokens.shape
        yield (ask.index // own + above) * m + ask.index % own
        above += b
