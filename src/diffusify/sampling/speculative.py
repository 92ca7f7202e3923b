"""Left-to-right text in fewer forwards: the model drafts, and its own AR half checks.

Axes: b texts, n canvas positions, m positions that are run, k drafted tokens, g places where drafts may be cut off.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusify.canvas import Canvas, Guess, Move
from diffusify.diffusion.attention import BlockCausal, Scene
from diffusify.diffusion.luck import Luck
from diffusify.diffusion.picking import Greedy, Pick
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.cache import Columns
from diffusify.sampling.sampler import Frame, finished


class Speculative:
    """AR decoding by self-speculation, for block diffusion that keeps its left-to-right half.

    A pass runs the drafted tokens causally, as text, so it tells the AR model's own choice behind each of them: drafts
    are kept as long as they agree, and the first that does not is replaced. In the same pass masks draft the next
    tokens behind *every* place where the drafts may be cut off (a tree), so no pass is wasted. The text is that of
    greedy AR decoding, or follows exactly the distribution of AR sampling where `pick` draws, whatever the drafts are
    worth; every pass writes at least one token.

    With a `tolerance` above 0 a draft is kept, too, if the AR half gives it a log-probability (nats) at most so far
    below its own choice's: fewer passes, for text that is a little less likely (typical acceptance, Medusa).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pick: Pick = Greedy(),
        tolerance: float = 0.0,
        *,
        banned: tuple[int, ...] = (),
        end_token_id: int | None = None,
    ) -> None:
        pattern = denoiser.diffusion.attention
        if not (isinstance(pattern, BlockCausal) and denoiser.diffusion.keeps_left_to_right):
            raise ValueError(
                "speculative decoding needs a model that keeps its left-to-right half (the block recipe on an AR "
                f"base); this one has {pattern} and shift {denoiser.diffusion.shift}"
            )
        if not denoiser.remembers:
            raise ValueError(f"{denoiser.diffusion.architecture} keeps no keys and values, so it cannot draft ahead")
        if tolerance < 0:
            raise ValueError(f"tolerance={tolerance} must be at least 0 nats, which is lossless")
        self.denoiser, self.pick, self.size = denoiser, pick, pattern.size
        self.tolerance, self.banned, self.end_token_id = tolerance, banned, end_token_id

    @torch.inference_mode()
    def __call__(self, canvas: Canvas, *, noise: int, luck: Luck | None = None) -> Iterator[Frame]:
        """Yield the canvas after every pass. ValueError unless each row is a prompt and room behind it."""
        luck = luck or Luck.seeded(list(range(len(canvas.tokens))), canvas.tokens.device)
        b, n = canvas.tokens.shape
        at = torch.arange(n, device=canvas.tokens.device)
        known = torch.where(canvas.open, at, n).amin(1)  # so many tokens are settled
        end = torch.where(canvas.open, at + 1, 0).amax(1)
        if (canvas.open != ((at >= known[:, None]) & (at < end[:, None]))).any() or (known < 1).any():
            raise ValueError("speculative decoding goes on from prompts; it cannot fill holes")
        k = self.size - 1
        ends = torch.full_like(known, -1 if self.end_token_id is None else self.end_token_id)
        past = Columns(self.denoiser, self.size * k + n)
        score = torch.zeros(b, n, device=canvas.tokens.device)
        start, drafts, forwards = torch.zeros_like(known), known.new_full((b, 0), -1), 0
        while (todo := canvas.open.any(1) & ~finished(canvas, ends)).any():
            stop = torch.where(todo, torch.minimum(known + drafts.shape[1], end), start)
            board = self._with_drafts(canvas.tokens, drafts, known, end)
            logits, ahead = self._pass(board, start, stop, known, drafts.shape[1], noise, past)
            forwards += 1
            # The AR half's own tokens, each behind drafts that it would have to agree with first.
            everywhere = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
            choice, sure = (x.view(everywhere.shape) for x in self.pick(logits.flatten(0, 1), everywhere, luck))
            choice, sure = self._lenient(logits, drafts, choice, sure)
            agree = (drafts == choice[:, :-1]).long().cumprod(1).sum(1)
            written = todo[:, None] & (at >= known[:, None]) & (at <= (known + agree)[:, None]) & canvas.open
            place = (at - known[:, None]).clamp(0, choice.shape[1] - 1)
            guess = Guess(choice.gather(1, place), sure.gather(1, place))
            canvas = canvas.play(Move(written, erase=torch.zeros_like(written)), guess, noise)
            score = torch.where(written, guess.score, score)
            drafts = ahead[torch.arange(b, device=at.device), agree].argmax(-1)
            start = torch.minimum(known + agree, end)
            known = torch.minimum(start + 1, end)
            yield Frame(canvas, score, forwards)

    def _lenient(
        self, logits: Float[Tensor, "b g v"], drafts: Int[Tensor, "b k"], choice: Int[Tensor, "b g"], sure: Tensor
    ) -> tuple[Int[Tensor, "b g"], Float[Tensor, "b g"]]:
        """The AR half's choices, and drafts in their place where these are nearly as likely."""
        if not self.tolerance or not drafts.shape[1]:
            return choice, sure
        likely = logits[:, :-1].log_softmax(-1).gather(2, drafts[..., None])[..., 0]
        near = likely >= sure[:, :-1] - self.tolerance
        return (
            torch.cat([torch.where(near, drafts, choice[:, :-1]), choice[:, -1:]], 1),
            torch.cat([torch.where(near, likely, sure[:, :-1]), sure[:, -1:]], 1),
        )

    def _with_drafts(
        self, tokens: Int[Tensor, "b n"], drafts: Int[Tensor, "b k"], known: Int[Tensor, " b"], end: Int[Tensor, " b"]
    ) -> Int[Tensor, "b n"]:
        """The texts with drafts behind what is settled."""
        if not drafts.shape[1]:
            return tokens
        place = torch.arange(tokens.shape[1], device=tokens.device) - known[:, None]
        inside = (place >= 0) & (place < torch.minimum(end - known, end.new_tensor(drafts.shape[1]))[:, None])
        return torch.where(inside, drafts.gather(1, place.clamp(0, drafts.shape[1] - 1)), tokens)

    def _pass(
        self,
        board: Int[Tensor, "b n"],
        start: Int[Tensor, " b"],
        stop: Int[Tensor, " b"],
        known: Int[Tensor, " b"],
        drafted: int,
        noise: int,
        past: Columns,
    ) -> tuple[Float[Tensor, "b g v"], Float[Tensor, "b g k v"]]:
        """AR logits from the last settled token on, and those of the masks behind each of these places.

        Text stands in the cache at its position, behind the columns of the masks.
        """
        b, n, k, device = len(board), board.shape[1], self.size - 1, board.device
        room = self.size * k
        row = torch.arange(b, device=device)[:, None]
        text = start[:, None] + torch.arange(int((stop - start).amax()), device=device)
        branch = torch.arange(drafted + 1, device=device).repeat_interleave(k)
        masks = (known - 1)[:, None] + branch + 1 + torch.arange(k, device=device).repeat(drafted + 1)
        own = torch.arange(len(branch), device=device).expand(b, -1)
        columns = torch.cat([torch.where(text < stop[:, None], text + room, room + n), own], 1)
        width = room + int(stop.amax())
        spare = masks.new_zeros(b, room - masks.shape[1])
        there = torch.cat([masks, spare, torch.arange(width - room, device=device).expand(b, -1)], 1)

        def rule(b: Tensor, h: Tensor, q: Tensor, key: Tensor) -> Tensor:
            """Text sees earlier text; a branch sees the text up to its place, and itself."""
            is_mask = q < room
            sees = torch.where(is_mask, known[b] - 1 + q // max(k, 1), q - room)
            return torch.where(key < room, is_mask & (q // max(k, 1) == key // max(k, 1)), key - room <= sees)

        scene = Scene(
            tokens=torch.cat([board.gather(1, text.clamp_max(n - 1)), torch.full_like(masks, noise)], 1),
            positions=torch.cat([text.clamp_max(n - 1), masks.clamp_max(n - 1)], 1),
            answers=board,
            ar_answers=board,
            rule=rule,
            ragged=True,
            columns=columns.clamp_max(room + n - 1),
            there=there,
        )
        past.write(columns, width)
        m = columns.shape[1]
        last = (known - 1 - start)[:, None] + torch.arange(drafted + 1, device=device)
        wanted = torch.cat([row * m + last.clamp(0, m - 1), row * m + text.shape[1] + own], 1)
        logits = self.denoiser.project(scene, wanted.flatten(), past=past).view(b, wanted.shape[1], -1)
        if self.banned:
            logits[..., list(self.banned)] = -torch.inf
        return logits[:, : drafted + 1].float(), logits[:, drafted + 1 :].unflatten(1, (drafted + 1, k))
