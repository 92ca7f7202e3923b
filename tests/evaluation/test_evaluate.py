"""Evaluations of tiny models: saved item by item, resumed, compared, and shown as a page."""

import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import diffusify
from diffusify.cli import app
from diffusify.config import to_plain
from diffusify.diffusion.attention import Bidirectional, Causal
from diffusify.evaluation import evaluate as module
from diffusify.evaluation.evaluate import Difference, ScoreRow, difference, evaluate, read_scores, score_row
from diffusify.evaluation.html_report import calibration_curve, scores_table
from diffusify.evaluation.likelihood import MonteCarlo, TokenByToken
from diffusify.evaluation.report import EvalPlan, report
from diffusify.evaluation.scoring import ItemScore
from diffusify.evaluation.tasks import Infill, MultipleChoice, OpenEnded, item_checksum
from diffusify.evaluation.text_metrics import perplexity
from diffusify.models.recipes import ar
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.training.adapt import adapt
from tests.evaluation.test_tasks import RECORDS, write
from tests.families import tiny_denoiser
from tests.text import makers

TASKS = ("piqa", "lambada", "rocstories")


@pytest.fixture(scope="module")
def model(causal_base: str, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("models") / "ar"
    return str(adapt(causal_base, corpus, out, recipe=ar(), steps=1, length=32, held_out=64, bf16=False))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write(folder, task, [json.dumps(RECORDS[task])] * 4)
    return folder


def scored(*values: float) -> list[ItemScore]:
    return [ItemScore({"accuracy": float(value)}, {}) for value in values]


def test_a_killed_evaluation_resumes_and_repeats_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = diffusify.load(model)
    items = {"piqa": [MultipleChoice("It is", (f" {i}", f" {i + 1} so"), i % 2) for i in range(6)]}
    whole = evaluate(lm, items, tmp_path / "whole")

    batches: list[int] = []
    score = module.score

    def interrupted_score(lm: Any, remaining: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(len(remaining))
        for number, one in enumerate(score(lm, remaining, *args, **kwargs)):
            if number == 4 and len(batches) == 1:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(module, "score", interrupted_score)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, items, tmp_path / "killed")
    file = tmp_path / "killed" / "piqa.jsonl"
    file.write_text(file.read_text()[:-7])  # the last line was cut off as well
    counts: list[int] = []
    again = evaluate(lm, items, tmp_path / "killed", progress=lambda task, done: counts.append(done))
    assert batches == [6, 3] and counts == [3, 4, 5, 6]
    assert again == whole
    assert (tmp_path / "killed" / "piqa.jsonl").read_text() == (tmp_path / "whole" / "piqa.jsonl").read_text()
    with pytest.raises(ValueError, match="holds an evaluation with another measure"):
        evaluate(lm, items, tmp_path / "whole", measure=MonteCarlo(draws=3))
    with pytest.raises(ValueError, match="holds the scores of other items"):
        evaluate(lm, {"piqa": items["piqa"][::-1]}, tmp_path / "whole")
    with torch.no_grad():
        next(lm.denoiser.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="holds an evaluation with another weights"):
        evaluate(lm, items, tmp_path / "whole")


def test_items_keep_their_checksums() -> None:
    """Evaluations that earlier versions saved can be resumed, so neither names nor order of fields may matter."""
    items = [
        MultipleChoice("It is", (" a", " b"), 1, "token"),
        OpenEnded("1+1=", ("2",), "number", extra_tokens=3, stop="\n"),
        Infill("a", "b", "c", "check()"),
    ]
    former = [
        "Choice(context='It is', choices=(' a', ' b'), gold=1, by='token')",
        "Answer(prompt='1+1=', golds=('2',), match='number', room=3, stop='\\n')",
        "Hole(before='a', middle='b', after='c', check='check()')",
    ]
    assert [item_checksum(item) for item in items] == [zlib.crc32(text.encode()) for text in former]


def test_an_evaluation_of_an_earlier_version_is_resumed(model: str, tmp_path: Path) -> None:
    lm, items = diffusify.load(model), {"piqa": [MultipleChoice("It is", (" a", " b"), 1)]}
    scores = evaluate(lm, items, tmp_path)
    file = tmp_path / "evaluation.json"
    saved = json.loads(file.read_text())
    for new, old in {"min_rounds": "least", "max_rounds": "most", "margin": "decided"}.items():
        saved["measure"][old] = saved["measure"].pop(new)
    file.write_text(json.dumps(saved))
    assert evaluate(lm, items, tmp_path) == scores
    with pytest.raises(ValueError, match="holds an evaluation with another measure"):
        evaluate(lm, items, tmp_path, measure=TokenByToken())
    former = to_plain(TokenByToken()) | {"type": "OneByOne"}
    file.write_text(json.dumps(saved | {"measure": former}))
    assert evaluate(lm, items, tmp_path, measure=TokenByToken()) == scores
    evaluate(lm, items, tmp_path / "unknown", span_length="unknown")
    with pytest.raises(ValueError, match="holds an evaluation with another span_length; give another folder"):
        evaluate(lm, items, tmp_path / "unknown")


def test_a_score_is_a_mean_with_its_standard_error() -> None:
    mean = score_row("piqa", scored(1, 0, 1, 1))
    assert (mean.score, mean.items, mean.metric) == (75.0, 4, "accuracy")
    assert mean.se == pytest.approx(25.0)
    assert score_row("piqa", scored(1.0)).se == 0.0
    assert score_row("piqa", [ItemScore({"accuracy": 1.0}, {"cut": cut}) for cut in (0, 3, 9)]).cut == 2


def test_a_difference_is_paired() -> None:
    """Items that both models get right, or both get wrong, do not widen the interval."""
    equal = difference("piqa", scored(*[1, 0] * 20), scored(*[1, 0] * 20))
    assert (equal.ahead, equal.low, equal.high) == (0.0, 0.0, 0.0)
    better = difference("piqa", scored(*[1] * 20, *[0] * 20), scored(*[1] * 12, *[0] * 28))
    assert better.ahead == pytest.approx(20.0)
    assert 5 < better.low < 12 and 28 < better.high < 37  # +-12.4 by the normal approximation
    with pytest.raises(ValueError, match="cannot be paired"):
        difference("piqa", scored(1, 0), scored(1))
    with pytest.raises(ValueError, match="cannot be paired"):
        difference("piqa", scored(1), [ItemScore({"accuracy": 1.0}, {}, item=7)])


def test_calibration_is_the_accuracy_at_a_confidence() -> None:
    items = [MultipleChoice("", (" a", " b"), 0)] * 10
    scores = [
        ItemScore({"accuracy": float(i < 4)}, {"log_prob": [0.0, -1.0 if i < 5 else -9.0], "worth": [1.0, 1.0]})
        for i in range(10)
    ]
    curve = calibration_curve(items, scores, bins=2)
    assert list(curve) == pytest.approx([100 / (1 + 2.718281828**-1), 100 / (1 + 2.718281828**-9)], rel=1e-6)
    assert list(curve.values()) == [80.0, 0.0]


def test_the_table_has_both_errors_and_the_number_of_truncated_items() -> None:
    ours = [ScoreRow("piqa", "accuracy", 61.26, 1.5, 200), ScoreRow("lambada", "accuracy", 30.0, 2.0, 50, cut=3)]
    assert scores_table(ours) == (
        ["task", "metric", "items", "model"],
        [["piqa", "accuracy", "200", "61.3 ± 1.5"], ["lambada", "accuracy", "50 (3 cut)", "30.0 ± 2.0"]],
    )
    other, ahead = ScoreRow("piqa", "accuracy", 60.0, 1.0, 200), Difference("piqa", "accuracy", 1.26, -0.5, 3.0)
    heads, (line,) = scores_table(ours[:1], [other], [ahead], ("a", "b"))
    assert heads[3:] == ["a", "b", "difference (95%)"]
    assert line[3:] == ["61.3 ± 1.5", "60.0 ± 1.0", "+1.3 (-0.5 to +3.0)"]


class Page(HTMLParser):
    """A parser that checks that every tag is closed, and collects links to other resources."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v for k, v in attrs if k.endswith("href") and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_command_writes_a_page_and_prints_the_scores(
    model: str, causal_base: str, corpus: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    command = ["eval", model, "--tasks", ",".join(TASKS), "--data", str(data), "--baseline", causal_base]
    command += ["--out", str(out), "--limit", "3", "--steps", "4", "--sweep", "1,2", "--texts", corpus, "--free", "3"]
    wide = {"COLUMNS": "200"}
    done = CliRunner().invoke(app, command, env=wide)
    assert done.exit_code == 0, done.output
    found = json.loads((out / "results.json").read_text())
    assert [line["task"] for line in found["rows"]] == list(TASKS)
    assert all(line["items"] == 3 and 0 <= line["score"] <= 100 for line in found["rows"])
    bits = found["settings"]["bits_per_byte"]
    assert bits["model"]["bits_per_byte"] > bits["baseline"]["bits_per_byte"] > 0
    free = found["settings"]["from_nothing"]
    assert all(free[who]["perplexity"] > 1 and 0 < free[who]["distinct_2"] <= 1 for who in ("model", "baseline"))
    page = (out / "index.html").read_text()
    assert "Unconditional samples" in page and "Bits per byte" in page
    table = page[: page.index("</table>")]
    lines = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in table.split("<tr>")[1:]]
    assert [line[0] for line in lines] == ["task", *TASKS] and {len(line) for line in lines} == {6}
    for line in lines:
        assert " ".join(line) in " ".join(done.output.split())
    reader = Page()
    reader.feed(page)
    assert not reader.open and not reader.links
    assert page.count("<svg") == 3 and "tokens decoded later are redder" in page
    assert len(re.findall(r'title="step \d+"', page)) > 10
    again = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(again.stdout) == found
    both = CliRunner().invoke(app, ["compare", str(out), str(out), "--json"])
    assert [one["ahead"] for one in json.loads(both.stdout)] == [0.0, 0.0, 0.0]
    both = CliRunner().invoke(app, ["compare", str(out), str(out)], env=wide)
    for task, metric, items, score, *_ in lines[1:]:
        assert f"{task} {metric} {items} {score} {score} +0.0 (+0.0 to +0.0)" in " ".join(both.output.split())
    assert set(read_scores(out / "model")) == set(TASKS)


def test_unconditional_samples_are_read_by_the_baseline_in_its_own_tokens(tmp_path: Path) -> None:
    network, judge_tokenizer = tiny_denoiser("llama", Causal(), 1, vocab_size=400), makers.sentence_bpe()
    lm, judge = DiffusionLM(network, makers.byte_level()), DiffusionLM(network, judge_tokenizer)
    made = report(EvalPlan({}, free=3, prompts=()), tmp_path, ("a", lm), ("b", judge))
    texts = [one.completion or "" for one in lm.generate([""] * 3, 32, temperature=1.0)]
    read = [judge_tokenizer.encode(text) for text in texts]
    expected = perplexity(judge_tokenizer, network.network, [""] * 3, read)
    assert made.settings["from_nothing"]["model"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    both_sides = DiffusionLM(tiny_denoiser("llama", Bidirectional(), 1, vocab_size=320), lm.tokenizer)
    with pytest.raises(ValueError, match="free=3 texts are scored by an AR model, and the baseline b is none"):
        report(EvalPlan({}, free=3), tmp_path, ("a", lm), ("b", both_sides))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "piqqa"], 'task "piqqa" is not known; did you mean "piqa"'),
        (["--tasks", "siqa"], "holds no siqa.jsonl"),
        (["--tasks", "piqa", "--free", "2"], "free=2 texts need a --baseline"),
        (["--tasks", "piqa", "--tries", "3"], "tries=3 greedy answers would all be the same"),
        (["--tasks", "piqa", "--shots", "9"], "shots=9 must"),
        (["--tasks", "piqa", "--likelihood", "left-to-right"], "is not autoregressive"),
    ],
)
def test_errors_are_one_line(model: str, data: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["eval", model, "--data", str(data), "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    nothing = CliRunner().invoke(app, ["compare", str(tmp_path), str(tmp_path)])
    assert nothing.exit_code == 2 and "holds no evaluation" in nothing.output


def test_tasks_are_listed() -> None:
    done = CliRunner().invoke(app, ["eval", "anything", "--tasks", "list"])
    assert done.exit_code == 0 and "hellaswag" in done.output and "Choose the ending" in done.output
