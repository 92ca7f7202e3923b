"""The house keeps its floors: a module imports from lower floors and its own folder only."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "diffusify"
FLOORS = {
    "canvas": 0,
    "diffusion": 1,
    "config": 2,
    "models": 3,
    "text": 3,
    "training": 4,
    "sampling": 4,
    "evaluation": 5,
    "serving": 6,
    "cli": 7,
    "demo": 8,
    "__main__": 8,
    "__init__": 9,
}
SCIENCE = {"canvas", "diffusion"}
MODULES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    """The first name below the package: `models` for models/loading.py."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Every module a file imports, in full, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: write relative imports in full"
            # `from diffusify import x` imports the room x, not the package's front door.
            names |= {f"diffusify.{a.name}" for a in node.names} if node.module == "diffusify" else {node.module}
    return names


def test_there_are_modules() -> None:
    assert len(MODULES) > 1


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_floors(path: Path) -> None:
    here = room(path)
    assert here in FLOORS, f"{here} has no floor"
    assert len(path.read_text().splitlines()) <= 330
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "diffusify":
            there = rest.partition(".")[0] or "__init__"
            assert there == here or FLOORS.get(there, 99) < FLOORS[here], f"{here} imports {name}"
        elif here in SCIENCE:
            assert package in {"torch", "jaxtyping"} | sys.stdlib_module_names, f"{here} imports {name}"
