"""The architecture: imports point down, no two files import each other, and a file's name is unique."""

import ast
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "diffusify"
FLOORS = {
    "canvas": 0,
    "diffusion": 1,
    "config": 2,
    "text": 3,
    "models": 4,
    "formats": 5,
    "sampling": 5,
    "training.resilience": 5,
    "training": 6,
    "planning": 7,
    "evaluation": 7,
    "serving": 7,
    "serving.engine": 8,
    "serving.api": 9,
    "serving.bulk": 9,
    "reinforcement": 9,
    "cli": 10,
    "demo": 11,
    "__main__": 11,
    "__init__": 12,
}
SCIENCE = {"canvas", "diffusion"}
MODULES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    """A file's folder below the package, or the file itself at the top: `models` for models/loading.py."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1]) or parts[0]


@cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, in full, wherever in the file; imports for type checkers count as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: write relative imports in full"
            assert node.module is not None
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inside if file_of(name)} or {node.module}
    return frozenset(names)


@cache
def file_of(name: str) -> Path | None:
    """The file of one of our modules; None for other names."""
    package, _, rest = name.partition(".")
    if package != "diffusify":
        return None
    path = SOURCE.joinpath(*rest.split(".")) if rest else SOURCE
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def test_there_are_modules() -> None:
    assert len(MODULES) > 1


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_floors(path: Path) -> None:
    here = room(path)
    assert here in FLOORS, f"{here} has no floor"
    assert len(path.read_text().splitlines()) <= 330
    for name in imports(path):
        file = file_of(name)
        if file is not None:
            there = room(file)
            assert there == here or FLOORS[there] < FLOORS[here], f"{here} imports {name}"
        elif here in SCIENCE:
            package = name.partition(".")[0]
            assert package in {"torch", "jaxtyping"} | sys.stdlib_module_names, f"{here} imports {name}"


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """A circle of imports, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_import_cycles() -> None:
    graph = {
        str(path.relative_to(SOURCE)): {
            str(file.relative_to(SOURCE)) for file in map(file_of, imports(path)) if file is not None
        }
        for path in MODULES
    }
    assert len(graph) == len(MODULES) and sum(map(len, graph.values())) > len(MODULES)
    assert cycle(graph) is None
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def test_file_names_are_unique() -> None:
    """Two files of one name would be two meanings. A command's file may be named like the function that it runs."""
    names = Counter(path.name for path in MODULES if path.name != "__init__.py" and room(path) != "cli")
    assert [name for name, count in names.items() if count > 1] == []
