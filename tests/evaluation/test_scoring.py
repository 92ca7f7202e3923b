"""Scoring of items with a model whose output is fixed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from diffusify.canvas import Canvas
from diffusify.diffusion.attention import BlockCausal
from diffusify.evaluation.likelihood import Autoregressive, MonteCarlo
from diffusify.evaluation.likelihood_requests import Likelihood, LikelihoodRequest
from diffusify.evaluation.scoring import likelihood_request, nearest_tokens, normalize_answer, score
from diffusify.evaluation.tasks import Infill, MultipleChoice, OpenEnded
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


def fix_output(monkeypatch: pytest.MonkeyPatch, lm: DiffusionLM, text: str) -> list[list[int]]:
    """Make the model generate this text repeatedly into any span; returns a list that receives the spans' lengths."""
    lengths: list[list[int]] = []

    def results(self: GenerationRun) -> list[Any]:
        ids = lm.tokenizer.encode(text, continues=True)
        lengths.append(self.canvas.editable.sum(1).tolist())
        tokens = self.canvas.tokens.clone()
        for row, editable in enumerate(self.canvas.editable):
            positions = editable.nonzero()[:, 0]
            tokens[row, positions] = torch.tensor([ids[i % len(ids)] for i in range(len(positions))])
        self.canvas = Canvas(tokens, self.canvas.open & False, self.canvas.editable, self.canvas.document)
        return RESULTS(self)

    monkeypatch.setattr(GenerationRun, "_run", lambda self, denoiser: iter(()))
    monkeypatch.setattr(GenerationRun, "results", results)
    return lengths


def test_the_choice_with_the_highest_scaled_log_probability_is_chosen(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: Autoregressive, denoiser: Any, questions: list[LikelihoodRequest]) -> Iterator[Likelihood]:
        return (Likelihood((-6.0, -8.0), (0.0, 0.0)) for _ in questions)

    monkeypatch.setattr(Autoregressive, "__call__", measure)
    right = {
        by: next(
            score(
                lm, [MultipleChoice("The cat", (" sat", " sat on the mat"), 0, by)], Autoregressive(), SamplingConfig()
            )
        )
        for by in ("sum", "character", "token")
    }
    assert [right[by].scores["accuracy"] for by in ("sum", "character", "token")] == [1.0, 0.0, 0.0]
    assert right["sum"].said["chose"] == 0 and right["character"].said["chose"] == 1


def test_a_request_s_tokens_are_those_of_the_text(lm: DiffusionLM) -> None:
    item = MultipleChoice("The cat sat", (" on the mat", " over"), 1, "character")
    request = likelihood_request(lm, item)
    decode = lm.tokenizer.decode
    assert request.context[0] == lm.tokenizer.start_token_id
    assert decode(request.context[1:]) == item.context
    assert [decode(choice, continues=True) for choice in request.choices] == list(item.choices)
    assert request.scales == (1 / 10, 1 / 4)  # as acc_norm of lm-evaluation-harness


@pytest.mark.parametrize(
    ("output", "item", "correct"),
    [
        (" the mat", OpenEnded("The cat sat on", (" the mat",)), 1),
        (" The mat!\n", OpenEnded("It is", ("mat",), extra_tokens=8, stop="\n"), 1),
        (" the mat", OpenEnded("The cat sat on", (" the rat",)), 0),
        (" the mat", OpenEnded("It is", ("mat",), "contains", extra_tokens=4), 1),
        (" mat\n", OpenEnded("It is", ("mat",), extra_tokens=4, stop="\n"), 1),
        (" mat on", OpenEnded("It is", ("mat",), extra_tokens=4, stop="\n"), 0),
        (" 1+1=2\n#### 2\n", OpenEnded("Sum?", ("so\n#### 2",), "number", extra_tokens=30), 1),
        (" 1+1=2\n#### 3\n", OpenEnded("Sum?", ("so\n#### 2",), "number", extra_tokens=30), 0),
        (" 5 and 1,8 is 18\n9", OpenEnded("Sum?", ("18",), "last number", extra_tokens=20, stop="\n"), 1),
        (" 18.00\n", OpenEnded("Sum?", ("18",), "last number", extra_tokens=10, stop="\n"), 1),
        (" 18, or 5\n", OpenEnded("Sum?", ("18",), "last number", extra_tokens=10, stop="\n"), 0),
        (" (A)2\n", OpenEnded("Which?", ("A",), "letter", extra_tokens=3, stop="\n"), 1),
        (" (B)2\n", OpenEnded("Which?", ("A",), "letter", extra_tokens=3, stop="\n"), 0),
        (" the", OpenEnded("Which?", ("A",), "letter", extra_tokens=3, stop="\n"), 0),
        ("\n", OpenEnded("Who?", ("The The",), extra_tokens=10, stop="\n"), 0),
        (".\n", OpenEnded("Who?", ("The The",), extra_tokens=10, stop="\n"), 0),
        (" An\n", OpenEnded("Who?", ("The The",), extra_tokens=10, stop="\n"), 0),
        (" the The.\n", OpenEnded("Who?", ("The The",), extra_tokens=10, stop="\n"), 1),
        (" the The.\n", OpenEnded("Who?", ("The The",), "contains", extra_tokens=10, stop="\n"), 1),
        (" !!!\n", OpenEnded("Who?", ("!!!",), extra_tokens=10, stop="\n"), 1),
        ("\n", OpenEnded("Who?", ("",), extra_tokens=10, stop="\n"), 0),
        (" #### $18.00 a day\n", OpenEnded("Sum?", ("so\n#### 18",), "number", extra_tokens=30), 1),
    ],
)
def test_an_answer_is_compared_by_its_own_rule(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch, output: str, item: OpenEnded, correct: int
) -> None:
    lengths = fix_output(monkeypatch, lm, output)
    (scored,) = score(lm, [item], MonteCarlo(), SamplingConfig())
    assert scored.scores == {"accuracy": correct}
    longest = max(len(lm.tokenizer.encode(gold, continues=True)) for gold in item.golds)
    assert lengths == [[longest + item.extra_tokens]]


def test_a_span_is_infilled_between_both_sides(lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    story = Infill("The dog [[ran]].", " The cat sat on the mat.", " It is so!")
    code = Infill("def f():\n", "    x = 1\n", "    return x\n", "assert f() == 1\n")
    lengths = fix_output(monkeypatch, lm, "    x = 1\n")
    scores = [one.scores for one in score(lm, [story, code], MonteCarlo(), SamplingConfig())]
    assert scores[0]["rougeL"] == 0.0 and scores[1] == {"pass": 1.0}
    assert lengths == [[len(lm.tokenizer.encode(item.middle, continues=True)) for item in (story, code)]]
    fix_output(monkeypatch, lm, " The cat sat on the mat.")
    scores = [one.scores for one in score(lm, [story, code], MonteCarlo(), SamplingConfig())]
    assert scores == [{"rougeL": 1.0, "rouge1": 1.0, "rouge2": 1.0}, {"pass": 0.0}]


def test_items_are_filled_in_batches(lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = fix_output(monkeypatch, lm, " sat")
    items = [Infill("The dog", " sat" * times, " on the mat.") for times in (1, 2, 1)]
    for size in (1, 2, 3):
        list(score(lm, items, MonteCarlo(), SamplingConfig(), batch_size=size))
    assert [len(batch) for batch in batches] == [1, 1, 1, 2, 1, 3]


def record_canvases(monkeypatch: pytest.MonkeyPatch) -> list[Canvas]:
    """Returns a list that receives the initial canvas of every generation run."""
    canvases: list[Canvas] = []
    original = GenerationRun._run

    def run(self: GenerationRun, denoiser: Any) -> Any:
        canvases.append(self.canvas)
        return original(self, denoiser)

    monkeypatch.setattr(GenerationRun, "_run", run)
    return canvases


def test_an_item_that_fits_is_infilled_like_its_text(lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    canvases = record_canvases(monkeypatch)
    (scored,) = score(lm, [Infill("The dog", " sat on", " the mat. It is so!")], MonteCarlo(), SamplingConfig())
    size = len(lm.tokenizer.encode(" sat on", continues=True))
    text = infill_canvas(lm.tokenizer, [f"The dog[[{size}]] the mat. It is so!"], context=CONTEXT)
    assert torch.equal(canvases[0].tokens, text.tokens) and torch.equal(canvases[0].open, text.open)
    assert scored.said["cut"] == 0 and scored.said["wrote"]


@pytest.mark.parametrize(("ahead", "behind"), [(300, 300), (300, 2), (2, 300)])
def test_a_long_text_keeps_the_tokens_nearest_to_the_span(
    lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch, ahead: int, behind: int
) -> None:
    canvases = record_canvases(monkeypatch)
    item = Infill("xyz" * ahead, " The mat.", "uvw" * behind)
    (scored,) = score(lm, [item], MonteCarlo(), SamplingConfig())
    before, after = lm.tokenizer.encode(item.before), lm.tokenizer.encode(item.after, continues=True)
    (tokens,), (open,) = canvases[0].tokens.tolist(), canvases[0].open.tolist()
    first, last = open.index(True), CONTEXT - open[::-1].index(True)
    assert len(tokens) == CONTEXT and tokens[0] == lm.tokenizer.start_token_id
    assert last - first == len(lm.tokenizer.encode(item.middle, continues=True))
    assert tokens[1:first] == before[-(first - 1) :]
    assert tokens[last:] == [*after[: CONTEXT - 1 - last], lm.tokenizer.end_token_id]
    sizes = first - 1, CONTEXT - 1 - last
    assert scored.said["cut"] == len(before) + len(after) - sum(sizes) > 0
    if ahead == behind:
        assert abs(sizes[0] - sizes[1]) <= 1
    else:
        assert min(sizes) == min(len(before), len(after))  # the short side is complete


def test_a_text_that_is_cut_inside_a_character_still_fits(lm: DiffusionLM) -> None:
    assert len(lm.tokenizer.encode("€" * 3)) == 9
    for middle in (" so", " so!", " so!!", " so!!!"):
        (scored,) = score(lm, [Infill("€" * 99, middle, "€" * 99)], MonteCarlo(), SamplingConfig())
        assert 2 * 3 * 99 > scored.said["cut"] >= 2 * 3 * 99 - CONTEXT


def test_both_sides_of_a_span_share_the_length() -> None:
    before, after = [*range(10)], [*range(10, 14)]
    assert nearest_tokens(before, after, 20) == (before, after)
    assert nearest_tokens(before, after, 6) == ([7, 8, 9], [10, 11, 12])
    assert nearest_tokens(before, after, 11) == ([3, 4, 5, 6, 7, 8, 9], after)
    assert nearest_tokens(after, before, 11) == (after, [0, 1, 2, 3, 4, 5, 6])
    assert nearest_tokens(before, [], 3) == ([7, 8, 9], []) and nearest_tokens(before, after, 0) == ([], [])


def test_items_that_are_too_long_are_truncated_and_scored(lm: DiffusionLM) -> None:
    long = "It is so! " * 60
    block = DiffusionLM(tiny_denoiser("llama", BlockCausal(4), 1, vocab_size=320), lm.tokenizer)
    sampling = SamplingConfig(steps=4)
    for model, measure in ((lm, MonteCarlo()), (block, Autoregressive())):
        tokens = len(model.tokenizer.encode(long))
        (choice,) = score(model, [MultipleChoice(long, (" sat", " on"), 0)], measure, SamplingConfig())
        (ended,) = score(model, [OpenEnded(long, (" sat",))], measure, sampling)
        long_answers = OpenEnded("It", (" the mat" * 60,)), Infill("It", " the mat" * 60, " so")
        (answered,), (infilled,) = (list(score(model, [item], measure, sampling)) for item in long_answers)
        sat = len(model.tokenizer.encode(" sat", continues=True))
        assert choice.said["cut"] >= ended.said["cut"] == 1 + tokens + sat - CONTEXT
        assert answered.said["wrote"] and answered.said["cut"] == len(model.tokenizer.encode("It"))
        assert infilled.said["wrote"] and infilled.said["cut"] > 0
    with pytest.raises(ValueError, match="does not fit the context of 64 tokens; leave it out"):
        list(score(lm, [MultipleChoice("It", (long, " on"), 0)], MonteCarlo(), SamplingConfig()))


def test_a_model_without_right_context_continues_the_text_before_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = DiffusionLM(tiny_denoiser("llama", BlockCausal(4), 1, vocab_size=320), makers.byte_level())
    fix_output(monkeypatch, lm, " The cat sat on the mat.")
    long = "It is so! " * 60
    (scored,) = score(lm, [Infill(long, " The cat sat on the mat.", " It is.")], MonteCarlo(), SamplingConfig())
    assert scored.scores["rougeL"] == 1.0 and scored.said["cut"] > 0


def test_answers_are_normalized_as_in_squad() -> None:
    assert normalize_answer("  The Beatles, (a band)!") == normalize_answer("beatles band")
    assert normalize_answer("An apple") != normalize_answer("apples")


def test_an_unmodified_base_model_is_scored(lm: DiffusionLM) -> None:
    base = DiffusionLM(tiny_denoiser("llama", as_is().attention, 1, vocab_size=320), lm.tokenizer)
    items = [OpenEnded("The cat sat on", (" the mat",)), OpenEnded("Is it", (" so!",))]
    scored = list(score(base, items, Autoregressive(), SamplingConfig(tolerance=0.0)))
    assert all(one.scores["accuracy"] in (0.0, 1.0) and one.said["wrote"] for one in scored)


def test_the_majority_of_several_tries_counts(lm: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [[" 2", " 3", " 3"], [" 2", " 3", " 4"]]

    class Result:
        def __init__(self, text: str) -> None:
            self.completion, self.forwards = text, 1

    class Run:
        def results(self) -> list[Result]:
            return [Result(text) for texts in outputs for text in texts]

    prompts: list[Any] = []
    monkeypatch.setattr(lm, "prepare_generation", lambda given, *rest: prompts.extend(given) or Run())
    items = [OpenEnded("1+1=", ("3",)), OpenEnded("1+1=", ("4",))]
    one, two = score(lm, items, MonteCarlo(), SamplingConfig(temperature=0.7), tries=3)
    assert len(prompts) == 6
    assert one.scores == {"accuracy": 1.0, "hit": 1.0} and one.said["wrote"] == outputs[0]
    assert two.scores == {"accuracy": 0.0, "hit": 1.0}
