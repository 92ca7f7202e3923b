"""Constrained decoding in any order: which tokens open positions may have, so that the text satisfies an automaton.

Axes: b texts, n positions, k selected positions (row by row), v vocabulary.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess

_ENDED = -1  # the state after an end token, in which every token is allowed
States = frozenset[int]
Cells = list[int | None]  # token ids; None is still open
_NO_EDGES = (array("i"), array("q"))


class Automaton:
    """A deterministic finite automaton over token ids; it accepts the allowed texts.

    `edges` maps a state to the tokens that it allows, in ascending order, and the states that they lead to.
    """

    def __init__(self, edges: Mapping[int, tuple[array, array]], start: int, final: set[int]) -> None:
        self.edges, self.start, self.final = edges, start, frozenset(final)
        self.targets = {state: frozenset(targets) for state, (_, targets) in edges.items()}
        self._exactly, self._within = [self.final], [self.final]
        self._tokens_by_target = lru_cache(4096)(self._group_tokens)

    def target(self, state: int, token: int) -> int | None:
        """The state that a token leads to; None if the token is not allowed."""
        tokens, targets = self.edges.get(state, _NO_EDGES)
        i = bisect_left(tokens, token)
        return targets[i] if i < len(tokens) and tokens[i] == token else None

    def accepts_after(self, length: int) -> States:
        """The states from which exactly `length` tokens can reach a final state."""
        while len(self._exactly) <= length:
            self._exactly.append(self._predecessors(self._exactly[-1]))
        return self._exactly[length]

    def accepts_within(self, length: int) -> States:
        """The states from which at most `length` tokens can reach a final state."""
        while len(self._within) <= length and (len(self._within) < 2 or self._within[-1] != self._within[-2]):
            self._within.append(self._within[-1] | self._predecessors(self._within[-1]))
        return self._within[min(length, len(self._within) - 1)]

    def without(self, tokens: Collection[int]) -> "Automaton":
        """The automaton of the accepted texts that have none of these tokens."""
        edges, tokens = {}, frozenset(tokens)
        for state, (allowed, targets) in self.edges.items():
            kept = [i for i, token in enumerate(allowed) if token not in tokens]
            edges[state] = (array("i", [allowed[i] for i in kept]), array("q", [targets[i] for i in kept]))
        return Automaton(edges, self.start, set(self.final))

    @property
    def shortest_length(self) -> int | None:
        """The number of tokens of the shortest accepted text; None if no text is accepted."""
        states = self.accepts_within(len(self.edges) + 1)
        if self.start not in states:
            return None
        return next(length for length, states in enumerate(self._within) if self.start in states)

    def tokens_between(self, state: int, target: int) -> Int[Tensor, " t"]:
        """The tokens that lead from a state to a target."""
        return self._tokens_by_target(state)[target]

    def _predecessors(self, states: States) -> States:
        return frozenset(state for state, targets in self.targets.items() if not targets.isdisjoint(states))

    def _group_tokens(self, state: int) -> dict[int, Tensor]:
        tokens, targets = (torch.tensor(side) for side in self.edges[state])
        return {target: tokens[targets == target] for target in self.targets[state]}


@dataclass(frozen=True, eq=False)
class Constraint:
    """The constraint that every run of editable positions is a text that the automaton accepts.

    With an `end_token_id` the text may be shorter than its run, and ends with that token. A token is allowed if some
    accepted text contains it and all tokens decided so far. The guesses of one step are written in order of confidence,
    and a guess that is inconsistent with those before it stays open. So every finished text is accepted, in any
    decoding order (compare DINGO, 2505.23061, and rejection sampling, 2508.10111).
    """

    automaton: Automaton
    end_token_id: int | None = None

    def check(self, canvas: Canvas) -> None:
        """Check that every run can still become an accepted text. Raises ValueError otherwise."""
        for _, run, cells in _editable_runs(canvas):
            if self._possible_states(cells) is None:
                shortest = self.automaton.shortest_length
                accepted = "no text at all" if shortest is None else f"texts of {shortest} tokens or more"
                if shortest is not None and shortest <= len(run):
                    accepted = "no text of exactly that length"
                raise ValueError(
                    f"the masked span has {len(run)} tokens, but its constraint allows {accepted}; "
                    "change its length, or the regular expression or schema"
                )

    def possible_rows(self, canvas: Canvas) -> Bool[Tensor, " b"]:
        """The rows whose decided tokens are those of some accepted text."""
        possible = [True] * len(canvas.tokens)
        for row, _, cells in _editable_runs(canvas):
            possible[row] &= self._possible_states(cells) is not None
        return torch.tensor(possible, dtype=torch.bool, device=canvas.tokens.device)

    def allowed_tokens(self, canvas: Canvas, positions: Bool[Tensor, "b n"]) -> Callable[[Tensor, int], Tensor]:
        """A function (index, v) -> mask [len(index), v] of the tokens that each position may have by itself.

        `index` counts the selected positions, row by row.
        """
        possible: dict[tuple[int, int], tuple[States, States]] = {}
        selected = positions.tolist()
        for row, run, cells in _editable_runs(canvas):
            length = max((i + 1 for i, position in enumerate(run) if selected[row][position]), default=0)
            states = self._possible_states(cells, length) or []
            possible |= {(row, position): pair for position, pair in zip(run, states, strict=False)}
        places = positions.nonzero().tolist()

        def masks(index: Int[Tensor, " k"], v: int) -> Bool[Tensor, "k v"]:
            allowed = torch.zeros(len(index), v, dtype=torch.bool)
            for mask, i in zip(allowed, index.tolist(), strict=True):
                self._allow(mask, *possible[places[i][0], places[i][1]])
            return allowed.to(positions.device)

        return masks

    def consistent_writes(self, canvas: Canvas, write: Bool[Tensor, "b n"], guess: Guess) -> Bool[Tensor, "b n"]:
        """The positions of `write` whose guesses are consistent with each other, the most confident first."""
        kept = write.tolist()
        all_tokens, all_scores = guess.tokens.tolist(), guess.score.tolist()
        for row, run, cells in _editable_runs(canvas):
            chosen = [i for i, position in enumerate(run) if kept[row][position]]
            tokens, score, length = all_tokens[row], all_scores[row], max(chosen, default=-1) + 1
            together = [tokens[run[i]] if i in chosen else cell for i, cell in enumerate(cells)]
            if not chosen or self._possible_states(together, length) is not None:
                continue
            for i in sorted(chosen, key=lambda i, run=run, score=score: -score[run[i]]):
                cells[i] = tokens[run[i]]
                if self._possible_states(cells, length) is None:
                    cells[i] = None
                    kept[row][run[i]] = False
        return torch.tensor(kept, dtype=torch.bool, device=write.device)

    def _possible_states(self, cells: Cells, length: int = 0) -> list[tuple[States, States]] | None:
        """The states before and after each cell in accepted texts; None if no accepted text has these tokens.

        Open cells after the first `length` cells and after the last decided one are left out.
        """
        length = max(length, *(i + 1 for i, cell in enumerate(cells) if cell is not None), 0)
        forward = [frozenset({self.automaton.start})]
        for cell in cells[:length]:
            forward.append(frozenset(target for state in forward[-1] for target in self._next(state, cell)))
        rest = len(cells) - length
        if self.end_token_id is None:
            accepting = self.automaton.accepts_after(rest)
        else:
            accepting = self.automaton.accepts_within(rest) | {_ENDED}
        possible = [forward[-1] & accepting]
        for cell, states in zip(reversed(cells[:length]), reversed(forward[:-1]), strict=True):
            after = possible[-1]
            possible.append(frozenset(state for state in states if not self._next(state, cell).isdisjoint(after)))
        possible.reverse()
        return list(pairwise(possible)) if possible[0] else None

    def _next(self, state: int, cell: int | None) -> States:
        """The states that a token, or any token if the cell is open, leads to."""
        if state == _ENDED:
            return frozenset({_ENDED})
        may_end = self.end_token_id is not None and state in self.automaton.final
        if cell is None:
            return self.automaton.targets.get(state, frozenset()) | ({_ENDED} if may_end else set())
        if cell == self.end_token_id:
            return frozenset({_ENDED}) if may_end else frozenset()
        target = self.automaton.target(state, cell)
        return frozenset() if target is None else frozenset({target})

    def _allow(self, mask: Bool[Tensor, " v"], before: States, after: States) -> None:
        """Set the mask for all tokens that lead from a state in `before` to one in `after`."""
        if _ENDED in before:
            mask.fill_(True)
        for state in before - {_ENDED}:
            for target in self.automaton.targets.get(state, frozenset()) & after:
                mask[self.automaton.tokens_between(state, target)] = True
            if self.end_token_id is not None and _ENDED in after and state in self.automaton.final:
                mask[self.end_token_id] = True


def _editable_runs(canvas: Canvas) -> Iterator[tuple[int, list[int], Cells]]:
    """The runs of consecutive editable positions, each with its row and its cells."""
    tokens, open = canvas.tokens.tolist(), canvas.open.tolist()
    for row, flags in enumerate(canvas.editable.tolist()):
        for editable, pairs in groupby(enumerate(flags), key=lambda pair: pair[1]):
            if editable:
                run = [position for position, _ in pairs]
                yield row, run, [None if open[row][position] else tokens[row][position] for position in run]
