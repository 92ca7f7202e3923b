"""Self-speculative decoding: a block diffusion model drafts tokens, and its own AR half verifies them.

Axes: b texts, n canvas positions, m positions of a pass, p nodes of the draft tree, s mask tokens, k tokens that a pass
may generate, d hidden size, v vocabulary.
"""

from collections.abc import Generator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess, Move
from diffusify.diffusion.attention import BlockCausal
from diffusify.diffusion.attention_inputs import AttentionInputs
from diffusify.diffusion.rng import RowGenerators
from diffusify.diffusion.span_ends import SpanEnds
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.draft_sampling import SamplerRows
from diffusify.sampling.draft_tree import DraftTree
from diffusify.sampling.drafts import ChainedDrafts, Drafts
from diffusify.sampling.kv_cache import ColumnCache
from diffusify.sampling.prompt_lookup import copied_drafts, tokens_as_read
from diffusify.sampling.reranking import best_ends
from diffusify.sampling.sampler import Frame, Sampler, after_end, end_tokens
from diffusify.sampling.unfinished_rows import UnfinishedRows

# The least probability of being accepted that makes a row worth its time where passes run many texts.
_MIN_PROB = 0.6
# The number of texts per pass at which half of that suffices, because reading the weights takes most of the time.
_FEW_TEXTS = {"cpu": 14.0}
_FEW_TEXTS_ELSEWHERE = 100.0
_MIN_TOLERANT_PROB = 0.075
_MASK_VALUE = 0.6  # the share of masks whose drafts are accepted

PlacedMasks = tuple[Int[Tensor, "b s"], Int[Tensor, "b s"], Bool[Tensor, "b s"]]  # see `DraftTree.place_masks`


class Speculative:
    """Autoregressive decoding with self-speculation, for block diffusion models that keep their AR half.

    Each forward pass verifies and drafts at once. A tree of `candidates` draft tokens runs under causal attention,
    which gives the AR half's own choice after each of them. The longest path that agrees with these choices is
    accepted, followed by one token of the AR half. In the same pass, `masks` mask tokens behind the nodes that are
    likely to be accepted draft the next tree. One more path of up to `copies` tokens is what followed the latest tokens
    earlier in the text (see `copied_drafts`). Of all these, only what is likely enough to be accepted is run, the less
    the more texts share a pass. Every pass generates at least one token. The text equals that of greedy AR decoding, or
    that of AR sampling with the same random numbers if `pick` samples, however good the drafts are.

    With a `tolerance` above 0 (nats), a draft is accepted, too, if its log-probability under the AR half is at most
    that much below the AR half's own choice (typical acceptance, Medusa). This takes fewer passes and gives a slightly
    less likely text.

    Penalties, processors and constraints of a sampler change the AR half's logits after every node as its text
    requires. Where the attention has text on both `sides` in sight, masked spans are filled one after the other.

    Raises ValueError if the model keeps no AR half, the network has no KV cache, or `tolerance` is negative.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tolerance: float = 0.0,
        *,
        candidates: int = 14,
        masks: int = 24,
        copies: int = 12,
    ) -> None:
        pattern = denoiser.diffusion_config.attention
        if not denoiser.diffusion_config.reads_as_ar_model:
            raise ValueError(
                "speculative decoding needs a model that keeps its AR half (the block recipe on an AR base model); "
                f"this one has {pattern} and shift {denoiser.diffusion_config.shift}; leave out tolerance"
            )
        if not denoiser.supports_kv_cache:
            raise ValueError(
                f"speculative decoding needs a KV cache, and {denoiser.diffusion_config.architecture} has none; "
                "leave out tolerance"
            )
        if tolerance < 0:
            raise ValueError(f"tolerance={tolerance} must be at least 0 nats; 0 is lossless")
        self.denoiser, self.size = denoiser, denoiser.diffusion_config.block_size or 1
        self.pattern = pattern if isinstance(pattern, BlockCausal) else BlockCausal(1)
        self.fills_spans = self.pattern.sides == "both"
        self.causal_masks = self.pattern.noisy == "causal"
        self.candidates, self.masks, self.tolerance = candidates, masks, tolerance
        self.copies = copies if self.size > 1 else 0  # an AR base decodes as it is
        self.longest = max(self.size, self.copies + 1)  # tokens that a pass may generate

    @torch.inference_mode()
    def __call__(
        self,
        canvas: Canvas,
        samplers: Sequence[Sampler] = (Sampler(),),
        *,
        noise: int,
        rng: RowGenerators | None = None,
        span_ends: SpanEnds | None = None,
    ) -> Generator[Frame, Canvas | None, None]:
        """Yield the canvas after every pass, with one sampler for each row or for all.

        A canvas that is sent replaces it. The policies and steps of the samplers have no effect. `span_ends` says which
        masked spans may end early. Raises ValueError unless open positions follow a prompt in each row, and only one
        run of them if the model fills no spans.
        """
        rng = rng or RowGenerators.from_seeds(list(range(len(canvas.tokens))))
        b, n = canvas.tokens.shape
        samplers = list(samplers) * b if len(samplers) == 1 else samplers
        at = torch.arange(n, device=canvas.tokens.device)
        settled, end = _first_run(canvas.open)
        has_spans = (canvas.open != ((at >= settled[:, None]) & (at < end[:, None]))).any() and not self.fills_spans
        if has_spans or (settled < 1).any():
            raise ValueError("speculative decoding continues prompts and cannot infill; leave out tolerance")
        ends = end_tokens([sampler.end_token_id for sampler in samplers], at.device)
        cached = torch.zeros_like(canvas.open)
        groups = SamplerRows.groups(samplers, rng, canvas)
        past = ColumnCache(self.denoiser, self.candidates + self.masks + n)
        batch = UnfinishedRows.of_batch(canvas)
        is_watched = any(sampler.observer is not None for sampler in samplers)  # by the rows of the batch
        score, tree, forwards = batch.frame.score, DraftTree.root(b, self.longest, at.device), 0
        moves, independent = None, self.tolerance > 0  # then the text depends on the drafts
        while len(left := (todo := (canvas.open & ~after_end(canvas, ends)).any(1)).nonzero()[:, 0]):
            if not is_watched and batch.narrow(left):
                canvas, score, cached, tree, todo = canvas[left], score[left], cached[left], tree[left], todo[left]
                settled, end, ends = settled[left], end[left], ends[left]
                span_ends = None if span_ends is None else span_ends[left]
                moves = None if moves is None else moves[:, left]
                groups = [rest for group in groups if len((rest := group.of_rows(left)).numbers)]
                past.keep(left)
            min_prob = self._min_prob(len(todo))
            masks = tree.place_masks(self.masks, self.size - 1, min_prob / _MASK_VALUE, independent)
            text = canvas.real & ~canvas.open if self.fills_spans else at < settled[:, None]
            uncached = (text & ~cached) | (at == settled[:, None] - 1)
            logits, drafts, hidden = self._forward(canvas, uncached, settled, tree, masks, noise, past, moves)
            forwards += 1
            for group in groups:
                group.process_logits(logits, canvas, settled, tree)
            end_log_prob = None if span_ends is None else span_ends.restrict(logits, settled[:, None] + tree.depth, end)
            tokens, log_prob, node, parent = self._verify(logits, settled, tree, groups)
            accepted = tree.depth.gather(1, node[:, None])[:, 0]
            offset = at - settled[:, None]
            write = todo[:, None] & (offset >= 0) & (offset <= accepted[:, None]) & (at < end[:, None]) & canvas.open
            offset = offset.clamp(0, self.longest - 1)
            guess = Guess(tokens.gather(1, offset), log_prob.gather(1, offset))
            for group in groups:
                group.observe(logits, write, settled, parent)
            canvas = canvas.apply(Move(write, erase=torch.zeros_like(write)), guess, noise)
            score = torch.where(write, guess.score, score)
            written = write.sum(1)
            accepted = torch.minimum(accepted, written)
            moves = self._moves(settled, accepted, parent, past.n)
            cached = uncached | cached | (write & (at < (settled + accepted)[:, None]))
            columns, goes_on = None, todo & (settled + written < end)
            if span_ends is not None and end_log_prob is not None:
                span_ends, is_over = span_ends.observe(write, settled, end, end_log_prob.gather(1, parent))
                cut, over = end.clone(), is_over.nonzero()[:, 0]
                if len(over):
                    cut[over] = best_ends(self.denoiser, canvas[over], span_ends.log_prob[over], end[over])
                    forwards += 1
                canvas, span_ends, columns = span_ends.close(canvas, write, end, cut)
            if columns is not None:
                score, goes_on = columns.take(score), goes_on & ~(canvas.real & (columns.index != at)).any(1)
                groups = [group.moved(columns) for group in groups]
            first_open, end = _first_run(canvas.open)
            settled = torch.where(first_open < n, first_open, canvas.real.sum(1))
            if self.fills_spans:
                cached &= goes_on[:, None]  # the next span is filled with the text in another order
            latest = canvas.tokens.gather(1, settled[:, None] - 1)[:, 0]
            ahead = self._drafts_behind(tree, node, drafts, hidden, masks, goes_on, latest)
            read = tokens_as_read(canvas, settled) if self.fills_spans else (canvas.tokens, settled)
            copied, copied_prob = copied_drafts(*read, self.copies)
            tree = DraftTree.from_drafts(
                ahead, copied, copied_prob * todo[:, None], self.candidates, self.longest, min_prob, independent
            )
            final = settled if span_ends is None else span_ends.settled(settled)
            sent = yield batch.whole(Frame(canvas, score, forwards, final, columns))
            canvas = canvas if sent is None else batch.of_whole(sent)

    def _min_prob(self, b: int) -> float:
        """The least probability with which a draft of one of `b` texts must be accepted to be run.

        With a tolerance, drafts decide about the text, so it depends neither on other texts nor on the device.
        """
        if self.tolerance:
            return _MIN_TOLERANT_PROB
        texts, few = self.denoiser.texts_per_pass(b), _FEW_TEXTS.get(self.denoiser.device.type, _FEW_TEXTS_ELSEWHERE)
        return _MIN_PROB * texts / (texts + few)

    def _verify(
        self, logits: Float[Tensor, "b p v"], settled: Int[Tensor, " b"], tree: DraftTree, groups: list[SamplerRows]
    ) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"], Int[Tensor, " b"], Int[Tensor, "b k"]]:
        """The next tokens, their log-probabilities under the AR half, the last accepted node, and each token's parent.

        The tokens up to that node are drafts, and the next one is the AR half's own; the rest is undefined.
        """
        choice = torch.empty(logits.shape[:2], dtype=torch.long, device=logits.device)
        choice_log_prob = torch.empty(logits.shape[:2], device=logits.device)
        for group in groups:
            choice[group.rows], choice_log_prob[group.rows] = group.pick(logits, settled, tree)
        row = torch.arange(len(logits), device=logits.device)
        normalizer = logits.gather(2, choice[..., None])[..., 0] - choice_log_prob
        log_prob = logits[row[:, None], tree.parent, tree.token] - normalizer.gather(1, tree.parent)
        accepted = tree.token == choice.gather(1, tree.parent)
        if self.tolerance:
            accepted |= log_prob >= choice_log_prob.gather(1, tree.parent) - self.tolerance
        accepted[:, 0], log_prob[:, 0] = True, 0.0
        node = tree.last_accepted(accepted, log_prob)
        depth = tree.depth[row, node][:, None]
        depths = torch.arange(1, self.longest + 1, device=row.device)[:, None]
        path = (tree.ancestors[row, node][:, None] & (tree.depth[:, None] == depths)).long().argmax(-1)
        tokens = tree.path[row, node].scatter(1, depth, choice[row, node][:, None])
        log_prob = log_prob.gather(1, path).scatter(1, depth, choice_log_prob[row, node][:, None])
        return tokens, log_prob, node, torch.cat([torch.zeros_like(path[:, :1]), path[:, :-1]], 1)

    def _drafts_behind(
        self,
        tree: DraftTree,
        node: Int[Tensor, " b"],
        logits: Float[Tensor, "b s v"],
        hidden: Float[Tensor, "b s d"],
        masks: PlacedMasks,
        todo: Bool[Tensor, " b"],
        latest: Int[Tensor, " b"],
    ) -> Drafts:
        """The drafts behind a node of each tree, in order, for the texts that are to be continued.

        `latest` is the token after the node, the last one of the text.
        """
        if not logits.shape[1]:  # no mask was likely enough to be useful
            return Drafts.from_logits(logits, self.candidates)
        row = torch.arange(len(node), device=node.device)[:, None]
        mask_index, found = tree.find_masks(node, *masks, self.size - 1)
        has_draft = found & todo[:, None]
        logits = logits[row, mask_index].masked_fill_(~has_draft[..., None], -torch.inf)
        if self.denoiser.draft_head is None:
            return Drafts.from_logits(logits, self.candidates)
        return ChainedDrafts.from_masks(self.denoiser, logits, hidden[row, mask_index], latest)

    def _moves(
        self, settled: Int[Tensor, " b"], accepted: Int[Tensor, " b"], parent: Int[Tensor, "b k"], unused: int
    ) -> Int[Tensor, "2 b a"]:
        """The columns of the accepted drafts among those of the tree, and the columns of their positions."""
        depth = torch.arange(1, int(accepted.amax()) + 1, device=settled.device)
        source = parent[:, 1 : len(depth) + 1] - 1  # node 1 is the first column
        target = self.candidates + self.masks + settled[:, None] - 1 + depth
        return torch.stack(
            [source.clamp_min(0), torch.where(depth <= accepted[:, None], target, unused).clamp_max(unused)]
        )

    def _forward(
        self,
        canvas: Canvas,
        uncached: Bool[Tensor, "b n"],
        settled: Int[Tensor, " b"],
        tree: DraftTree,
        placed_masks: PlacedMasks,
        noise: int,
        past: ColumnCache,
        moves: Int[Tensor, "2 b a"] | None,
    ) -> tuple[Float[Tensor, "b p v"], Float[Tensor, "b s v"], Float[Tensor, "b s d"]]:
        """The AR logits after every node of the tree, and the draft logits and hidden states of the mask tokens.

        `uncached` are the positions of the text to be run, the last settled one among them. Text behind the span that
        is filled is read first (see `Canvas.reading_order`). The first columns of the cache are those of the tree and
        the masks, overwritten by every pass. The columns of the settled text follow, in the order of its positions.
        """
        tokens, (mask_node, mask_offset, is_used) = canvas.tokens, placed_masks
        (b, n), device = tokens.shape, tokens.device
        drafted, draft_width = tree.path.shape[1] - 1, self.candidates + self.masks
        row = torch.arange(b, device=device)[:, None]
        text = (~uncached).int().argsort(dim=1, stable=True)[:, : int(uncached.sum(1).amax())]
        nodes = (settled[:, None] - 1 + tree.depth)[:, 1:]
        masks = settled[:, None] + tree.depth.gather(1, mask_node) + mask_offset
        tree_mask = torch.zeros(b, draft_width, draft_width, dtype=torch.bool, device=device)
        tree_mask[:, :drafted, :drafted] = tree.ancestors[:, 1:, 1:]
        mask_columns = slice(drafted, drafted + masks.shape[1])
        tree_mask[:, mask_columns, :drafted] = tree.ancestors[row, mask_node][:, :, 1:]
        same_node = (mask_node[:, :, None] == mask_node[:, None]) & is_used[:, None]
        if self.causal_masks:
            same_node &= mask_offset[:, :, None] >= mask_offset[:, None]
        tree_mask[:, mask_columns, mask_columns] = same_node

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
            """Text is causal; draft tokens and masks attend to all settled text, and to each other by `tree_mask`."""
            is_draft, at_key = q < draft_width, (key - draft_width).clamp_min(0)
            last_key = torch.where(is_draft, settled[b] - 1, q - draft_width)
            in_tree = tree_mask[b, q.clamp_max(draft_width - 1), key.clamp_max(draft_width - 1)]
            key_is_behind, query_is_behind = is_behind[b, at_key], is_behind[b, last_key.clamp_max(n - 1)]
            in_text = torch.where(key_is_behind == query_is_behind, at_key <= last_key, key_is_behind)
            return torch.where(key < draft_width, is_draft & in_tree, in_text & ~is_later_span[b, at_key])

        position_ids, is_behind = canvas.position_ids, torch.zeros_like(canvas.open)
        if self.fills_spans:
            position_ids, is_behind = canvas.reading_order()
        behind, is_later_span = is_behind.sum(1, keepdim=True), is_behind & canvas.open
        draft_positions = torch.cat([nodes, masks], 1)
        width = draft_width + (n if self.fills_spans else int(settled.amax()))
        columns = torch.arange(draft_positions.shape[1], device=device).expand(b, -1)
        columns = torch.cat([torch.where(uncached.gather(1, text), text + draft_width, draft_width + n), columns], 1)
        spare = draft_positions.new_zeros(b, draft_width - draft_positions.shape[1])
        drafts = torch.cat([tree.token[:, 1:], torch.full_like(masks, noise)], 1)
        is_mask = (torch.arange(columns.shape[1], device=device) >= text.shape[1] + drafted).expand(b, -1)
        inputs = AttentionInputs(
            tokens=torch.cat([tokens.gather(1, text), drafts], 1),
            position_ids=torch.cat([position_ids.gather(1, text), (draft_positions + behind).clamp_max(n - 1)], 1),
            output_index=tokens,
            ar_output_index=tokens,
            mask_mod=mask_mod,
            per_row=True,
            is_mask=is_mask,
            columns=columns,
            key_position_ids=torch.cat([draft_positions + behind, spare, position_ids[:, : width - draft_width]], 1),
        )
        past.set_columns(columns, width, moves)
        m = columns.shape[1]
        before_root = uncached & (torch.arange(n, device=device) < settled[:, None] - 1)
        root = row * m + before_root.sum(1, keepdim=True)
        rest = row * m + text.shape[1] + torch.arange(draft_positions.shape[1], device=device)
        hidden = past.hidden_states(inputs, torch.cat([root, rest], 1).flatten())
        logits, hidden = self.denoiser.project(hidden).unflatten(0, (b, -1)), hidden.unflatten(0, (b, -1))
        return logits[:, : drafted + 1].float(), logits[:, drafted + 1 :], hidden[:, drafted + 1 :]


def _first_run(open: Bool[Tensor, "b n"]) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """The first open position of each row and the position after its run of them; n where there is none."""
    n = open.shape[1]
    at = torch.arange(n, device=open.device)
    first = torch.where(open, at, n).amin(1)
    return first, torch.where(~open & (at > first[:, None]), at, n).amin(1)
