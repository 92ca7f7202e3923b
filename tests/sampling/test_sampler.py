"""The denoising loop: reference samplers, exact distributions, and independent rows."""

from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from diffusify.canvas import Canvas, Move
from diffusify.diffusion.attention import Bidirectional, BlockCausal, Causal
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.picking import Draw
from diffusify.diffusion.policies import Ancestral, Klass, Policy, Rdm, ReMdm, Unmask
from diffusify.diffusion.quotas import Accelerating, Evenly, Threshold
from diffusify.diffusion.ranking import Leftmost, Random
from diffusify.diffusion.rng import RowGenerators
from diffusify.diffusion.schedules import Cosine, Linear, NoiseSchedule
from diffusify.diffusion.step import StepState
from diffusify.sampling.sampler import Sampler, denoise
from tests.families import MASK, tiny_denoiser

DATA = Path(__file__).parents[1] / "data"


def last(frames):
    *_, frame = frames
    return frame


class TopKTies:
    """The default policy, with ties in the order of `torch.topk` instead of from left to right."""

    def __call__(self, state: StepState) -> Move:
        default = Unmask()(state)
        write = torch.zeros_like(default.write)
        for row, count in enumerate(Evenly()(state).tolist()):
            write[row, state.guess.score[row].topk(count).indices] = True
        for row in range(len(write)):  # the same choice, up to ties
            same = [state.guess.score[row][m[row]].sort().values for m in (default.write, write)]
            assert torch.equal(*same)
        return Move(write, default.erase)


@pytest.mark.parametrize(("width", "steps"), [(32, 32), (32, 8), (8, 16), (4, 32)])
def test_low_confidence_decoding_equals_llada_s_sampler(width: int, steps: int) -> None:
    """Token for token the output of LLaDA's own sampler on a toy network.

    The toy network gives equal logits to many positions, and LLaDA's sampler breaks ties in the order of `torch.topk`.
    """
    given = load_file(DATA / "low_confidence.safetensors")
    weight, prompts = given["toy_weight"], given["prompts"]

    def toy(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        hidden = weight[canvas.tokens]
        logits = hidden + 0.7 * hidden.roll(1, 1) + 0.5 * hidden.roll(-1, 1) + hidden.mean(1, keepdim=True)
        logits[..., 63] = -torch.inf
        return LazyLogits.from_tensor(logits[positions])

    canvas = Canvas.from_tokens([[*prompt, *[None] * 32] for prompt in prompts.tolist()], noise=63, pad=0)
    window = (torch.arange(36) - 4).clamp_min(0) // width
    frame = last(Sampler(policy=TopKTies(), steps=steps)(toy, canvas, window.expand(2, 36), noise=63))
    assert torch.equal(frame.canvas.tokens, given[f"expected_block{width}_steps{steps}"])
    assert frame.forwards == steps


@pytest.mark.parametrize("curve", ["linear", "cosine"])
@pytest.mark.parametrize("conditional", [False, True], ids=["uncond", "cond"])
def test_rdm_decoding_equals_the_paper_s_code(curve: Literal["linear", "cosine"], conditional: bool) -> None:
    """The same canvas after each of eight steps as the authors' routing on recorded logits."""
    given = load_file(DATA / f"rdm_decode_{'cond' if conditional else 'uncond'}_{curve}.safetensors")
    steps = iter(given["logits"])

    def recorded(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        return LazyLogits.from_tensor(next(steps)[positions])

    editable = given["editable"]
    start = Canvas(given["tokens"], editable, editable, torch.ones_like(given["tokens"]))
    noise = int(given["tokens"][editable][0])
    sampler = Sampler(policy=Rdm(curve, conditional), steps=8)
    frames = list(sampler(recorded, start, noise=noise))
    assert len(frames) == 8
    for frame, tokens, open in zip(frames, given["expected_tokens"], given["expected_open"], strict=True):
        assert torch.equal(frame.canvas.tokens, tokens)
        assert torch.equal(frame.canvas.open, open)


@pytest.mark.parametrize("how", ["cap", "rescale"])
@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_remasking_keeps_the_noise_level(how: Literal["cap", "rescale"], schedule: NoiseSchedule) -> None:
    """The share of open positions after each step is that of the schedule, in spite of remasking (ReMDM)."""
    n, steps = 40_000, 8

    def flat(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        return LazyLogits.from_tensor(torch.zeros(int(positions.sum()), 3))

    policy = ReMdm(Ancestral(schedule), how, eta=0.5, schedule=schedule)
    canvas = Canvas.from_tokens([[None] * n], noise=3, pad=0)
    sampler = Sampler(policy=policy, steps=steps)
    before, remasked = canvas, 0
    for step, frame in enumerate(
        sampler(flat, canvas, noise=3, rng=RowGenerators((torch.Generator().manual_seed(0),))), 1
    ):
        expected = 1 - float(schedule.alpha(torch.tensor(1 - step / steps)))
        share = float(frame.canvas.open.float().mean())
        assert abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 1e-9
        remasked += int((frame.canvas.open & ~before.open).sum())
        before = frame.canvas
    assert step == steps and remasked > n / 20


@pytest.mark.parametrize("policy", [Unmask(), Unmask(quota=Threshold(0.1)), Ancestral()])
@pytest.mark.parametrize("how", ["cap", "rescale", "confidence"])
def test_remasking_works_with_any_policy_and_terminates(
    policy: Policy, how: Literal["cap", "rescale", "confidence"]
) -> None:
    denoiser = tiny_denoiser("bert", Bidirectional())
    canvas = Canvas.from_tokens([[5, *[None] * 12, 6], [7, *[None] * 3]], noise=MASK, pad=0)
    sampler = Sampler(policy=ReMdm(policy, how, eta=0.3), steps=30)  # type: ignore[arg-type]
    frames = list(sampler(denoiser.predict, canvas, noise=MASK, rng=RowGenerators((torch.Generator().manual_seed(0),))))
    opened = [(b.canvas.open & ~a.canvas.open).any() for a, b in zip(frames, frames[1:], strict=False)]
    assert not frames[-1].canvas.open.any() and any(opened)
    assert torch.equal(frames[-1].canvas.tokens[~canvas.editable], canvas.tokens[~canvas.editable])


def test_stochastic_routing_terminates_and_depends_on_the_seed() -> None:
    denoiser = tiny_denoiser("bert", Bidirectional())
    canvas = Canvas.from_tokens([[5, *[None] * 12, 6], [7, *[None] * 5]], noise=MASK, pad=0)

    def generate(seed: int) -> torch.Tensor:
        frames = Sampler(policy=Rdm(noise=5.0), steps=6)(
            denoiser.predict, canvas, noise=MASK, rng=RowGenerators((torch.Generator().manual_seed(seed),))
        )
        result = last(frames).canvas
        assert not result.open.any()
        return result.tokens

    assert torch.equal(generate(0), generate(0))
    assert any(not torch.equal(generate(0), generate(seed)) for seed in range(1, 5))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_leftmost_greedy_under_causal_attention_is_ar_decoding(family: str) -> None:
    """One token at a time from left to right equals `transformers`' greedy decoding."""
    denoiser = tiny_denoiser(family, Causal())
    prompt = [5, 9, 33]
    settings = GenerationConfig(
        max_new_tokens=20, do_sample=False, suppress_tokens=[MASK], pad_token_id=0, eos_token_id=None
    )
    generate: Any = denoiser.network.generate
    expected = generate(torch.tensor([prompt]), generation_config=settings)
    canvas = Canvas.from_tokens([[*prompt, *[None] * 20]], noise=MASK, pad=0)
    frame = last(Sampler(policy=Unmask(Leftmost()))(denoiser.predict, canvas, noise=MASK))
    assert frame.canvas.tokens.tolist() == expected.tolist()


@pytest.mark.parametrize(("policy", "steps"), [(Unmask(Random()), None), (Ancestral(), 120)])
def test_sampling_from_a_known_posterior(policy: Policy, steps: int | None) -> None:
    """Chi-square test: decoding with the exact posterior of a toy distribution samples from that distribution."""
    joint = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 2
    joint = joint / joint.sum()

    logits = torch.full((4, 4, 4, 3, 3), torch.nan, dtype=torch.float64)  # by the tokens (3: open), then the position
    for state in product(range(4), repeat=3):
        given = joint[tuple(slice(None) if token == 3 else slice(token, token + 1) for token in state)]
        for i in (i for i, token in enumerate(state) if token == 3):
            logits[(*state, i)] = given.sum([axis for axis in range(3) if axis != i]).log()

    def posterior(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        state = canvas.tokens.masked_fill(canvas.open, 3)
        return LazyLogits.from_tensor(logits[tuple(state.T)][positions])

    samples = 3000
    canvas = Canvas.from_tokens([[None] * 3] * samples, noise=9, pad=0)
    sampler = Sampler(Draw(), policy, steps=steps)
    frame = last(sampler(posterior, canvas, noise=9, rng=RowGenerators((torch.Generator().manual_seed(0),))))
    code = (frame.canvas.tokens * torch.tensor([9, 3, 1])).sum(1)
    observed = torch.bincount(code, minlength=27).double()
    expected = torch.tensor([joint[t] for t in product(range(3), repeat=3)]) * samples
    assert float(((observed - expected) ** 2 / expected).sum()) < 54.1  # 26 degrees of freedom, p = 0.001


POLICIES = [Unmask(), Unmask(quota=Threshold(0.3)), Unmask(Leftmost())]


@pytest.mark.parametrize("pattern", [Bidirectional(), BlockCausal(4)])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_rows_do_not_depend_on_their_neighbours(policy: Policy, pattern: Bidirectional | BlockCausal) -> None:
    denoiser = tiny_denoiser("llama", pattern)
    rows = [[1, 5, 6, *[None] * 9], [1, *[None] * 5], [1, 7, 8, 9, 10, *[None] * 11]]

    def generate(rows: list) -> torch.Tensor:
        canvas = Canvas.from_tokens(rows, noise=MASK, pad=0)
        window = canvas.position_ids // 4 if pattern != Bidirectional() else None
        return last(Sampler(policy=policy)(denoiser.predict, canvas, window, noise=MASK)).canvas.tokens

    together = generate(rows)
    for i, row in enumerate(rows):
        assert generate([row])[0].tolist() == together[i, : len(row)].tolist()


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("policy", [*POLICIES, Rdm(), ReMdm(), Klass()], ids=str)
def test_settled_positions_do_not_change(policy: Policy, width: int) -> None:
    """Settled positions only grow in number, and without remasking they reach up to the first open position."""
    canvas = Canvas.from_tokens([[5, 9, *[None] * 14], [4, None, 7, *[None] * 9]], noise=MASK, pad=0)
    sampler = Sampler(pick=Draw(1.0), policy=policy)
    frames = list(sampler(tiny_denoiser("llama").predict, canvas, canvas.position_ids // width, noise=MASK))
    for before, after in pairwise(frames):
        assert (before.settled <= after.settled).all()
        for row, count in enumerate(before.settled.tolist()):
            assert not before.canvas.open[row, :count].any()
            assert torch.equal(before.canvas.tokens[row, :count], frames[-1].canvas.tokens[row, :count])
        if not getattr(policy, "remasks", False) and not getattr(policy, "rescores", False):
            assert torch.equal(before.settled, (before.canvas.open.long().cumsum(1) == 0).sum(1))


def test_each_row_may_have_its_own_sampler() -> None:
    """Each row of a batch with different samplers is what it is on its own."""
    denoiser = tiny_denoiser("llama")
    rows = [
        [1, 5, 6, *[None] * 9],
        [1, *[None] * 7],
        [1, 7, 8, 9, *[None] * 12],
        [1, 3, *[None] * 10],
        [1, *[None] * 6],
    ]
    samplers = [
        Sampler(Draw(2.0), Ancestral(), steps=5),
        Sampler(Draw(0.5, top_k=3), Unmask(Random())),
        Sampler(policy=Rdm(), steps=6),
        Sampler(
            policy=Klass(threshold=0.01, kl_threshold=9.0, history_length=1), banned=(7, 9), repetition_penalty=1.5
        ),
        Sampler(Draw(2.0), Ancestral(), steps=5),
    ]

    def generate(indices: list[int]) -> torch.Tensor:
        canvas = Canvas.from_tokens([rows[i] for i in indices], noise=MASK, pad=0)
        rng = RowGenerators.from_seeds(indices)
        frames = denoise(denoiser.predict, canvas, [samplers[i] for i in indices], noise=MASK, rng=rng)
        return last(frames).canvas.tokens

    together = generate([0, 1, 2, 3, 4])
    for i, row in enumerate(rows):
        assert generate([i])[0].tolist() == together[i, : len(row)].tolist()
    assert not set(together[3, 2:12].tolist()) & {7, 9}


def test_no_forward_pass_is_repeated() -> None:
    """Ancestral steps that write nothing cost no forward pass."""
    denoiser, seen = tiny_denoiser("llama"), []

    def counting(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        seen.append(canvas.tokens.tolist())
        return denoiser.predict(canvas, positions=positions)

    canvas = Canvas.from_tokens([[1, 5, *[None] * 6]], noise=MASK, pad=0)
    frames = list(Sampler(Draw(), Ancestral(), steps=100)(counting, canvas, noise=MASK))
    assert len(seen) == frames[-1].forwards <= 6 < len(frames)
    assert all(before != after for before, after in pairwise(seen))


def test_a_logits_processor_is_applied_to_its_own_rows() -> None:
    denoiser = tiny_denoiser("llama")

    def only_seven(logits: torch.Tensor, canvas: Canvas, positions: torch.Tensor) -> torch.Tensor:
        assert len(canvas.tokens) == len(positions) == 1 and len(logits) == positions.sum()
        return torch.full_like(logits, -1e9).index_fill(-1, torch.tensor([7]), 0.0)

    canvas = Canvas.from_tokens([[1, 5, *[None] * 3], [1, *[None] * 4]], noise=MASK, pad=0)
    samplers = [Sampler(), Sampler(logits_processor=only_seven)]
    tokens = last(denoise(denoiser.predict, canvas, samplers, noise=MASK)).canvas.tokens.tolist()
    assert tokens[1] == [1, 7, 7, 7, 7] and tokens[0] != [1, 5, 7, 7, 7]


def test_a_seed_gives_the_same_text_and_given_tokens_do_not_change() -> None:
    denoiser = tiny_denoiser("llama")
    canvas = Canvas.from_tokens(
        [[1, 5, None, None, MASK, None, 6]], noise=MASK, pad=0
    )  # with the mask token in the given text
    texts = []
    for seed in (0, 0, 1, 2):
        sampler = Sampler(Draw(2.0), Ancestral(), steps=3)
        frames = list(
            sampler(denoiser.predict, canvas, noise=MASK, rng=RowGenerators((torch.Generator().manual_seed(seed),)))
        )
        final = frames[-1].canvas
        assert not final.open.any() and frames[-1].forwards <= 3
        assert final.tokens[0, [0, 1, 4, 6]].tolist() == [1, 5, MASK, 6]
        assert (final.tokens[0, [2, 3, 5]] != MASK).all()
        texts.append(final.tokens[0].tolist())
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) > 1


def test_an_end_token_ends_a_row_and_banned_tokens_are_never_written() -> None:
    def toy(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        logits = torch.zeros(*canvas.tokens.shape, 5)
        logits[:, :, 3] = 2.0
        logits[0, 4, 2] = 9.0  # the first row ends at position 4
        return LazyLogits.from_tensor(logits[positions])

    canvas = Canvas.from_tokens([[1, 1, *[None] * 6], [1, 1, *[None] * 6]], noise=4, pad=0)
    frames = list(Sampler(policy=Unmask(Leftmost()), end_token_id=2)(toy, canvas, noise=4))
    assert frames[-1].forwards == 6
    assert frames[-1].canvas.open.sum(1).tolist() == [3, 0]
    frames = list(Sampler(banned=(3, 2), end_token_id=2)(toy, canvas, noise=4))
    assert set(frames[-1].canvas.tokens[:, 2:].flatten().tolist()) <= {0, 1, 4}


@pytest.mark.parametrize("policy", [Unmask(), Unmask(quota=Threshold(0.99)), Klass(), Unmask(quota=Accelerating())])
@pytest.mark.parametrize("end", [2, (3, 2)])
def test_nothing_behind_an_end_token_costs_a_step(policy: Policy, end: int | tuple[int, ...]) -> None:
    """The model sees both ways and is sure of the end long before it is of the text in front of it."""

    def toy(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        logits = torch.zeros(*canvas.tokens.shape, 5)
        logits[:, :, 1] = 2.0
        logits[0, 6, 2] = 9.0
        asked.append(positions.nonzero()[:, 1].tolist())
        return LazyLogits.from_tensor(logits[positions])

    asked: list[list[int]] = []
    canvas = Canvas.from_tokens([[1, 1, *[None] * 32]], noise=4, pad=0)
    *_, last_frame = Sampler(policy=policy, end_token_id=end)(toy, canvas, noise=4)
    assert last_frame.forwards == 5 if policy == Unmask() else last_frame.forwards <= 5
    assert last_frame.canvas.tokens[0, 2:7].tolist() == [1, 1, 1, 1, 2]
    assert last_frame.canvas.open[0, 7:].all()
    assert len(asked[0]) == 32 and all(max(positions) < 6 for positions in asked[1:])


def test_a_removed_end_token_opens_the_text_behind_it_again() -> None:
    def toy(canvas: Canvas, *, positions: torch.Tensor) -> LazyLogits:
        """The end at position 3 is likely until position 2 is written."""
        logits = torch.zeros(*canvas.tokens.shape, 5)
        logits[:, :, 1] = 2.0
        logits[:, 3, 2] = torch.where(canvas.open[:, 2], 9.0, -9.0)
        return LazyLogits.from_tensor(logits[positions])

    def remask_the_end(state: StepState) -> Move:
        return Move(Unmask()(state).write, erase=~state.canvas.open & (state.canvas.tokens == 2))

    canvas = Canvas.from_tokens([[1, 1, *[None] * 6]], noise=4, pad=0)
    frames = list(Sampler(policy=remask_the_end, end_token_id=2)(toy, canvas, noise=4))
    assert [frame.canvas.written.sum().item() for frame in frames] == [1, 1, 3, 4, 5, 6]
    assert frames[-1].canvas.tokens[0].tolist() == [1] * 8


def test_steps_are_divided_among_blocks() -> None:
    denoiser = tiny_denoiser("llama", BlockCausal(4))
    canvas = Canvas.from_tokens([[1, 5, 6, 7, *[None] * 16]], noise=MASK, pad=0)
    for steps, forwards in ((16, 16), (8, 8), (4, 4), (None, 16), (6, 6), (10, 10), (5, 5), (13, 13), (2, 4)):
        frame = last(Sampler(steps=steps)(denoiser.predict, canvas, canvas.position_ids // 4, noise=MASK))
        assert frame.forwards == forwards
    canvas = Canvas.from_tokens([[1, 5, 6, *[None] * 16]], noise=MASK, pad=0)  # blocks of 1, 4, 4, 4 and 3 positions
    for steps in (5, 6, 7, 11):
        frames = Sampler(steps=steps)(denoiser.predict, canvas, canvas.position_ids // 4, noise=MASK)
        assert last(frames).forwards == steps


def test_zero_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        Sampler(steps=0)
