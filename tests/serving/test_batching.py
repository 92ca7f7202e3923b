"""Batched loops are independent: a text does not depend on the other loops, or on when they join and leave."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from threading import Thread
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusify.canvas import Canvas, Guess
from diffusify.diffusion.attention import Bidirectional, BlockCausal, Prefix
from diffusify.diffusion.logits import LazyLogits
from diffusify.diffusion.picking import Draw
from diffusify.diffusion.policies import Ancestral, Klass, Rdm, ReMdm, Unmask, Wino
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.ranking import Leftmost, Random
from diffusify.diffusion.rng import RowGenerators
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.guidance import GuidedDenoiser
from diffusify.sampling.kv_cache import BlockCache, WindowCache
from diffusify.sampling.sampler import Frame, Sampler
from diffusify.sampling.shadow import ShadowDenoiser
from diffusify.sampling.speculative import Speculative
from diffusify.serving.engine.batching import PassBatcher
from tests.diffusion.test_policies import step_state
from tests.families import CAUSAL, MASK, tiny_denoiser

POLICIES = [
    Unmask(), Unmask(Random(), Threshold(0.3)), Unmask(Leftmost()), Ancestral(), Rdm(), ReMdm(), Klass(),
]  # fmt: skip
SamplingLoop = Callable[[Denoiser, Canvas, RowGenerators], Iterator[Frame]]
Result = tuple[list[int], torch.Tensor, int]  # tokens, scores, forward passes


def sampling_loops(kind: str) -> list[SamplingLoop]:
    """Every sampler, cache and policy that a kind of model supports."""
    samplers = [Sampler(policy=policy, pick=Draw(0.9)) for policy in POLICIES] + [Sampler(steps=3)]

    def loop(sampler: Sampler, model: Callable[[Denoiser], Any], width: int) -> SamplingLoop:
        return lambda denoiser, canvas, rng: sampler(
            model(denoiser), canvas, canvas.position_ids // width, noise=MASK, rng=rng
        )

    def guided(denoiser: Denoiser) -> GuidedDenoiser:
        return GuidedDenoiser(denoiser.predict, denoiser.predict, 0.5, MASK)

    if kind == "block":
        loops = [loop(sampler, BlockCache, 4) for sampler in samplers]
        loops += [loop(sampler, lambda d: d.predict, 4) for sampler in samplers[:3]]
        loops += [lambda denoiser, canvas, rng: Speculative(denoiser)(canvas, noise=MASK, rng=rng)]
        return [*loops, loop(samplers[0], guided, 4)]
    loops = [loop(sampler, lambda d: d.predict, 64) for sampler in samplers]
    if kind != "masked":  # which has no KV cache
        loops += [loop(sampler, lambda d: WindowCache(d, "dual", refresh=3), 6) for sampler in samplers]
    loops += [loop(Sampler(policy=Wino(), pick=Draw(0.8)), ShadowDenoiser, 64)]
    return [*loops, loop(samplers[1], guided, 64)]


@lru_cache
def tiny_model(kind: str) -> Denoiser:
    if kind == "masked":
        return tiny_denoiser("bert", Bidirectional())
    return tiny_denoiser("llama", {"block": BlockCausal(4), "bidirectional": Bidirectional(), "prefix": Prefix()}[kind])


def canvas_of(lengths: tuple[int, int]) -> Canvas:
    """A prompt and open positions, of the given lengths."""
    prompt, open = lengths
    return Canvas.from_tokens([[3 + (5 * i + prompt) % 40 for i in range(prompt)] + [None] * open], noise=MASK, pad=0)


def last_of(frames: Iterator[Frame]) -> Result:
    *_, last = frames
    return last.canvas.tokens.flatten().tolist(), last.score, last.forwards


# The sampling loop, the lengths of prompt and open positions, and the pass in which the loop joins.
requests = st.lists(
    st.tuples(st.integers(0, 99), st.tuples(st.integers(1, 7), st.integers(1, 8)), st.integers(0, 6)),
    min_size=2,
    max_size=4,
)


@pytest.mark.parametrize("kind", ["block", "bidirectional", "prefix", "masked"])
@given(requests=requests)
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
def test_neighbours_make_no_difference(kind: str, requests: list[tuple[int, tuple[int, int], int]]) -> None:
    """Each request gives what it gives alone, in as many forward passes for the same number of drafts."""
    denoiser, loops = tiny_model(kind), sampling_loops(kind)
    batcher, found = PassBatcher(denoiser), {}
    batcher.denoiser.texts_per_pass = denoiser.texts_per_pass  # lossless decoding drafts less where passes are shared

    def generate(number: int, model: Denoiser) -> Result:
        loop, lengths, _ = requests[number]
        return last_of(loops[loop % len(loops)](model, canvas_of(lengths), RowGenerators.from_seeds([number])))

    left = list(range(len(requests)))
    while left or batcher.loops:
        for number in [number for number in left if requests[number][2] <= batcher.passes]:

            def work(number: int = number) -> None:
                found[number] = generate(number, batcher.denoiser)

            batcher.join(work)
            left.remove(number)
        if batcher.loops:
            batcher.advance()
        elif left:
            batcher.passes = min(requests[number][2] for number in left)  # all are finished, so the next one joins now
    for number in range(len(requests)):
        tokens, score, forwards = generate(number, denoiser)
        assert found[number][0] == tokens
        assert found[number][2] == forwards
        torch.testing.assert_close(found[number][1], score, atol=1e-4, rtol=1e-4)
    assert batcher.pool.height == 0


@given(requests=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 12)), min_size=2, max_size=20))
@settings(max_examples=12)
def test_lossless_text_is_the_same_however_many_share_its_passes(requests: list[tuple[int, int]]) -> None:
    """The number of drafts depends on the load, and so do the forward passes, but neither tokens nor scores do."""
    denoiser = tiny_model("block")
    batcher, found = PassBatcher(denoiser), {}

    def generate(number: int, model: Denoiser) -> Result:
        rng = RowGenerators.from_seeds([number])
        return last_of(Speculative(model)(canvas_of(requests[number]), noise=MASK, rng=rng))

    for number in range(len(requests)):

        def work(number: int = number) -> None:
            found[number] = generate(number, batcher.denoiser)

        batcher.join(work)
    while batcher.loops:
        batcher.advance()
    for number in range(len(requests)):
        tokens, score, _ = generate(number, denoiser)
        assert found[number][0] == tokens
        torch.testing.assert_close(found[number][1], score, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["block", "bidirectional", "prefix", "masked"])
def test_samples_of_a_prompt_run_it_once(kind: str) -> None:
    """The first pass has a row for each prompt instead of each text, and every text is the one without that."""
    denoiser, rows = tiny_model(kind), []
    hook = denoiser.network.base_model.register_forward_hook(lambda m, a, out: rows.append(len(out[0])))
    shapes = [(7, 6), (5, 8)]

    def generate(loop: SamplingLoop, model: Denoiser, number: int) -> Result:
        canvas = canvas_of(shapes[number])
        samples = canvas[torch.zeros(3, dtype=torch.long)]
        return last_of(loop(model, samples, RowGenerators.from_seeds([3 * number + i for i in range(3)])))

    for loop in sampling_loops(kind):
        batcher, found = PassBatcher(denoiser), [[], []]
        batcher.denoiser.texts_per_pass = denoiser.texts_per_pass

        def work(results: list[Result], number: int, loop: SamplingLoop, model: Denoiser) -> None:
            results.append(generate(loop, model, number))

        for number in range(2):
            batcher.join(partial(work, found[number], number, loop, batcher.denoiser))
        rows.clear()
        batcher.advance()
        assert rows[0] in (1, 2)  # 1 if the other prompt has a pass of its own
        while batcher.loops:
            batcher.advance()
        for number in range(2):
            tokens, score, _ = generate(loop, denoiser, number)
            [(batched_tokens, batched_score, _)] = found[number]
            assert batched_tokens == tokens
            torch.testing.assert_close(batched_score, score, atol=1e-4, rtol=1e-4)
    hook.remove()


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_every_family_shares_a_pool(family: str) -> None:
    """Also families with sliding windows and learned position embeddings."""
    windows = {"sliding_window": 5} if family in ("mistral", "gemma3_text") else {}
    kernel = "eager" if family == "gemma2" else "sdpa"
    denoiser = tiny_denoiser(family, BlockCausal(4), kernel=kernel, **windows)
    batcher, found = PassBatcher(denoiser), {}
    shapes = [(3, 9), (14, 2), (1, 13), (7, 7)]

    def generate(model: Denoiser, lengths: tuple[int, int]) -> Result:
        canvas = canvas_of(lengths)
        return last_of(Sampler()(BlockCache(model), canvas, canvas.position_ids // 4, noise=MASK))

    for number, lengths in enumerate(shapes):

        def work(number: int = number, lengths: tuple[int, int] = lengths) -> None:
            found[number] = generate(batcher.denoiser, lengths)

        batcher.join(work)
    alone = [generate(denoiser, lengths) for lengths in shapes]
    while batcher.loops:
        batcher.advance()
    assert [found[i][0] for i in range(4)] == [tokens for tokens, _, _ in alone]
    assert batcher.passes < sum(forwards for _, _, forwards in alone)


def test_a_loop_that_leaves_or_fails_does_not_affect_others() -> None:
    denoiser = tiny_model("block")
    batcher, found = PassBatcher(denoiser), []

    def generate() -> None:
        canvas = canvas_of((3, 16))
        found.append(last_of(Sampler()(BlockCache(batcher.denoiser), canvas, canvas.position_ids // 4, noise=MASK)))

    def fail() -> None:
        try:
            batcher.denoiser.predict(canvas_of((3, 4)), positions=canvas_of((3, 4)).open)
            raise RuntimeError("failed")
        except RuntimeError as error:
            found.append(str(error))

    stays, leaves = batcher.join(generate), batcher.join(generate)
    batcher.join(fail)
    batcher.advance()
    batcher.leave(leaves)
    assert batcher.loops == [stays]
    while batcher.loops:
        batcher.advance()
    assert found[0] == "failed" and len(found) == 2
    assert batcher.pool.height == 0


def test_attributes_are_right_while_the_head_runs() -> None:
    """The network's body is replaced while logits are computed; the event loop's thread reads sizes at any time."""
    denoiser = tiny_model("block")
    head, seen = denoiser.network.get_output_embeddings(), []
    assert head is not None
    hook = head.register_forward_hook(lambda *_: seen.append((denoiser.vocab_size, denoiser.context_length)))
    denoiser.predict(canvas_of((3, 4)), positions=canvas_of((3, 4)).open).logits  # noqa: B018
    hook.remove()
    assert seen == [(48, 64)]


def test_a_suspended_guess_blocks_no_other_thread() -> None:
    """A loop that is suspended while it guesses, as when a server stops, leaves no lock behind."""
    state = step_state(torch.ones(1, 2, dtype=torch.bool), torch.randn(2, 5))
    loops: list[greenlet] = []
    guesses: list[Guess] = []

    def suspend() -> None:
        caller = getcurrent()
        logits = LazyLogits(torch.randn(2, 5), lambda hidden, index: caller.switch())
        loops.append(greenlet(lambda: replace(state, logits=logits).guess))
        loops[0].switch()

    for work in (suspend, lambda: guesses.append(state.guess)):
        thread = Thread(target=work, daemon=True)
        thread.start()
        thread.join(60)
    assert loops[0] and guesses
