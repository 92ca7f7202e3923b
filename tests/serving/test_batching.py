"""A text does not depend on its neighbours: whatever is written beside it, and whenever that begins or ends."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import Bidirectional, BlockCausal, Prefix
from diffusify.diffusion.luck import Luck
from diffusify.diffusion.picking import Draw
from diffusify.diffusion.policies import Ancestral, Remask, Reparam, Revoke, Stable, Unmask
from diffusify.diffusion.quotas import Threshold
from diffusify.diffusion.ranks import Leftmost, Random
from diffusify.models.denoiser import Denoiser
from diffusify.sampling.blind import Blind
from diffusify.sampling.cache import BlockCache, WindowCache
from diffusify.sampling.guidance import Guided
from diffusify.sampling.sampler import Frame, Sampler
from diffusify.sampling.speculative import Speculative
from diffusify.serving.batching import Together
from tests.families import CAUSAL, MASK, tiny_denoiser

POLICIES = [
    Unmask(), Unmask(Random(), Threshold(0.3)), Unmask(Leftmost()), Ancestral(), Reparam(), Remask(), Stable(),
]  # fmt: skip
Way = Callable[[Denoiser, Canvas, Luck], Iterator[Frame]]


def loops(kind: str) -> list[Way]:
    """Every way to write with a kind of model."""
    samplers = [Sampler(policy=policy, pick=Draw(0.9)) for policy in POLICIES] + [Sampler(steps=3)]

    def plain(sampler: Sampler, model: Callable[[Denoiser], Any], width: int) -> Way:
        return lambda denoiser, canvas, luck: sampler(
            model(denoiser), canvas, canvas.positions // width, noise=MASK, luck=luck
        )

    def guided(denoiser: Denoiser) -> Guided:
        return Guided(denoiser.answers, denoiser.answers, 0.5, MASK)

    if kind == "block":
        ways = [plain(sampler, BlockCache, 4) for sampler in samplers]
        ways += [plain(sampler, lambda d: d.answers, 4) for sampler in samplers[:3]]
        ways += [lambda denoiser, canvas, luck: Speculative(denoiser)(canvas, noise=MASK, luck=luck)]
        return [*ways, plain(samplers[0], guided, 4)]
    ways = [plain(sampler, lambda d: d.answers, 64) for sampler in samplers]
    if kind != "masked":  # which keeps no keys and values
        ways += [plain(sampler, lambda d: WindowCache(d, "dual", refresh=3), 6) for sampler in samplers]
    ways += [plain(Sampler(policy=Revoke(), pick=Draw(0.8)), Blind, 64)]
    return [*ways, plain(samplers[1], guided, 64)]


def denoiser_of(kind: str) -> Denoiser:
    if kind == "masked":
        return tiny_denoiser("bert", Bidirectional())
    return tiny_denoiser("llama", {"block": BlockCausal(4), "bidirectional": Bidirectional(), "prefix": Prefix()}[kind])


def room(lengths: tuple[int, int]) -> Canvas:
    given, open = lengths
    return Canvas.room([[3 + (5 * i + given) % 40 for i in range(given)] + [None] * open], noise=MASK, pad=0)


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
    together, found = Together(denoiser), {}

    def work(number: int, way: Way, lengths: tuple[int, int], model: Denoiser) -> tuple[list[int], torch.Tensor, int]:
        return last_of(way(model, room(lengths), Luck.seeded([number])))

    left = list(enumerate(requests))
    while left or together.loops:
        for number, (way, lengths, _) in [one for one in left if one[1][2] <= together.passes]:

            def run(number: int = number, way: int = way, lengths: tuple[int, int] = lengths) -> None:
                found[number] = work(number, ways[way % len(ways)], lengths, together.denoiser)

            together.join(run)
        left = [one for one in left if one[1][2] > together.passes]
        if together.loops:
            together.advance()
        elif left:
            together.passes = min(one[1][2] for one in left)  # nobody is there; the next one comes now
    for number, (way, lengths, _) in enumerate(requests):
        tokens, score, forwards = work(number, ways[way % len(ways)], lengths, denoiser)
        assert found[number][0] == tokens
        assert found[number][2] == forwards
        torch.testing.assert_close(found[number][1], score, atol=1e-4, rtol=1e-4)
    assert together.pool.height == 0


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_every_family_shares_a_pool(family: str) -> None:
    """Sliding windows and learned positions included."""
    windows = {"sliding_window": 5} if family in ("mistral", "gemma3_text") else {}
    kernel = "eager" if family == "gemma2" else "sdpa"
    denoiser = tiny_denoiser(family, BlockCausal(4), kernel=kernel, **windows)
    together, found = Together(denoiser), {}
    shapes = [(3, 9), (14, 2), (1, 20), (7, 7)]
    for number, lengths in enumerate(shapes):

        def run(number: int = number, lengths: tuple[int, int] = lengths) -> None:
            model = BlockCache(together.denoiser)
            found[number] = last_of(Sampler()(model, room(lengths), room(lengths).positions // 4, noise=MASK))

        together.join(run)
    alone = [
        last_of(Sampler()(BlockCache(denoiser), room(each), room(each).positions // 4, noise=MASK)) for each in shapes
    ]
    while together.loops:
        together.advance()
    assert [found[i][0] for i in range(4)] == [tokens for tokens, _, _ in alone]
    assert together.passes < sum(forwards for _, _, forwards in alone)


def test_one_that_leaves_or_fails_takes_nobody_along() -> None:
    denoiser = denoiser_of("block")
    together, found = Together(denoiser), []

    def write() -> None:
        canvas = room((3, 16))
        found.append(last_of(Sampler()(BlockCache(together.denoiser), canvas, canvas.positions // 4, noise=MASK)))

    def fail() -> None:
        try:
            together.denoiser.answers(room((3, 4)), ask=room((3, 4)).open)
            raise RuntimeError("of its own")
        except RuntimeError as error:
            found.append(str(error))

    stays, goes = together.join(write), together.join(write)
    together.join(fail)
    together.advance()
    together.leave(goes)
    assert together.loops == [stays]
    while together.loops:
        together.advance()
    assert found[0] == "of its own" and len(found) == 2
    assert together.pool.height == 0


def test_what_requests_look_at_is_never_out_of_place() -> None:
    """While logits are made, the network's body stands aside; who asks beside that thread is told the same."""
    denoiser = denoiser_of("block")
    head, seen = denoiser.network.get_output_embeddings(), []
    assert head is not None
    head.register_forward_hook(lambda *_: seen.append((denoiser.vocabulary, denoiser.context)))
    denoiser.answers(room((3, 4)), ask=room((3, 4)).open).logits  # noqa: B018
    assert seen == [(48, 64)]
