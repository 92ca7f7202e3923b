"""Masked spans that change their length: noise that the length tokens invert, bounds, every policy, rows alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.corruption import Fixed, Noised, PerText, RowShard, noised
from diffusify.diffusion.length_noise import LengthNoise
from diffusify.diffusion.length_tokens import LengthTokens, SpanLengths
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.picking import Draw
from diffusify.diffusion.policies import Ancestral, Klass, Policy, Rdm, ReMdm, Unmask, Wino
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.ranking import Leftmost, Random
from diffusify.diffusion.rng import RowGenerators
from diffusify.diffusion.schedules import Linear
from diffusify.sampling.kv_cache import WindowCache
from diffusify.sampling.sampler import Frame, Sampler, denoise
from diffusify.sampling.shadow import ShadowDenoiser
from tests.families import MASK, VOCABULARY, tiny_denoiser

EXPAND, DELETE = 45, 46
TOKENS = LengthTokens(EXPAND, DELETE)
POLICIES: list[Policy] = [
    Unmask(),
    Unmask(Random()),
    Unmask(Leftmost(), Threshold(0.4)),
    Ancestral(),
    Rdm(),
    ReMdm(eta=0.3),
    Klass(kl_threshold=5.0, threshold=0.2),
    Wino(threshold=0.2, threshold_back=0.3),
]


def texts(lengths: list[int], width: int) -> Canvas:
    """A row of documents of different tokens, whose first ones are given."""
    tokens, document = torch.zeros(1, width, dtype=torch.long), torch.zeros(1, width, dtype=torch.long)
    tokens[0, : sum(lengths)] = 1 + torch.arange(sum(lengths))
    document[0, : sum(lengths)] = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
    clean = Canvas.clean(tokens, document)
    return replace(clean, editable=clean.editable & (clean.position_ids > 0))


def noise_of(clean: Canvas, noise: LengthNoise, time: PerText | Fixed, seed: int) -> Noised:
    rng = torch.Generator().manual_seed(seed)
    return noise(noised(clean, time, Linear(), MASK, generator=rng), TOKENS, Linear(), MASK, generator=rng)


class Oracle:
    """A denoiser that knows what each position stands for: no token, one, or several.

    It does not depend on the canvas alone, so no step may leave the canvas as it was.
    """

    def __init__(self, targets: list[int], text: list[int]) -> None:
        self.parts, at = [], 0
        for i, target in enumerate(targets):
            end = at + (target != DELETE)
            if target == EXPAND:  # how expand tokens in a row divide their text does not matter
                others = [t for t in targets[i + 1 :] if t != DELETE]
                run = next((n for n, t in enumerate(others) if t != EXPAND), len(others))
                end = (text.index(others[run]) if run < len(others) else len(text)) - 2 * run
            self.parts.append(text[at:end])
            at = end

    def __call__(self, canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        answers = [DELETE if not part else EXPAND if len(part) > 1 else part[0] for part in self.parts]
        logits = torch.full((1, canvas.tokens.shape[1], VOCABULARY), -9.0)
        logits[0, torch.arange(len(answers)), torch.tensor(answers)] = 9.0
        return LazyLogits.from_tensor(logits[positions])

    def follow(self, frame: Frame) -> None:
        if frame.columns is None:
            return
        index, copy = frame.columns.index[0].tolist(), frame.columns.copy[0].tolist()
        halves = {i for i, c in zip(index, copy, strict=True) if c}
        parts = []
        for i, c in zip(index, copy, strict=True):
            part = self.parts[i] if i >= 0 else []
            half = (len(part) + 1) // 2
            parts.append(part[half:] if c else part[:half] if i in halves else part)
        self.parts = parts


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    expand=st.floats(0, 0.95),
    delete=st.floats(0, 0.95),
    seed=st.integers(0, 2**31),
    time=st.sampled_from([PerText(), PerText(grid=5, draws=2), Fixed(1.0)]),
    policy=st.sampled_from([Unmask(), Unmask(Random()), Unmask(Leftmost()), ReMdm(Unmask(), eta=0.3)]),
)
def test_answering_with_the_targets_restores_the_text(lengths, expand, delete, seed, time, policy) -> None:
    """The noise is inverted by executing the length tokens, whichever policy writes the targets."""
    clean = texts(lengths, 200)
    batch, text = noise_of(clean, LengthNoise(expand, delete), time, seed), clean.tokens[clean.real].tolist()
    for view in range(batch.views):
        canvas = batch.canvas[view : view + 1]
        targets = batch.clean[view : view + 1][canvas.real].tolist()
        assert all(batch.clean[view][~canvas.open[0]] == canvas.tokens[0][~canvas.open[0]])
        assert canvas.open[0][(batch.clean[view] == EXPAND) | (batch.clean[view] == DELETE)].all()
        oracle = Oracle(targets, text)
        bounds = torch.tensor([[0, 300]])
        free = SpanLengths(TOKENS, canvas.open.long(), bounds, bounds)
        last = canvas
        for frame in denoise(oracle, canvas, [Sampler(policy=policy)], noise=MASK, lengths=free):
            oracle.follow(frame)
            last = frame.canvas
        assert last.tokens[last.real].tolist() == text and not last.open.any()
        assert last.document[last.real].tolist() == clean.document[clean.real].tolist()


def test_noise_of_a_row_does_not_depend_on_its_process() -> None:
    """Rows of a shard are noised as in the whole step; deletes are no more of the loss than tokens are."""
    clean = Canvas.clean(torch.randint(1, 40, (4, 64)))
    noise, rows = LengthNoise(0.6, 0.4), torch.tensor([2, 0])

    def run(canvas: Canvas, shard: RowShard | None) -> Noised:
        rng = torch.Generator().manual_seed(3)
        batch = noised(canvas, PerText(), Linear(), MASK, generator=rng, shard=shard)
        return noise(batch, TOKENS, Linear(), MASK, generator=rng, shard=shard)

    whole, part = run(clean, None), run(clean[rows], RowShard(clean.document, rows))
    for a, b in (
        (whole.canvas.tokens[rows], part.canvas.tokens),
        (whole.clean[rows], part.clean),
        (whole.t[rows], part.t),
    ):
        assert torch.equal(a, b)
    deletes = whole.clean == DELETE
    assert deletes.any() and (whole.clean == EXPAND).any()
    torch.testing.assert_close(whole.weight[deletes], whole.t[deletes])
    assert (whole.weight[whole.canvas.open & ~deletes] == 1).all()


def test_lengths_follow_the_exact_distribution() -> None:
    """With constant probabilities, texts are distributed as an enumeration of all choices says."""
    share = torch.tensor([0.45, 0.35, 0.2])  # a token, expand, delete

    def toy(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        logits = torch.full((int(positions.sum()), VOCABULARY), -torch.inf)
        logits[:, [1, EXPAND, DELETE]] = share.log()
        return LazyLogits.from_tensor(logits)

    def exact(written: int, open: int, spare: int, surplus: int) -> dict[int, float]:
        if not open:
            return {written: 1.0}
        found: dict[int, float] = {}
        allowed = share * torch.tensor([1.0, spare > 0, surplus > 0])
        nexts = [(written + 1, open - 1, spare, surplus), (written, open + 1, spare - 1, surplus + 1)]
        nexts.append((written, open - 1, spare, surplus - 1))
        for probability, state in zip((allowed / allowed.sum()).tolist(), nexts, strict=True):
            for length, p in (exact(*state) if probability else {}).items():
                found[length] = found.get(length, 0.0) + probability * p
        return found

    rows = 3000
    canvas = Canvas.from_tokens([[5, None, None, 6]] * rows, noise=MASK, pad=0)
    lengths = SpanLengths(TOKENS, canvas.open.long(), torch.tensor([[0, 3]] * rows), torch.tensor([[0, 1]] * rows))
    sampler = Sampler(Draw(), Unmask(Random()))
    rng = RowGenerators((torch.Generator().manual_seed(0),))
    *_, frame = denoise(toy, canvas, [sampler] * rows, noise=MASK, lengths=lengths, rng=rng)
    sizes = (frame.canvas.real.sum(1) - 2).bincount() / rows
    expected = exact(0, 2, 3, 1)
    assert set(sizes.nonzero()[:, 0].tolist()) == set(expected) == {1, 2, 3, 4, 5}
    for length, p in expected.items():
        assert abs(float(sizes[length]) - p) < 4 * (p * (1 - p) / rows) ** 0.5


def resizing_denoiser(bias: float = 6.0) -> Any:
    """A random network that likes to write length tokens."""
    denoiser = tiny_denoiser()
    denoiser.diffusion_config = replace(denoiser.diffusion_config, length_tokens=TOKENS)
    denoiser = denoiser.resizing
    plain = denoiser.project

    def project(hidden: torch.Tensor) -> torch.Tensor:
        return plain(hidden).index_add(1, torch.tensor(TOKENS.ids), torch.full((len(hidden), 2), bias))

    denoiser.project = project  # type: ignore[method-assign]
    return denoiser


ROWS = [[1, 2, *[None] * 3, 3, *[None] * 2, 4, 5], [6, *[None] * 4, 7, None, 8], [9, 10, None, 11, None, None]]
SPANS = [[0, 0, 1, 1, 1, 0, 2, 2, 0, 0], [0, 1, 1, 1, 1, 0, 2, 0], [0, 0, 1, 0, 0, 0]]  # the last one is fixed
SPARE, SURPLUS = [[0, 4, 3], [0, 5, 2], [0, 6, 0]], [[0, 2, 1], [0, 3, 0], [0, 0, 0]]


def resizable(rows: list[int]) -> tuple[Canvas, SpanLengths]:
    canvas = Canvas.from_tokens([ROWS[row] for row in rows], noise=MASK, pad=0)
    n = canvas.tokens.shape[1]
    span = torch.tensor([SPANS[row] + [0] * (n - len(SPANS[row])) for row in rows])
    spare, surplus = (torch.tensor([each[row] for row in rows]) for each in (SPARE, SURPLUS))
    return canvas, SpanLengths(TOKENS, span, spare, surplus)


def frames_of(denoiser: Any, rows: list[int], policy: Policy, window: int = 99, **fields: Any) -> Iterator[Frame]:
    canvas, lengths = resizable(rows)
    model = ShadowDenoiser(denoiser) if isinstance(policy, Wino) else denoiser.predict
    rng = RowGenerators.from_seeds([10 + row for row in rows])
    sampler = Sampler(Draw(), policy, **fields)
    windows = canvas.position_ids // window
    return denoise(model, canvas, [sampler] * len(rows), windows, noise=MASK, rng=rng, lengths=lengths)


@pytest.mark.parametrize(
    ("policy", "fields"),
    [*((policy, {}) for policy in POLICIES), (Unmask(), {"window": 4}), (Rdm(), {"steps": 3, "window": 4})],
    ids=lambda value: type(value).__name__,
)
def test_every_policy_ends_within_the_bounds_and_rows_are_independent(policy: Policy, fields: dict[str, int]) -> None:
    """Given text never changes, spans stay within their bounds, and a batch gives each row what it gets alone."""
    denoiser = resizing_denoiser()
    last, resized = None, 0
    for step, frame in enumerate(frames_of(denoiser, [0, 1, 2], policy, **fields)):
        assert step < 200
        for row, cells in enumerate(ROWS):
            kept = frame.canvas.tokens[row][frame.canvas.real[row] & ~frame.canvas.editable[row]].tolist()
            assert kept == [token for token in cells if token is not None]
        assert not torch.isin(frame.canvas.tokens, torch.tensor(TOKENS.ids)).any()
        resized += frame.columns is not None
        last = frame
    assert last is not None and resized and not last.canvas.open.any()
    for row, cells in enumerate(ROWS):
        flags = last.canvas.editable[row][last.canvas.real[row]].tolist()
        runs = [len(run) for run in "".join("x" if flag else " " for flag in flags).split()]
        starts = [len(run) for run in "".join("x" if cell is None else " " for cell in cells).split()]
        for i, (run, start) in enumerate(zip(runs, starts, strict=True), 1):
            spare, surplus = (SPARE[row][i], SURPLUS[row][i]) if i in SPANS[row] else (0, 0)
            assert start - surplus <= run <= start + spare
        *_, alone = frames_of(denoiser, [row], policy, **fields)
        n = int(last.canvas.real[row].sum())
        assert alone.canvas.tokens.tolist() == [last.canvas.tokens[row, :n].tolist()]
        torch.testing.assert_close(alone.score[0], last.score[row, :n], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_caches_follow_spans_that_change(kind: Any) -> None:
    """Refreshed in every pass, an approximate cache is the denoiser itself."""
    denoiser = resizing_denoiser()
    texts = []
    for refresh in (None, 1, 32):
        canvas, lengths = resizable([0])
        model = denoiser.predict if refresh is None else WindowCache(denoiser, kind, refresh)
        rng, windows = RowGenerators.from_seeds([5]), canvas.position_ids // 4
        frames = denoise(model, canvas, [Sampler(Draw())], windows, noise=MASK, rng=rng, lengths=lengths)
        *_, frame = frames
        assert not frame.canvas.open.any()
        texts.append(frame.canvas.tokens.tolist())
    assert texts[0] == texts[1]
