"""`diffusify data`, and text that passes through a terminal unharmed."""

import io
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusify.cli import app
from diffusify.cli.options import unescape
from diffusify.cli.terminal import read_stdin, report_errors

run = CliRunner()


def test_data(causal_base: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "the cat", "answer": "the dog"}\n')
    found = json.loads(run.invoke(app, ["data", str(path), "--model", causal_base, "--json"]).stdout)
    assert found["form"] == "pairs" and found["records"] == 1 and 0 < found["learned_tokens"] < found["tokens"]
    assert [learned for _, learned in found["first"]] == [False, True] and "the dog" in found["first"][1][0]
    shown = run.invoke(app, ["data", str(path), "--as", "pairs"])
    assert shown.exit_code == 0 and "1 records, read as pairs" in shown.stdout and "user: the cat" in shown.stdout


def test_a_line_break_of_a_template_can_be_escaped() -> None:
    assert unescape(r"a\nb") == "a\nb" and unescape(r"a \\neq b") == r"a \neq b" and unescape(r"\t") == r"\t"


@pytest.mark.parametrize(("text", "prompt"), [("dog\n", "dog"), ("dog\n\n", "dog\n"), ("dog ", "dog ")])
def test_one_final_line_break_is_not_the_prompt(text: str, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert read_stdin() == prompt


def test_text_that_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with report_errors():
        print(json.dumps("Gr\u00fc\u00dfe \U0001f600", ensure_ascii=False), flush=True)
    assert raw.getvalue() == b'"Gr\\u00fc\\u00dfe \\ud83d\\ude00"\n'
    assert json.loads(raw.getvalue()) == "Gr\u00fc\u00dfe \U0001f600"
