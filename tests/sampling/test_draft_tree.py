"""The tree of drafts against the enumeration of all continuations."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.sampling.draft_tree import DraftTree


def drafts(seed: int, b: int, ahead: int, v: int) -> torch.Tensor:
    return 3 * torch.randn(b, ahead, v, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(2, 5), st.integers(1, 12))
def test_the_likeliest_drafts_are_those_of_the_enumeration(seed: int, b: int, ahead: int, v: int, count: int) -> None:
    logits = drafts(seed, b, ahead, v)
    tree = DraftTree.likeliest(logits, count)
    likely = logits.softmax(-1)
    for row in range(b):
        every = sorted(
            (
                (0.999**depth * float(torch.stack([likely[row, i, t] for i, t in enumerate(path)]).prod()), path)
                for depth in range(1, ahead + 1)
                for path in product(range(v), repeat=depth)
            ),
            reverse=True,
        )[:count]
        made = [tuple(t for t in path if t >= 0) for path in tree.path[row].tolist()]
        assert made[0] == () and len(set(made)) == len(made)
        assert set(made[1:]) == {path for _, path in every}
        expected = torch.tensor([1.0, *(chance for chance, _ in every)])
        torch.testing.assert_close(tree.chance[row].sort(descending=True).values, expected)
        for i, path in enumerate(made):
            assert tree.along[row, i].tolist() == [path[: len(other)] == other for other in made]
            assert tree.depth[row, i] == len(path)
            assert made[int(tree.parent[row, i])] == path[:-1]
            if path:
                assert tree.token[row, i] == path[-1]


def test_where_nothing_is_drafted_nothing_is_tried() -> None:
    logits = drafts(0, 1, 3, 9)
    logits[:, 1:] = -torch.inf
    tree = DraftTree.likeliest(logits, 12)
    tried = tree.chance[0] > 0
    assert tried.sum() == 10  # the root, and every token at the first place
    assert (tree.depth[0, tried] <= 1).all()
    right = torch.ones_like(tried)[None]
    assert tried[tree.furthest(right, torch.zeros(right.shape))].all()


def test_the_text_goes_on_from_the_last_right_draft() -> None:
    """Of two ways that are right as far, the likelier; a right token behind a wrong one does not count."""
    path = [[-1, -1, -1], [4, -1, -1], [5, -1, -1], [4, 6, -1], [5, 7, -1], [5, 8, -1]]
    tree = DraftTree(torch.tensor([path]), torch.tensor([[1.0, 0.5, 0.3, 0.2, 0.1, 0.1]]))
    likely = torch.tensor([[0.0, -1.0, -2.0, -1.0, -0.5, -0.1]])

    def furthest(*right: int) -> int:
        return int(tree.furthest(torch.tensor([[i in (0, *right) for i in range(6)]]), likely))

    assert furthest() == 0
    assert furthest(3, 4) == 0
    assert furthest(1, 2) == 1
    assert furthest(2, 4) == 4
    assert furthest(2, 4, 5) == 5
    assert furthest(1, 2, 3, 4, 5) == 3


@pytest.mark.parametrize("count", [1, 4, 30])
def test_masks_stand_where_the_text_is_likely_to_stand(count: int) -> None:
    tree = DraftTree.likeliest(drafts(3, 2, 3, 9), 5)
    owner, turn = tree.masks(count)
    assert owner.shape == (2, min(count, 6 * 3))
    stays = tree.chance.clone()
    for row in range(2):
        for place in range(1, 6):
            stays[row, tree.parent[row, place]] -= tree.chance[row, place]
        slots = list(zip(owner[row].tolist(), turn[row].tolist(), strict=True))
        assert len(set(slots)) == len(slots)
        assert slots[0] == (int(stays[row].argmax()), 0)
        for place, ahead in slots:
            assert ahead == 0 or (place, ahead - 1) in slots  # no mask without those before it
