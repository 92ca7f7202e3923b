"""A tree of drafted tokens: which continuations are worth a look, and where masks are to draft what comes next.

Axes: b texts, k tokens that a pass may write (all but the last are drafted), a = k - 1, p places (the last settled
token, then drafted tokens), s masks, v vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# A further mask's draft is right so much less often than that of the mask before it.
_FADE = 0.15


@dataclass(frozen=True)
class DraftTree:
    """Places where a text may stand after a pass: its last settled token, and drafted tokens behind it and each other.

    `path` holds the drafted tokens up to a place, -1 behind them; `chance` is how likely all of them are right by the
    drafts' own account, 0 where nothing was drafted.
    """

    path: Int[Tensor, "b p k"]
    chance: Float[Tensor, "b p"]

    @classmethod
    def root(cls, b: int, k: int, device: torch.device) -> "DraftTree":
        """The last settled token alone."""
        return cls(torch.full((b, 1, k), -1, device=device), torch.ones(b, 1, device=device))

    @classmethod
    def likeliest(cls, drafts: Float[Tensor, "b a v"], count: int) -> "DraftTree":
        """The `count` likeliest drafted tokens at whatever depth, each with all that stands before it.

        `drafts` are logits of the tokens ahead, -inf throughout where there is no draft.
        """
        b, ahead, v = drafts.shape
        wide = min(count, v)
        likely, tokens = drafts.float().softmax(-1).nan_to_num(0.0).topk(wide, -1)
        root = cls.root(b, ahead + 1, drafts.device)
        path, chance = root.path, root.chance
        paths, chances = [path], [chance]
        for depth in range(ahead):  # no path is among the likeliest whose beginning is not
            longer = 0.999 * chance[:, :, None] * likely[:, None, depth]  # less than what stands before it, strictly
            chance, best = longer.flatten(1).topk(min(count, longer[0].numel()))
            path = _rows(path, best // wide)
            path[..., depth] = tokens[:, depth].gather(1, best % wide)
            paths.append(path)
            chances.append(chance)
        path, chance = torch.cat(paths, 1), torch.cat(chances, 1)
        chance, best = chance.topk(min(count + 1, chance.shape[1]))  # the root first
        return cls(_rows(path, best), chance)

    @cached_property
    def depth(self) -> Int[Tensor, "b p"]:
        """How many drafted tokens lead to each place."""
        return (self.path >= 0).sum(-1)

    @cached_property
    def token(self) -> Int[Tensor, "b p"]:
        """The drafted token at each place; meaningless for the first."""
        return self.path.gather(2, (self.depth - 1).clamp_min(0)[..., None])[..., 0]

    @cached_property
    def along(self) -> Bool[Tensor, "b p p"]:
        """Which places lie on the way to each place, itself among them."""
        way, place = self.path[:, :, None], self.path[:, None]
        return ((way == place) | (place < 0)).all(-1) & (self.chance > 0)[:, None]

    @cached_property
    def parent(self) -> Int[Tensor, "b p"]:
        """The place right before each; the first is its own."""
        before = self.depth[:, None] == self.depth[:, :, None] - 1
        return (self.along & before).long().argmax(-1)

    def masks(self, count: int) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
        """Where `count` masks are worth most: the place that each stands behind, and how many masks are in between.

        A mask is of use if the text is to stand at its place after this pass, and if its draft turns out right.
        """
        ahead = self.path.shape[2] - 1
        stays = self.chance.scatter_add(1, self.parent[:, 1:], -self.chance[:, 1:]).clamp_min(0.0)
        worth = stays[..., None] * _FADE ** torch.arange(ahead, device=stays.device)
        best = worth.flatten(1).topk(min(count, worth[0].numel())).indices
        return best // max(ahead, 1), best % max(ahead, 1)

    def furthest(self, right: Bool[Tensor, "b p"], likely: Float[Tensor, "b p"]) -> Int[Tensor, " b"]:
        """The last place on a way of right tokens only; of several the one with the likeliest tokens on its way."""
        whole = ~(self.along & ~right[:, None]).any(-1) & (self.chance > 0)
        told = (self.along * likely[:, None]).sum(-1)
        return torch.where(whole, 1e4 * self.depth + told, -torch.inf).argmax(-1)


def _rows(values: Int[Tensor, "b p k"], index: Int[Tensor, "b q"]) -> Int[Tensor, "b q k"]:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
