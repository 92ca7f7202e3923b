"""Samplers on a tree of draft tokens: every node is a text of its own, whose next token is sampled.

Axes: b texts, g texts of a group, n canvas positions, p nodes of the draft tree, k tokens that a pass may generate, v
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from diffusify.canvas import Canvas
from diffusify.diffusion.length_tokens import Columns
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.rng import DrawnNumbers, RowGenerators
from diffusify.sampling.draft_tree import DraftTree
from diffusify.sampling.sampler import Sampler, equal_samplers


@dataclass(frozen=True)
class SamplerRows:
    """The rows of a batch with the same sampler, and the random number of each of their positions.

    All nodes at a position use the same number, so a sampled text does not depend on what was drafted.
    """

    sampler: Sampler
    rows: Tensor | slice
    numbers: Float[Tensor, "g n"]

    @classmethod
    def groups(cls, samplers: Sequence[Sampler], rng: RowGenerators, canvas: Canvas) -> list["SamplerRows"]:
        """The groups of a batch with one sampler for each row."""
        found, numbers = equal_samplers(samplers), rng.uniform(canvas.open)
        if len(found) == 1:
            return [cls(found[0][0], slice(None), numbers)]
        index = [torch.tensor(rows, device=numbers.device) for _, rows in found]
        return [cls(sampler, rows, numbers[rows]) for (sampler, _), rows in zip(found, index, strict=True)]

    def of_rows(self, left: Int[Tensor, " left"]) -> "SamplerRows":
        """What remains of the group if some rows of the batch do."""
        if isinstance(self.rows, slice):
            return replace(self, numbers=self.numbers[left])
        new, mine = (left[:, None] == self.rows).nonzero().unbind(1)
        return replace(self, rows=new, numbers=self.numbers[mine])

    def moved(self, columns: Columns) -> "SamplerRows":
        """The group after masked spans have changed their length; every position keeps its number."""
        return replace(self, numbers=columns[self.rows].take(self.numbers))

    def process_logits(
        self, logits: Float[Tensor, "b p v"], canvas: Canvas, settled: Int[Tensor, " b"], tree: DraftTree
    ) -> None:
        """Apply penalties, bans, processors and constraints to the logits of the group's nodes, in place."""
        sampler, mine = self.sampler, logits[self.rows]
        if not sampler.reads_text:
            if sampler.banned:
                mine[..., list(sampler.banned)] = -torch.inf
                logits[self.rows] = mine
            return
        texts, used = _node_texts(canvas[self.rows], settled[self.rows], tree.path[self.rows], tree.prob[self.rows] > 0)
        if sampler.constraint is not None:  # a draft that it does not allow cannot be accepted
            possible = sampler.constraint.possible_rows(texts)
            used, texts = used.masked_scatter(used, possible), texts[possible.nonzero()[:, 0]]
        first_open = texts.open & (texts.open.long().cumsum(1) == 1)
        mine[used] = sampler.process_logits(LazyLogits.from_tensor(mine[used]), texts, first_open).logits
        logits[self.rows] = mine

    def pick(
        self, logits: Float[Tensor, "b p v"], settled: Int[Tensor, " b"], tree: DraftTree
    ) -> tuple[Int[Tensor, "g p"], Float[Tensor, "g p"]]:
        """The next token after each node, and its log-probability."""
        mine, position = logits[self.rows], (settled[:, None] + tree.depth)[self.rows]
        every_node = torch.ones(mine.shape[:2], dtype=torch.bool, device=logits.device)
        rng = DrawnNumbers(self.numbers.gather(1, position.clamp_max(self.numbers.shape[1] - 1)))
        tokens, log_prob = self.sampler.pick(mine.flatten(0, 1), every_node, rng)
        return tokens.view(every_node.shape), log_prob.view(every_node.shape)

    def observe(
        self,
        logits: Float[Tensor, "b p v"],
        write: Bool[Tensor, "b n"],
        settled: Int[Tensor, " b"],
        parent: Int[Tensor, "b k"],
    ) -> None:
        """Call the sampler's observer; `parent` is the node before each token that follows the `settled` ones."""
        if self.sampler.observer is None:
            return
        mine = torch.zeros_like(write)
        mine[self.rows] = write[self.rows]
        row, position = mine.nonzero(as_tuple=True)
        node = parent[row, position - settled[row]]
        self.sampler.observer(mine, LazyLogits.from_tensor(logits[row, node]))


def _node_texts(
    canvas: Canvas, settled: Int[Tensor, " g"], path: Int[Tensor, "g p k"], used: Bool[Tensor, "g p"]
) -> tuple[Canvas, Bool[Tensor, "g p"]]:
    """The canvas at each used node, with its draft tokens written, and the nodes that leave a position open."""
    p, k = path.shape[1:]
    n = canvas.tokens.shape[1]
    position = (settled[:, None, None] + torch.arange(k, device=path.device)).expand(-1, p, -1)

    def at_nodes(values: Tensor, drafts: Tensor) -> Tensor:
        """Values of every position [g, n], changed at the positions after the settled ones [g, p, k]."""
        wide = pad(values, (0, k))[:, None].expand(-1, p, -1)
        return wide.scatter(2, position, drafts)[..., :n]

    is_draft = path >= 0
    drafted = at_nodes(torch.zeros_like(canvas.open), is_draft)
    open = canvas.open[:, None] & ~drafted
    tokens = torch.where(drafted, at_nodes(canvas.tokens, path), canvas.tokens[:, None])
    used = used & open.any(-1)
    editable, document = (x[:, None].expand(-1, p, -1)[used] for x in (canvas.editable, canvas.document))
    return Canvas(tokens[used], open=open[used], editable=editable, document=document), used
