"""Left-to-right text in fewer forwards: the model drafts, and its own AR half checks.

Axes: b texts, n canvas positions, m positions that are run, p places where the drafts may be cut off, s masks, k
tokens that a pass may write, v vocabulary.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess, Move
from diffusify.diffusion.attention import AttentionInputs
from diffusify.diffusion.picking import Greedy, Pick
from diffusify.diffusion.rng import RowGenerators
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.draft_tree import DraftTree
from diffusify.sampling.kv_cache import ColumnCache
from diffusify.sampling.sampler import Frame, finished


class Speculative:
    """AR decoding by self-speculation, for block diffusion that keeps its left-to-right half.

    A pass runs `candidates` drafted tokens causally, as a tree of likely continuations, so it tells the AR model's own
    choice behind each of them: the way is taken that agrees furthest, and one more token is the AR model's own. In the
    same pass `masks` draft the next tokens behind the places where the text is likely to stand then, so no pass is
    wasted. The text is that of greedy AR decoding, or follows exactly the distribution of AR sampling where `pick`
    draws, whatever the drafts are worth; every pass writes at least one token.

    With a `tolerance` above 0 a draft is kept, too, if the AR half gives it a log-probability (nats) at most so far
    below its own choice's: fewer passes, for text that is a little less likely (typical acceptance, Medusa).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pick: Pick = Greedy(),
        tolerance: float = 0.0,
        *,
        candidates: int = 4,
        masks: int = 6,
        banned: tuple[int, ...] = (),
        end_token_id: int | None = None,
    ) -> None:
        pattern = denoiser.diffusion_config.attention
        if not denoiser.diffusion_config.reads_as_ar_model:
            raise ValueError(
                "speculative decoding needs a model that keeps its left-to-right half (the block recipe on an AR "
                f"base); this one has {pattern} and shift {denoiser.diffusion_config.shift}"
            )
        if not denoiser.supports_kv_cache:
            raise ValueError(
                f"{denoiser.diffusion_config.architecture} keeps no keys and values, so it cannot draft ahead"
            )
        if tolerance < 0:
            raise ValueError(f"tolerance={tolerance} must be at least 0 nats, which is lossless")
        self.denoiser, self.pick, self.size = denoiser, pick, denoiser.diffusion_config.block_size or 1
        self.candidates, self.masks = candidates, masks
        self.tolerance, self.banned, self.end_token_id = tolerance, banned, end_token_id

    @torch.inference_mode()
    def __call__(self, canvas: Canvas, *, noise: int, rng: RowGenerators | None = None) -> Iterator[Frame]:
        """Yield the canvas after every pass. ValueError unless each row is a prompt and room behind it."""
        rng = rng or RowGenerators.seeded(list(range(len(canvas.tokens))), canvas.tokens.device)
        b, n = canvas.tokens.shape
        at = torch.arange(n, device=canvas.tokens.device)
        known = torch.where(canvas.open, at, n).amin(1)  # so many tokens are settled
        end = torch.where(canvas.open, at + 1, 0).amax(1)
        if (canvas.open != ((at >= known[:, None]) & (at < end[:, None]))).any() or (known < 1).any():
            raise ValueError("speculative decoding goes on from prompts; it cannot fill holes")
        ends = torch.full_like(known, -1 if self.end_token_id is None else self.end_token_id)
        past = ColumnCache(self.denoiser, self.candidates + self.masks + n)
        score = torch.zeros(b, n, device=canvas.tokens.device)
        start, tree, forwards = torch.zeros_like(known), DraftTree.root(b, self.size, at.device), 0
        while (todo := canvas.open.any(1) & ~finished(canvas, ends)).any():
            owner, turn = tree.masks(self.masks)
            logits, drafts = self._pass(canvas.tokens, start, known, tree, owner, turn, noise, past)
            forwards += 1
            tokens, sure, stand = self._verdict(logits, tree, rng)
            agreed = tree.depth.gather(1, stand[:, None])[:, 0]
            place = at - known[:, None]
            written = todo[:, None] & (place >= 0) & (place <= agreed[:, None]) & canvas.open
            place = place.clamp(0, self.size - 1)
            guess = Guess(tokens.gather(1, place), sure.gather(1, place))
            canvas = canvas.apply(Move(written, erase=torch.zeros_like(written)), guess, noise)
            score = torch.where(written, guess.score, score)
            start = torch.where(todo, known, start)
            known = torch.where(todo, torch.minimum(known + agreed + 1, end), known)
            slot = torch.where(owner == stand[:, None], turn, self.size - 1)[..., None].expand_as(drafts)
            ahead = drafts.new_full((b, self.size, drafts.shape[2]), -torch.inf).scatter(1, slot, drafts)[:, :-1]
            tree = DraftTree.likeliest(ahead, self.candidates)
            yield Frame(canvas, score, forwards, settled=known)

    def _verdict(
        self, logits: Float[Tensor, "b p v"], tree: DraftTree, rng: RowGenerators
    ) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"], Int[Tensor, " b"]]:
        """The next tokens with their log-probabilities, and the place where they leave the tree.

        Up to that place they are drafted; the one behind it is the AR half's own, and what follows is void.
        """
        everywhere = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        choice, sure = (x.view(everywhere.shape) for x in self.pick(logits.flatten(0, 1), everywhere, rng))
        row = torch.arange(len(logits), device=logits.device)
        told = logits[row[:, None], tree.parent, tree.token] - logits.logsumexp(-1).gather(1, tree.parent)
        right = tree.token == choice.gather(1, tree.parent)
        if self.tolerance:
            right |= told >= sure.gather(1, tree.parent) - self.tolerance
        right[:, 0], told[:, 0] = True, 0.0
        stand = tree.furthest(right, told)
        depth = tree.depth[row, stand][:, None]
        steps = torch.arange(1, self.size + 1, device=row.device)[:, None]
        way = (tree.along[row, stand][:, None] & (tree.depth[:, None] == steps)).long().argmax(-1)
        tokens = tree.path[row, stand].scatter(1, depth, choice[row, stand][:, None])
        return tokens, told.gather(1, way).scatter(1, depth, sure[row, stand][:, None]), stand

    def _pass(
        self,
        tokens: Int[Tensor, "b n"],
        start: Int[Tensor, " b"],
        known: Int[Tensor, " b"],
        tree: DraftTree,
        owner: Int[Tensor, "b s"],
        turn: Int[Tensor, "b s"],
        noise: int,
        past: ColumnCache,
    ) -> tuple[Float[Tensor, "b p v"], Float[Tensor, "b s v"]]:
        """AR logits behind every place of the tree, and those of the masks.

        Settled text stands in the cache at its position, behind the columns of the tree and the masks.
        """
        (b, n), device = tokens.shape, tokens.device
        drafted, room = tree.path.shape[1] - 1, self.candidates + self.masks
        row = torch.arange(b, device=device)[:, None]
        text = start[:, None] + torch.arange(int((known - start).amax()), device=device)
        nodes = (known[:, None] - 1 + tree.depth)[:, 1:]
        masks = known[:, None] + tree.depth.gather(1, owner) + turn
        beside = torch.zeros(b, room, room, dtype=torch.bool, device=device)  # who sees whom in the tree
        beside[:, :drafted, :drafted] = tree.along[:, 1:, 1:]
        own = slice(drafted, drafted + masks.shape[1])
        beside[:, own, :drafted] = tree.along[row, owner][:, :, 1:]
        beside[:, own, own] = owner[:, :, None] == owner[:, None]

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
            """Text sees earlier text; the tree sees all settled text and what is on the way; masks see each other."""
            inside = q < room
            sees = torch.where(inside, known[b] - 1, q - room)
            near = beside[b, q.clamp_max(room - 1), key.clamp_max(room - 1)]
            return torch.where(key < room, inside & near, key - room <= sees)

        tail = torch.cat([nodes, masks], 1)
        width = room + int(known.amax())
        columns = torch.arange(tail.shape[1], device=device).expand(b, -1)
        columns = torch.cat([torch.where(text < known[:, None], text + room, room + n), columns], 1)
        spare = tail.new_zeros(b, room - tail.shape[1])
        drafts = torch.cat([tree.token[:, 1:], torch.full_like(masks, noise)], 1)
        inputs = AttentionInputs(
            tokens=torch.cat([tokens.gather(1, text.clamp_max(n - 1)), drafts], 1),
            position_ids=torch.cat([text, tail], 1).clamp_max(n - 1),
            output_index=tokens,
            ar_output_index=tokens,
            mask_mod=mask_mod,
            per_row=True,
            columns=columns,
            key_position_ids=torch.cat([tail, spare, torch.arange(width - room, device=device).expand(b, -1)], 1),
        )
        past.write(columns, width)
        m = columns.shape[1]
        root = row * m + (known - 1 - start)[:, None]
        rest = row * m + text.shape[1] + torch.arange(tail.shape[1], device=device)
        logits = self.denoiser.project(inputs, torch.cat([root, rest], 1).flatten(), past=past).unflatten(0, (b, -1))
        if self.banned:
            logits[..., list(self.banned)] = -torch.inf
        return logits[:, : drafted + 1].float(), logits[:, drafted + 1 :]
