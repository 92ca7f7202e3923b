"""A tree of draft tokens for speculative decoding, and the mask tokens that draft the next tree.

Axes: b texts, k tokens that a pass may generate (all but the last are drafted), c tokens of a copy, p nodes (the
last settled token as the root, then draft tokens), s mask tokens, v vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.sampling.drafts import Drafts

# The acceptance rate of a mask's draft, relative to that of the mask before it.
_ACCEPTANCE_DECAY = 0.6


@dataclass(frozen=True)
class DraftTree:
    """A tree of draft tokens whose root is the last settled token of each text.

    `path` holds the draft tokens from the root to each node, padded with -1. `prob` is the probability of that path
    under the drafts, 0 for unused nodes.
    """

    path: Int[Tensor, "b p k"]
    prob: Float[Tensor, "b p"]

    @classmethod
    def root(cls, b: int, k: int, device: torch.device) -> "DraftTree":
        """A tree of the root alone."""
        return cls(torch.full((b, 1, k), -1, device=device), torch.ones(b, 1, device=device))

    @classmethod
    def from_drafts(
        cls,
        drafts: Drafts,
        copied: Int[Tensor, "b c"],
        copied_prob: Float[Tensor, "b c"],
        num_drafts: int,
        k: int,
        min_prob: float = 0.0,
        independent: bool = False,
    ) -> "DraftTree":
        """The tree of the `num_drafts` most likely paths of any depth below k.

        All texts have the same number of nodes, so the n-th is left out if it has less than `min_prob` on average. If
        texts are to be `independent`, nodes below `min_prob` are unused instead, whatever other texts have. `copied`
        is one more path, with the probability of each of its prefixes.
        """
        b, ahead, branching = drafts.tokens.shape
        root = cls.root(b, k, drafts.tokens.device)
        path, prob = root.path, root.prob
        paths, probs = [path], [prob]
        for depth in range(ahead):  # a path can only be among the most likely if its prefix is
            longer = 0.999 * prob[:, :, None] * drafts.prob_after(depth, path)  # strictly less likely than the prefix
            prob, best = longer.flatten(1).topk(min(num_drafts, longer[0].numel()))
            path = _gather_paths(path, best // branching)
            path[..., depth] = drafts.tokens[:, depth].gather(1, best % branching)
            paths.append(path)
            probs.append(prob)
        path, prob = torch.cat(paths, 1), torch.cat(probs, 1)
        depth = torch.arange(copied.shape[1], device=path.device)
        copy = root.path.expand(-1, len(depth), -1).clone()
        copy[..., : len(depth)] = torch.where(depth <= depth[:, None], copied[:, None], -1)
        same = (copy[:, :, None] == path[:, None]).all(-1)  # a path that is both is kept once, as the likelier one
        prob = torch.maximum(prob, (same * copied_prob[..., None]).amax(1)) if len(depth) else prob
        path, prob = torch.cat([path, copy], 1), torch.cat([prob, copied_prob.masked_fill(same.any(-1), 0.0)], 1)
        prob, best = prob.topk(min(num_drafts + 1, prob.shape[1]))  # the root comes first
        prob = prob.masked_fill(prob < min_prob, 0.0) if independent else prob
        width = _count_columns(prob, min_prob, independent)
        prob, best = prob[:, :width], best[:, :width]
        return cls(_gather_paths(path, best), prob)

    def __getitem__(self, rows: Int[Tensor, " rows"]) -> "DraftTree":
        return DraftTree(self.path[rows], self.prob[rows])

    @cached_property
    def depth(self) -> Int[Tensor, "b p"]:
        """The number of draft tokens on the path to each node."""
        return (self.path >= 0).sum(-1)

    @cached_property
    def token(self) -> Int[Tensor, "b p"]:
        """The draft token of each node; meaningless for the root."""
        return self.path.gather(2, (self.depth - 1).clamp_min(0)[..., None])[..., 0]

    @cached_property
    def ancestors(self) -> Bool[Tensor, "b p p"]:
        """Mask of the nodes on the path to each node, including the node itself."""
        path, other = self.path[:, :, None], self.path[:, None]
        return ((path == other) | (other < 0)).all(-1) & (self.prob > 0)[:, None]

    @cached_property
    def parent(self) -> Int[Tensor, "b p"]:
        """The parent of each node; the root is its own parent."""
        one_above = self.depth[:, None] == self.depth[:, :, None] - 1
        return (self.ancestors & one_above).long().argmax(-1)

    def place_masks(
        self, num_masks: int, ahead: int, min_prob: float = 0.0, independent: bool = False
    ) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
        """The most useful masks: the node that each follows, its offset behind the node, and whether it is used.

        The usefulness of a mask is the probability that its node is the last accepted one, times the acceptance rate at
        its offset, which is below `ahead`. Offset 0 comes right after the node. Masks are left out as nodes are.
        """
        is_last = self.prob.scatter_add(1, self.parent[:, 1:], -self.prob[:, 1:]).clamp_min(0.0)
        usefulness = is_last[..., None] * _ACCEPTANCE_DECAY ** torch.arange(ahead, device=is_last.device)
        useful, best = usefulness.flatten(1).topk(min(num_masks, usefulness[0].numel()))
        used = useful >= min_prob if independent else torch.ones_like(useful, dtype=torch.bool)
        width = _count_columns(useful, min_prob, independent)
        best, used = best[:, :width], used[:, :width]
        return best // max(ahead, 1), best % max(ahead, 1), used

    def find_masks(
        self,
        node: Int[Tensor, " b"],
        mask_node: Int[Tensor, "b s"],
        mask_offset: Int[Tensor, "b s"],
        is_used: Bool[Tensor, "b s"],
        ahead: int,
    ) -> tuple[Int[Tensor, "b a"], Bool[Tensor, "b a"]]:
        """The mask at each of the offsets below `ahead` behind a node, of those of `place_masks`; and if there is one.

        It follows the node itself, or else the nearest node before it on its path that has a mask at that position.
        """
        row = torch.arange(len(node), device=node.device)[:, None]
        depth = self.depth.gather(1, mask_node)
        on_path = is_used & self.ancestors[row, node[:, None], mask_node]
        offset = depth + mask_offset - self.depth.gather(1, node[:, None])
        matches = on_path[:, None] & (offset[:, None] == torch.arange(ahead, device=node.device)[:, None])
        nearness, index = torch.where(matches, depth[:, None] + 1, 0).max(-1)
        return index, nearness > 0

    def last_accepted(self, accepted: Bool[Tensor, "b p"], log_prob: Float[Tensor, "b p"]) -> Int[Tensor, " b"]:
        """The deepest node whose path is accepted throughout; among equally deep ones, that of the most likely path."""
        path_accepted = ~(self.ancestors & ~accepted[:, None]).any(-1) & (self.prob > 0)
        path_log_prob = torch.where(self.ancestors, log_prob[:, None], 0.0).sum(-1)  # -inf where a token is banned
        return torch.where(path_accepted, 1e4 * self.depth + path_log_prob, -torch.inf).argmax(-1)


def _count_columns(prob: Float[Tensor, "b p"], min_prob: float, independent: bool) -> int:
    """The number of columns to keep, of probabilities in falling order."""
    kept = (prob >= min_prob).any(0) if independent else prob.mean(0) >= min_prob
    return int(kept.sum())


def _gather_paths(paths: Int[Tensor, "b p k"], index: Int[Tensor, "b q"]) -> Int[Tensor, "b q k"]:
    return paths.gather(1, index[..., None].expand(-1, -1, paths.shape[2]))
