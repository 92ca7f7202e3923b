"""The examples run, at tiny size."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.serving.models import serving

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path


def test_a_served_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The cat sat\non the mat.\nIt is so.\n")
    with serving() as address:
        assert example("complete_at_cursor").main(address, str(file), 2)
        with serving(first="left-to-right") as other:
            example("chat_with_openai").main(other)
    assert "'wild':" in capsys.readouterr().out
