"""Items against a model that answers as it is told."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import BlockCausal
from diffusify.evaluation.likelihood import LeftToRight, Likelihood, MonteCarlo, Question
from diffusify.evaluation.scoring import beside, normal, question, score
from diffusify.evaluation.tasks import Answer, Choice, Hole
from diffusify.models.recipes import as_is
from diffusify.sampling.diffusion_lm import DiffusionLM, GenerationRun
from diffusify.sampling.sampling_config import SamplingConfig
from diffusify.text.prompts import infill_canvas
from tests.families import tiny_denoiser
from tests.text import makers

RESULTS = GenerationRun.results
CONTEXT = 64  # of the tiny models


@pytest.fixture
def lm() -> DiffusionLM:
    tokenizer = makers.byte_level()
    return DiffusionLM(tiny_denoiser("llama", vocab_size=320), tokenizer)


def says(monkeypatch: pytest.MonkeyPatch, lm: DiffusionLM, text: str) -> list[list[int]]:
    """From now on the model writes this text, over and over, into any room. Returns where the sizes are kept."""
    rooms: list[list[int]] = []

    def results(self: GenerationRun) -> list[Any]:
        ids = lm.tokenizer.encode(text, continues=True)
        rooms.append(self.canvas.editable.sum(1).tolist())
        tokens = self.canvas.tokens.clone()
        for row, editable in enumerate(self.canvas.editable):
            places = editable.nonzero()[:, 0]
            tokens[row, places] = torch.tensor([ids[i % len(ids)] for i in range(len(places))])
        self.canvas = Canvas(tokens, self.canvas.open & False, self.canvas.editable, self.canvas.document)
        return RESULTS(self)

    monkeypatch.setattr(GenerationRun, "_run", lambda self, denoiser: iter(()))
    monkeypatch.setattr(GenerationRun, "results", results)
    return rooms


def test_a_choice_is_what_is_likeliest_by_its_measure(lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: LeftToRight, denoiser: Any, questions: list[Question]) -> Iterator[Likelihood]:
        return (Likelihood((-6.0, -8.0), (0.0, 0.0)) for _ in questions)

    monkeypatch.setattr(LeftToRight, "__call__", measure)
    right = {
        by: next(score(lm, [Choice("The cat", (" sat", " sat on the mat"), 0, by)], LeftToRight(), SamplingConfig()))
        for by in ("sum", "byte", "token")
    }
    assert [right[by].scores["accuracy"] for by in ("sum", "byte", "token")] == [1.0, 0.0, 0.0]
    assert right["sum"].said["chose"] == 0 and right["byte"].said["chose"] == 1


def test_a_question_s_tokens_are_those_of_the_text(lm: DiffusionLM) -> None:
    item = Choice("The cat sat", (" on the mat", " over"), 1, "byte")
    asked = question(lm, item)
    decode = lm.tokenizer.decode
    assert asked.context[0] == lm.tokenizer.start_token_id
    assert decode(asked.context[1:]) == item.context
    assert [decode(choice, continues=True) for choice in asked.choices] == list(item.choices)
    assert asked.worth == (1 / 11, 1 / 5)


@pytest.mark.parametrize(
    ("said", "item", "right"),
    [
        (" the mat", Answer("The cat sat on", (" the mat",)), 1),
        (" The mat!\n", Answer("It is", ("mat",), room=8, stop="\n"), 1),
        (" the mat", Answer("The cat sat on", (" the rat",)), 0),
        (" the mat", Answer("It is", ("mat",), "contains", room=4), 1),
        (" mat\n", Answer("It is", ("mat",), room=4, stop="\n"), 1),
        (" mat on", Answer("It is", ("mat",), room=4, stop="\n"), 0),
        (" 1+1=2\n#### 2\n", Answer("Sum?", ("so\n#### 2",), "number", room=30), 1),
        (" 1+1=2\n#### 3\n", Answer("Sum?", ("so\n#### 2",), "number", room=30), 0),
        (" 5 and 1,8 is 18\n9", Answer("Sum?", ("18",), "last number", room=20, stop="\n"), 1),
        (" 18.00\n", Answer("Sum?", ("18",), "last number", room=10, stop="\n"), 1),
        (" 18, or 5\n", Answer("Sum?", ("18",), "last number", room=10, stop="\n"), 0),
        (" (A)2\n", Answer("Which?", ("A",), "letter", room=3, stop="\n"), 1),
        (" (B)2\n", Answer("Which?", ("A",), "letter", room=3, stop="\n"), 0),
        (" the", Answer("Which?", ("A",), "letter", room=3, stop="\n"), 0),
    ],
)
def test_an_answer_is_right_by_its_own_rule(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch, said: str, item: Answer, right: int
) -> None:
    rooms = says(monkeypatch, lm, said)
    (scored,) = score(lm, [item], MonteCarlo(), SamplingConfig())
    assert scored.scores == {"accuracy": right}
    longest = max(len(lm.tokenizer.encode(gold, continues=True)) for gold in item.golds)
    assert rooms == [[longest + item.room]]


def test_a_hole_is_filled_with_a_view_of_both_sides(lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Hole("The dog [[ran]].", " The cat sat on the mat.", " It is so!")
    code = Hole("def f():\n", "    x = 1\n", "    return x\n", "assert f() == 1\n")
    rooms = says(monkeypatch, lm, "    x = 1\n")
    told = list(score(lm, [story, code], MonteCarlo(), SamplingConfig()))
    assert told[0].scores["rougeL"] == 0.0 and told[1].scores == {"pass": 1.0}
    assert rooms == [[len(lm.tokenizer.encode(item.middle, continues=True)) for item in (story, code)]]
    says(monkeypatch, lm, " The cat sat on the mat.")
    told = list(score(lm, [story, code], MonteCarlo(), SamplingConfig()))
    assert told[0].scores == {"rougeL": 1.0, "rouge1": 1.0, "rouge2": 1.0} and told[1].scores == {"pass": 0.0}


def seen(monkeypatch: pytest.MonkeyPatch) -> list[Canvas]:
    """From now on every canvas that a model is to write on is kept here, as it was given."""
    kept: list[Canvas] = []
    true = GenerationRun._run

    def run(self: GenerationRun, denoiser: Any) -> Any:
        kept.append(self.canvas)
        return true(self, denoiser)

    monkeypatch.setattr(GenerationRun, "_run", run)
    return kept


def test_a_hole_that_fits_is_what_its_text_with_the_hole_would_be(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    canvases = seen(monkeypatch)
    (told,) = score(lm, [Hole("The dog", " sat on", " the mat. It is so!")], MonteCarlo(), SamplingConfig())
    size = len(lm.tokenizer.encode(" sat on", continues=True))
    text = infill_canvas(lm.tokenizer, [f"The dog[[{size}]] the mat. It is so!"], context=CONTEXT)
    assert torch.equal(canvases[0].tokens, text.tokens) and torch.equal(canvases[0].open, text.open)
    assert told.said["cut"] == 0 and told.said["wrote"]


@pytest.mark.parametrize(("ahead", "behind"), [(300, 300), (300, 2), (2, 300)])
def test_a_hole_in_too_long_a_text_keeps_what_is_nearest(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch, ahead: int, behind: int
) -> None:
    canvases = seen(monkeypatch)
    item = Hole("xyz" * ahead, " The mat.", "uvw" * behind)
    (told,) = score(lm, [item], MonteCarlo(), SamplingConfig())
    before, after = lm.tokenizer.encode(item.before), lm.tokenizer.encode(item.after, continues=True)
    (tokens,), (open,) = canvases[0].tokens.tolist(), canvases[0].open.tolist()
    first, last = open.index(True), CONTEXT - open[::-1].index(True)
    assert len(tokens) == CONTEXT and tokens[0] == lm.tokenizer.start_token_id
    assert last - first == len(lm.tokenizer.encode(item.middle, continues=True))
    assert tokens[1:first] == before[-(first - 1) :]
    assert tokens[last:] == [*after[: CONTEXT - 1 - last], lm.tokenizer.end_token_id]
    sizes = first - 1, CONTEXT - 1 - last
    assert told.said["cut"] == len(before) + len(after) - sum(sizes) > 0
    if ahead == behind:
        assert abs(sizes[0] - sizes[1]) <= 1
    else:
        assert min(sizes) == min(len(before), len(after))  # the short side is whole


def test_a_text_that_is_cut_inside_a_letter_still_fits(lm: DiffusionLM) -> None:
    assert len(lm.tokenizer.encode("€" * 3)) == 9
    for middle in (" so", " so!", " so!!", " so!!!"):
        (told,) = score(lm, [Hole("€" * 99, middle, "€" * 99)], MonteCarlo(), SamplingConfig())
        assert 2 * 3 * 99 > told.said["cut"] >= 2 * 3 * 99 - CONTEXT


def test_both_sides_of_a_hole_share_what_is_left() -> None:
    before, after = [*range(10)], [*range(10, 14)]
    assert beside(before, after, 20) == (before, after)
    assert beside(before, after, 6) == ([7, 8, 9], [10, 11, 12])
    assert beside(before, after, 11) == ([3, 4, 5, 6, 7, 8, 9], after)
    assert beside(after, before, 11) == (after, [0, 1, 2, 3, 4, 5, 6])
    assert beside(before, [], 3) == ([7, 8, 9], []) and beside(before, after, 0) == ([], [])


def test_what_is_too_long_is_scored_all_the_same(lm: DiffusionLM) -> None:
    long = "It is so! " * 60
    block = DiffusionLM(tiny_denoiser("llama", BlockCausal(4), 1, vocab_size=320), lm.tokenizer)
    for model, measure in ((lm, MonteCarlo()), (block, LeftToRight())):
        tokens = len(model.tokenizer.encode(long))
        (choice,) = score(model, [Choice(long, (" sat", " on"), 0)], measure, SamplingConfig())
        (answer,) = score(model, [Answer(long, (" sat",))], measure, SamplingConfig())
        wide = Answer("It", (" the mat" * 60,)), Hole("It", " the mat" * 60, " so")
        (answered,), (filled,) = (list(score(model, [item], measure, SamplingConfig())) for item in wide)
        sat = len(model.tokenizer.encode(" sat", continues=True))
        assert choice.said["cut"] >= answer.said["cut"] == 1 + tokens + sat - CONTEXT
        assert answered.said["wrote"] and answered.said["cut"] == len(model.tokenizer.encode("It"))
        assert filled.said["wrote"] and filled.said["cut"] > 0
    with pytest.raises(ValueError, match="does not fit the context of 64; leave it out"):
        list(score(lm, [Choice("It", (long, " on"), 0)], MonteCarlo(), SamplingConfig()))


def test_a_model_that_cannot_look_ahead_writes_from_what_is_before(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = DiffusionLM(tiny_denoiser("llama", BlockCausal(4), 1, vocab_size=320), makers.byte_level())
    says(monkeypatch, lm, " The cat sat on the mat.")
    long = "It is so! " * 60
    (told,) = score(lm, [Hole(long, " The cat sat on the mat.", " It is.")], MonteCarlo(), SamplingConfig())
    assert told.scores["rougeL"] == 1.0 and told.said["cut"] > 0


def test_answers_are_compared_as_others_compare_them() -> None:
    assert normal("  The Beatles, (a band)!") == normal("beatles band")
    assert normal("An apple") != normal("apples")


def test_a_base_as_it_is_takes_part(lm: DiffusionLM) -> None:
    base = DiffusionLM(tiny_denoiser("llama", as_is().attention, 1, vocab_size=320), lm.tokenizer)
    items = [Answer("The cat sat on", (" the mat",)), Answer("Is it", (" so!",))]
    told = list(score(base, items, LeftToRight(), SamplingConfig(tolerance=0.0)))
    assert all(one.scores["accuracy"] in (0.0, 1.0) and one.said["wrote"] for one in told)


def test_most_of_several_tries_decide(lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [[" 2", " 3", " 3"], [" 2", " 3", " 4"]]

    class Made:
        def __init__(self, text: str) -> None:
            self.completion, self.forwards = text, 1

    class Told:
        def results(self) -> list[Made]:
            return [Made(text) for texts in said for text in texts]

    prompts: list[Any] = []
    monkeypatch.setattr(lm, "prepare_generation", lambda given, *rest: prompts.extend(given) or Told())
    items = [Answer("1+1=", ("3",)), Answer("1+1=", ("4",))]
    one, two = score(lm, items, MonteCarlo(), SamplingConfig(temperature=0.7), tries=3)
    assert len(prompts) == 6
    assert one.scores == {"accuracy": 1.0, "hit": 1.0} and one.said["wrote"] == said[0]
    assert two.scores == {"accuracy": 0.0, "hit": 1.0}
