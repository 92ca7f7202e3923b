"""The draft tree, compared with an enumeration of all continuations."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusify.sampling.draft_tree import DraftTree
from diffusify.sampling.drafts import Drafts


def draft_logits(seed: int, b: int, ahead: int, v: int) -> torch.Tensor:
    return 3 * torch.randn(b, ahead, v, generator=torch.Generator().manual_seed(seed))


def tree_of(logits: torch.Tensor, count: int, **settings) -> DraftTree:
    """The tree of drafted logits alone."""
    b, ahead, _ = logits.shape
    nothing = torch.zeros(b, 0, dtype=torch.long), torch.zeros(b, 0)
    return DraftTree.from_drafts(Drafts.from_logits(logits, count), *nothing, count, ahead + 1, **settings)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(2, 5), st.integers(1, 12))
def test_the_tree_holds_the_most_likely_paths(seed: int, b: int, ahead: int, v: int, count: int) -> None:
    logits = draft_logits(seed, b, ahead, v)
    tree = tree_of(logits, count)
    probs = logits.softmax(-1)
    for row in range(b):
        expected = sorted(
            (
                (0.999**depth * float(torch.stack([probs[row, i, t] for i, t in enumerate(path)]).prod()), path)
                for depth in range(1, ahead + 1)
                for path in product(range(v), repeat=depth)
            ),
            reverse=True,
        )[:count]
        paths = [tuple(t for t in path if t >= 0) for path in tree.path[row].tolist()]
        assert paths[0] == () and len(set(paths)) == len(paths)
        assert set(paths[1:]) == {path for _, path in expected}
        expected_probs = torch.tensor([1.0, *(prob for prob, _ in expected)])
        torch.testing.assert_close(tree.prob[row].sort(descending=True).values, expected_probs)
        for i, path in enumerate(paths):
            assert tree.ancestors[row, i].tolist() == [path[: len(other)] == other for other in paths]
            assert tree.depth[row, i] == len(path)
            assert paths[int(tree.parent[row, i])] == path[:-1]
            if path:
                assert tree.token[row, i] == path[-1]


def test_positions_without_drafts_get_no_nodes() -> None:
    logits = draft_logits(0, 1, 3, 9)
    logits[:, 1:] = -torch.inf
    tree = tree_of(logits, 12)
    used = tree.prob[0] > 0
    assert used.sum() == 10  # the root, and every token at depth 1
    assert (tree.depth[0, used] <= 1).all()
    accepted = torch.ones_like(used)[None]
    assert used[tree.last_accepted(accepted, torch.zeros(accepted.shape))].all()


def test_the_deepest_accepted_node_is_chosen() -> None:
    """Among equally deep nodes, that of the more likely path; an accepted node below a rejected one does not count."""
    path = [[-1, -1, -1], [4, -1, -1], [5, -1, -1], [4, 6, -1], [5, 7, -1], [5, 8, -1]]
    tree = DraftTree(torch.tensor([path]), torch.tensor([[1.0, 0.5, 0.3, 0.2, 0.1, 0.1]]))
    log_prob = torch.tensor([[0.0, -1.0, -2.0, -1.0, -0.5, -0.1]])

    def last_accepted(*accepted: int) -> int:
        return int(tree.last_accepted(torch.tensor([[i in (0, *accepted) for i in range(6)]]), log_prob))

    assert last_accepted() == 0
    assert last_accepted(3, 4) == 0
    assert last_accepted(1, 2) == 1
    assert last_accepted(2, 4) == 4
    assert last_accepted(2, 4, 5) == 5
    assert last_accepted(1, 2, 3, 4, 5) == 3
    log_prob[0, 5] = -torch.inf  # a token that its text does not allow says nothing about other paths
    assert last_accepted(2, 4) == 4


@pytest.mark.parametrize("count", [1, 4, 30])
def test_masks_follow_the_nodes_likely_to_be_accepted_last(count: int) -> None:
    tree = tree_of(draft_logits(3, 2, 3, 9), 5)
    node, offset, used = tree.place_masks(count, 3)
    assert used.all()
    assert node.shape == (2, min(count, 6 * 3))
    is_last = tree.prob.clone()
    for row in range(2):
        for child in range(1, 6):
            is_last[row, tree.parent[row, child]] -= tree.prob[row, child]
        slots = list(zip(node[row].tolist(), offset[row].tolist(), strict=True))
        assert len(set(slots)) == len(slots)
        assert slots[0] == (int(is_last[row].argmax()), 0)
        for mask_node, mask_offset in slots:
            assert mask_offset == 0 or (mask_node, mask_offset - 1) in slots  # no mask without those before it


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 12))
def test_a_position_gets_the_mask_of_the_nearest_node_on_the_path(seed: int, b: int, count: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    tree = tree_of(draft_logits(seed, b, 3, 4), 8)
    mask_node, mask_offset, used = tree.place_masks(count, 3)
    used = used & (torch.rand(used.shape, generator=rng) < 0.8)
    node = torch.randint(0, tree.path.shape[1], (b,), generator=rng)
    index, found = tree.find_masks(node, mask_node, mask_offset, used, 3)
    for row in range(b):
        path = [token for token in tree.path[row, node[row]].tolist() if token >= 0]
        for offset in range(3):
            candidates = {}
            for mask in range(mask_node.shape[1]):
                before = [token for token in tree.path[row, mask_node[row, mask]].tolist() if token >= 0]
                position = len(before) + int(mask_offset[row, mask])
                if used[row, mask] and path[: len(before)] == before and position == len(path) + offset:
                    candidates[len(before)] = mask
            assert bool(found[row, offset]) == bool(candidates)
            if candidates:
                assert int(index[row, offset]) == candidates[max(candidates)]


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 5), st.integers(1, 12))
def test_a_copied_path_joins_the_tree_once(seed: int, b: int, length: int, count: int) -> None:
    logits, rng = draft_logits(seed, b, 2, 3), torch.Generator().manual_seed(seed)
    copied = torch.randint(0, 3, (b, length), generator=rng)
    copied_prob = torch.rand(b, length, generator=rng).cumprod(1) * torch.randint(0, 2, (b, 1), generator=rng)
    tree = DraftTree.from_drafts(Drafts.from_logits(logits, count), copied, copied_prob, count, 6)
    for row in range(b):
        expected = {
            path: 0.999**depth * float(torch.stack([logits[row].softmax(-1)[i, t] for i, t in enumerate(path)]).prod())
            for depth in (1, 2)
            for path in product(range(3), repeat=depth)
        }
        for depth in range(1, length + 1):
            path = tuple(copied[row, :depth].tolist())
            expected[path] = max(expected.get(path, 0.0), float(copied_prob[row, depth - 1]))
        likeliest = sorted(expected.values(), reverse=True)[:count]
        used = (tree.prob[row] > 0).tolist()
        found = {
            tuple(t for t in path if t >= 0): float(prob)
            for path, prob, is_used in zip(tree.path[row].tolist(), tree.prob[row], used, strict=True)
            if is_used
        }
        assert sum(used) == len(found)  # every path once
        assert sorted(found.values(), reverse=True) == pytest.approx([1.0, *(p for p in likeliest if p > 0)])
        assert all(expected[path] == pytest.approx(prob) for path, prob in found.items() if path)
        assert all(path[:-1] in found for path in found if path)


def test_unlikely_drafts_are_left_out() -> None:
    logits = draft_logits(1, 2, 3, 9)
    everything, likely = tree_of(logits, 30), tree_of(logits, 30, min_prob=0.1)
    width = int((everything.prob.mean(0) >= 0.1).sum())
    assert 1 < width < 31
    assert torch.equal(likely.path, everything.path[:, :width]) and torch.equal(likely.prob, everything.prob[:, :width])


def test_independent_texts_have_the_same_tree_and_masks_alone() -> None:
    logits = draft_logits(1, 3, 3, 9)
    together = tree_of(logits, 30, min_prob=0.1, independent=True)
    masks = together.place_masks(6, 3, 0.1, independent=True)
    for row in range(3):
        alone = tree_of(logits[row : row + 1], 30, min_prob=0.1, independent=True)
        width = alone.path.shape[1]
        assert torch.equal(together.path[row, :width], alone.path[0]) and torch.equal(
            together.prob[row, :width], alone.prob[0]
        )
        assert not together.prob[row, width:].any()
        own = [tuple(slot) for slot in torch.stack([each[row] for each in masks], 1).tolist() if slot[2]]
        assert own == [
            tuple(s) for s in torch.stack([each[0] for each in alone.place_masks(6, 3, 0.1, True)], 1).tolist() if s[2]
        ]
        assert own
