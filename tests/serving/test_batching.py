"""A text does not depend on its neighbours: whatever is written beside it, and whenever that begins or ends."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Bidirectional, BlockCausal, Prefix
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
from tests.families import CAUSAL, MASK, tiny_denoiser

POLICIES = [
    Unmask(), Unmask(Random(), Threshold(0.3)), Unmask(Leftmost()), Ancestral(), Rdm(), ReMdm(), Klass(),
]  # fmt: skip
Way = Callable[[Denoiser, Canvas, RowGenerators], Iterator[Frame]]


def loops(kind: str) -> list[Way]:
    """Every way to write with a kind of model."""
    samplers = [Sampler(policy=policy, pick=Draw(0.9)) for policy in POLICIES] + [Sampler(steps=3)]

    def plain(sampler: Sampler, model: Callable[[Denoiser], Any], width: int) -> Way:
        return lambda denoiser, canvas, rng: sampler(
            model(denoiser), canvas, canvas.position_ids // width, noise=MASK, rng=rng
        )

    def guided(denoiser: Denoiser) -> GuidedDenoiser:
        return GuidedDenoiser(denoiser.predict, denoiser.predict, 0.5, MASK)

    if kind == "block":
        ways = [plain(sampler, BlockCache, 4) for sampler in samplers]
        ways += [plain(sampler, lambda d: d.predict, 4) for sampler in samplers[:3]]
        ways += [lambda denoiser, canvas, rng: Speculative(denoiser)(canvas, noise=MASK, rng=rng)]
        return [*ways, plain(samplers[0], guided, 4)]
    ways = [plain(sampler, lambda d: d.predict, 64) for sampler in samplers]
    if kind != "masked":  # which keeps no keys and values
        ways += [plain(sampler, lambda d: WindowCache(d, "dual", refresh=3), 6) for sampler in samplers]
    ways += [plain(Sampler(policy=Wino(), pick=Draw(0.8)), ShadowDenoiser, 64)]
    return [*ways, plain(samplers[1], guided, 64)]


def denoiser_of(kind: str) -> Denoiser:
    if kind == "masked":
        return tiny_denoiser("bert", Bidirectional())
    return tiny_denoiser("llama", {"block": BlockCausal(4), "bidirectional": Bidirectional(), "prefix": Prefix()}[kind])


def room(lengths: tuple[int, int]) -> Canvas:
    given, open = lengths
    return Canvas.from_tokens([[3 + (5 * i + given) % 40 for i in range(given)] + [None] * open], noise=MASK, pad=0)


def last_of(frames: Iterator[Frame]) -> tuple[list[int], torch.Tensor, int]:
    *_, last = frames
    return last.canvas.tokens.flatten().tolist(), last.score, last.forwards


requests = st.lists(
    st.tuples(st.integers(0, 99), st.tuples(st.integers(1, 14), st.integers(1, 20)), st.integers(0, 12)), min_size=2
)


@pytest.mark.parametrize("kind", ["block", "bidirectional", "prefix", "masked"])
@given(requests=requests)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_neighbours_make_no_difference(kind: str, requests: list[tuple[int, tuple[int, int], int]]) -> None:
    """Requests (way, lengths, the pass at which they join) give what each gives alone, in as many forwards."""
    denoiser, ways = denoiser_of(kind), loops(kind)
    batcher, found = PassBatcher(denoiser), {}

    def work(number: int, way: Way, lengths: tuple[int, int], model: Denoiser) -> tuple[list[int], torch.Tensor, int]:
        return last_of(way(model, room(lengths), RowGenerators.seeded([number])))

    left = list(enumerate(requests))
    while left or batcher.loops:
        for number, (way, lengths, _) in [one for one in left if one[1][2] <= batcher.passes]:

            def run(number: int = number, way: int = way, lengths: tuple[int, int] = lengths) -> None:
                found[number] = work(number, ways[way % len(ways)], lengths, batcher.denoiser)

            batcher.join(run)
        left = [one for one in left if one[1][2] > batcher.passes]
        if batcher.loops:
            batcher.advance()
        elif left:
            batcher.passes = min(one[1][2] for one in left)  # nobody is there; the next one comes now
    for number, (way, lengths, _) in enumerate(requests):
        tokens, score, forwards = work(number, ways[way % len(ways)], lengths, denoiser)
        assert found[number][0] == tokens
        assert found[number][2] == forwards
        torch.testing.assert_close(found[number][1], score, atol=1e-4, rtol=1e-4)
    assert batcher.pool.height == 0


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_every_family_shares_a_pool(family: str) -> None:
    """Sliding windows and learned positions included."""
    windows = {"sliding_window": 5} if family in ("mistral", "gemma3_text") else {}
    kernel = "eager" if family == "gemma2" else "sdpa"
    denoiser = tiny_denoiser(family, BlockCausal(4), kernel=kernel, **windows)
    batcher, found = PassBatcher(denoiser), {}
    shapes = [(3, 9), (14, 2), (1, 20), (7, 7)]
    for number, lengths in enumerate(shapes):

        def run(number: int = number, lengths: tuple[int, int] = lengths) -> None:
            model = BlockCache(batcher.denoiser)
            found[number] = last_of(Sampler()(model, room(lengths), room(lengths).position_ids // 4, noise=MASK))

        batcher.join(run)
    alone = [
        last_of(Sampler()(BlockCache(denoiser), room(each), room(each).position_ids // 4, noise=MASK))
        for each in shapes
    ]
    while batcher.loops:
        batcher.advance()
    assert [found[i][0] for i in range(4)] == [tokens for tokens, _, _ in alone]
    assert batcher.passes < sum(forwards for _, _, forwards in alone)


def test_one_that_leaves_or_fails_takes_nobody_along() -> None:
    denoiser = denoiser_of("block")
    batcher, found = PassBatcher(denoiser), []

    def write() -> None:
        canvas = room((3, 16))
        found.append(last_of(Sampler()(BlockCache(batcher.denoiser), canvas, canvas.position_ids // 4, noise=MASK)))

    def fail() -> None:
        try:
            batcher.denoiser.predict(room((3, 4)), positions=room((3, 4)).open)
            raise RuntimeError("of its own")
        except RuntimeError as error:
            found.append(str(error))

    stays, goes = batcher.join(write), batcher.join(write)
    batcher.join(fail)
    batcher.advance()
    batcher.leave(goes)
    assert batcher.loops == [stays]
    while batcher.loops:
        batcher.advance()
    assert found[0] == "of its own" and len(found) == 2
    assert batcher.pool.height == 0


def test_what_requests_look_at_is_never_out_of_place() -> None:
    """While logits are made, the network's body stands aside; who asks beside that thread is told the same."""
    denoiser = denoiser_of("block")
    head, seen = denoiser.network.get_output_embeddings(), []
    assert head is not None
    head.register_forward_hook(lambda *_: seen.append((denoiser.vocabulary, denoiser.context)))
    denoiser.predict(room((3, 4)), positions=room((3, 4)).open).logits  # noqa: B018
    assert seen == [(48, 64)]
