"""Texts of a given form: what may be written where, so that the whole can still come out right, in any order.

Axes: b texts, n positions, k asked positions (row by row), v vocabulary.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess

_ENDED = -1  # the state behind an end token: what follows is void
States = frozenset[int]
Cells = list[int | None]  # token ids; None is still open
_NONE = (array("i"), array("q"))


class Automaton:
    """Which sequences of tokens are allowed: a deterministic automaton.

    `edges` of each state are the tokens that it allows, in order, and the states that they lead to.
    """

    def __init__(self, edges: Mapping[int, tuple[array, array]], start: int, final: set[int]) -> None:
        self.edges, self.start, self.final = edges, start, frozenset(final)
        self.targets = {state: frozenset(targets) for state, (_, targets) in edges.items()}
        self._exactly, self._within = [self.final], [self.final]
        self._between = lru_cache(4096)(self._sorted)

    def target(self, state: int, token: int) -> int | None:
        """Where a token leads."""
        tokens, targets = self.edges.get(state, _NONE)
        at = bisect_left(tokens, token)
        return targets[at] if at < len(tokens) and tokens[at] == token else None

    def exactly(self, tokens: int) -> States:
        """The states from which so many tokens can make an allowed text."""
        while len(self._exactly) <= tokens:
            self._exactly.append(self._before(self._exactly[-1]))
        return self._exactly[tokens]

    def within(self, tokens: int) -> States:
        """The states from which so many tokens, or fewer, can make an allowed text."""
        while len(self._within) <= tokens and (len(self._within) < 2 or self._within[-1] != self._within[-2]):
            self._within.append(self._within[-1] | self._before(self._within[-1]))
        return self._within[min(tokens, len(self._within) - 1)]

    @property
    def shortest(self) -> int | None:
        """How many tokens an allowed text has at least; None if none is allowed."""
        all_states = self.within(len(self.edges) + 1)
        if self.start not in all_states:
            return None
        return next(tokens for tokens, states in enumerate(self._within) if self.start in states)

    def tokens(self, state: int, target: int) -> Int[Tensor, " t"]:
        """What leads from a state to another."""
        return self._between(state)[target]

    def _before(self, states: States) -> States:
        return frozenset(state for state, targets in self.targets.items() if not targets.isdisjoint(states))

    def _sorted(self, state: int) -> dict[int, Tensor]:
        tokens, targets = (torch.tensor(side) for side in self.edges[state])
        return {target: tokens[targets == target] for target in self.targets[state]}


@dataclass(frozen=True, eq=False)
class Constraint:
    """Every run of editable positions is to be a text that the automaton allows.

    With an `end_token_id` the text may be shorter than its room, and ends with that token. A token is allowed where
    some whole text has it, together with all that is written already; of what is to be written in one step, the surest
    tokens come first, and what no longer goes together with them stays open. So every finished text is allowed,
    whatever the order (compare DINGO, 2505.23061, and the rejections of 2508.10111).
    """

    automaton: Automaton
    end_token_id: int | None = None

    def check(self, canvas: Canvas) -> None:
        """ValueError unless there is room in every run for some allowed text."""
        for row, run in _runs(canvas):
            if self._ways(_cells(canvas, row, run)) is None:
                least = self.automaton.shortest
                need = "no text at all" if least is None else f"texts of {least} tokens or more"
                raise ValueError(f"what is to be written has room for {len(run)} tokens, but its form allows {need}")

    def allowed(self, canvas: Canvas, asked: Bool[Tensor, "b n"]) -> Callable[[Tensor, int], Tensor]:
        """For some of the asked positions (numbers of k): which of so many tokens may be written there alone."""
        ways: dict[tuple[int, int], tuple[States, States]] = {}
        for row, run in _runs(canvas):
            states = self._ways(_cells(canvas, row, run), _last(asked[row], run)) or []
            ways |= {(row, at): pair for at, pair in zip(run, states, strict=False)}
        places = asked.nonzero().tolist()

        def masks(index: Int[Tensor, " k"], v: int) -> Bool[Tensor, "k v"]:
            made = torch.zeros(len(index), v, dtype=torch.bool)
            for mask, i in zip(made, index.tolist(), strict=True):
                self._fill(mask, *ways[places[i][0], places[i][1]])
            return made.to(asked.device)

        return masks

    def agreed(self, canvas: Canvas, write: Bool[Tensor, "b n"], guess: Guess) -> Bool[Tensor, "b n"]:
        """What of a move goes together."""
        kept = write.clone()
        for row, run in _runs(canvas):
            chosen = [i for i, at in enumerate(run) if write[row, at]]
            cells, tokens, score = _cells(canvas, row, run), guess.tokens[row].tolist(), guess.score[row].tolist()
            last = max(chosen, default=-1) + 1
            both = [tokens[at] if i in chosen else cell for i, (at, cell) in enumerate(zip(run, cells, strict=True))]
            if not chosen or self._ways(both, last) is not None:
                continue
            for i in sorted(chosen, key=lambda i, run=run, score=score: -score[run[i]]):
                cells[i] = tokens[run[i]]
                if self._ways(cells, last) is None:
                    cells[i] = None
                    kept[row, run[i]] = False
        return kept

    def _ways(self, cells: Cells, last: int = 0) -> list[tuple[States, States]] | None:
        """Before and behind each cell, the states that some allowed text passes through; None if there is no such text.

        Cells behind the `last` and all that is written are left out.
        """
        last = max(last, *(i + 1 for i, cell in enumerate(cells) if cell is not None), 0)
        ahead = [frozenset({self.automaton.start})]
        for cell in cells[:last]:
            ahead.append(frozenset(target for state in ahead[-1] for target in self._next(state, cell)))
        left = len(cells) - last
        enough = self.automaton.exactly(left) if self.end_token_id is None else self.automaton.within(left) | {_ENDED}
        passed = [ahead[-1] & enough]
        for cell, states in zip(reversed(cells[:last]), reversed(ahead[:-1]), strict=True):
            behind = passed[-1]
            passed.append(frozenset(state for state in states if not self._next(state, cell).isdisjoint(behind)))
        passed.reverse()
        return list(pairwise(passed)) if passed[0] else None

    def _next(self, state: int, cell: int | None) -> States:
        """Where a token leads, or any token."""
        if state == _ENDED:
            return frozenset({_ENDED})
        may_end = self.end_token_id is not None and state in self.automaton.final
        if cell is None:
            return self.automaton.targets.get(state, frozenset()) | ({_ENDED} if may_end else set())
        if cell == self.end_token_id:
            return frozenset({_ENDED}) if may_end else frozenset()
        target = self.automaton.target(state, cell)
        return frozenset() if target is None else frozenset({target})

    def _fill(self, mask: Bool[Tensor, " v"], before: States, behind: States) -> None:
        """Mark what leads from the ones to the others."""
        if _ENDED in before:
            mask.fill_(True)
        for state in before - {_ENDED}:
            for target in self.automaton.targets.get(state, frozenset()) & behind:
                mask[self.automaton.tokens(state, target)] = True
            if self.end_token_id is not None and _ENDED in behind and state in self.automaton.final:
                mask[self.end_token_id] = True


def _runs(canvas: Canvas) -> list[tuple[int, list[int]]]:
    """Each row's runs of editable positions."""
    return [
        (row, [at for at, _ in run])
        for row, flags in enumerate(canvas.editable.tolist())
        for editable, run in groupby(enumerate(flags), key=lambda pair: pair[1])
        if editable
    ]


def _cells(canvas: Canvas, row: int, run: list[int]) -> Cells:
    tokens, open = canvas.tokens[row, run[0] : run[-1] + 1].tolist(), canvas.open[row, run[0] : run[-1] + 1].tolist()
    return [None if is_open else token for token, is_open in zip(tokens, open, strict=True)]


def _last(asked: Bool[Tensor, " n"], run: list[int]) -> int:
    """How much of a run lies up to its last asked position."""
    places = asked[run[0] : run[-1] + 1].nonzero()
    return int(places[-1]) + 1 if len(places) else 0
