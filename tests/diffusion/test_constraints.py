"""Constrained decoding against an enumeration of all texts."""

from array import array
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from diffusify.canvas import Canvas, Guess
from diffusify.diffusion.constraints import Automaton, Constraint

LETTERS, END, MAX_LENGTH = 3, 3, 5  # tokens 0, 1, 2, and the end token, if there is one
STATES = 4

transitions = st.dictionaries(
    st.integers(0, STATES - 1), st.dictionaries(st.integers(0, LETTERS - 1), st.integers(0, STATES - 1)), min_size=1
)
automata = st.builds(
    lambda targets, final: make_automaton(targets, final), transitions, st.sets(st.integers(0, STATES - 1), min_size=1)
)
cells = st.lists(st.none() | st.integers(0, LETTERS), min_size=1, max_size=MAX_LENGTH)


def make_automaton(targets: dict[int, dict[int, int]], final: set[int]) -> Automaton:
    """An automaton from `targets[state][token]`, the next state."""
    edges = {state: sorted(each.items()) for state, each in targets.items()}
    return Automaton(
        {s: (array("i", [t for t, _ in e]), array("q", [q for _, q in e])) for s, e in edges.items()}, 0, final
    )


def accepts(automaton: Automaton, text: tuple[int, ...], ends: bool) -> bool:
    """Whether the automaton accepts the text, up to its end token if `ends`."""
    state: int | None = automaton.start
    for token in text:
        if token == END:
            return ends and state in automaton.final
        state = automaton.target(state, token)
        if state is None:
            return False
    return state in automaton.final


def accepted_texts(automaton: Automaton, given: list[int | None], ends: bool) -> list[tuple[int, ...]]:
    """All accepted texts that have the given tokens."""
    candidates = product(*[[cell] if cell is not None else range(LETTERS + ends) for cell in given])
    return [text for text in candidates if accepts(automaton, text, ends)]


def canvas_of(given: list[int | None]) -> Canvas:
    """A canvas with the given cells between two tokens that are not editable."""
    canvas = Canvas.from_tokens([[7, *given, 7]], noise=9, pad=0)
    editable = canvas.editable.clone()
    editable[:, 1:-1] = True
    return Canvas(canvas.tokens, canvas.open, editable, canvas.document)


@given(automata, cells, st.booleans())
def test_token_is_allowed_if_some_accepted_text_has_it(
    automaton: Automaton, given: list[int | None], ends: bool
) -> None:
    constraint, canvas = Constraint(automaton, END if ends else None), canvas_of(given)
    possible = accepted_texts(automaton, given, ends)
    if not possible:
        with pytest.raises(ValueError, match="the masked span has"):
            constraint.check(canvas)
        return
    constraint.check(canvas)
    assume(canvas.open.any())
    masks = constraint.allowed_tokens(canvas, canvas.open)(torch.arange(int(canvas.open.sum())), LETTERS + 1)
    open = [i for i, cell in enumerate(given) if cell is None]
    for i, mask in zip(open, masks, strict=True):
        assert {t for t in range(LETTERS + ends) if mask[t]} == {text[i] for text in possible}


@given(automata, cells, st.booleans(), st.data())
def test_tokens_written_together_are_consistent(
    automaton: Automaton, given: list[int | None], ends: bool, data: st.DataObject
) -> None:
    """For any guesses, written in any order, decoding ends with an accepted text."""
    constraint, canvas = Constraint(automaton, END if ends else None), canvas_of(given)
    possible = accepted_texts(automaton, given, ends)
    assume(possible)
    while canvas.open.any():
        open = canvas.open.nonzero()[:, 1].tolist()
        masks = constraint.allowed_tokens(canvas, canvas.open)(torch.arange(len(open)), LETTERS + 1)
        tokens, score = canvas.tokens.clone(), torch.full(canvas.tokens.shape, -torch.inf)
        for position, mask in zip(open, masks, strict=True):
            tokens[0, position] = data.draw(st.sampled_from(mask.nonzero().flatten().tolist()))
            score[0, position] = data.draw(st.floats(-9, 0, width=32))
        write = torch.zeros_like(canvas.open)
        write[0, data.draw(st.lists(st.sampled_from(open), min_size=1))] = True
        kept = constraint.consistent_writes(canvas, write, Guess(tokens, score))
        assert kept.any() and not (kept & ~write).any()
        canvas = Canvas(torch.where(kept, tokens, canvas.tokens), canvas.open & ~kept, canvas.editable, canvas.document)
        written = {i - 1: int(tokens[0, i]) for i in kept[0].nonzero().flatten().tolist()}
        possible = [text for text in possible if all(text[i] == token for i, token in written.items())]
        assert possible
    assert accepts(automaton, tuple(canvas.tokens[0, 1:-1].tolist()), ends)


@given(automata)
def test_shortest_length(automaton: Automaton) -> None:
    lengths = [n for n in range(STATES + 1) if any(accepts(automaton, t, False) for t in product(range(3), repeat=n))]
    assert automaton.shortest_length == (min(lengths) if lengths else None)


def test_most_confident_token_is_written_first() -> None:
    """Of two tokens that exclude each other, the less confident one stays open."""
    equal_pairs = make_automaton({0: {0: 1, 1: 2}, 1: {0: 3}, 2: {1: 3}}, {3})
    canvas = canvas_of([None, None])
    guess = Guess(torch.tensor([[7, 0, 1, 7]]), torch.tensor([[0.0, -2.0, -1.0, 0.0]]))
    kept = Constraint(equal_pairs).consistent_writes(canvas, canvas.open, guess)
    assert kept.tolist() == [[False, False, True, False]]
