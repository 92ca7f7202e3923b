"""Short Python functions with a docstring, out of Python's standard library, as texts of code to train on."""

import ast
import json
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

LINES = range(4, 41)  # of a function
NOT_CODE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "encodings"}


def functions(source: str) -> Iterator[str]:
    """The functions of a file that have a docstring and are neither trivial nor long, without their indentation."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
            continue
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        if (node.end_lineno or first) - first + 1 in LINES:
            yield textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])) + "\n"


def write_functions(file: Path) -> Path:
    """A file of all such functions of the standard library, once each; it is not written again."""
    if not file.is_file():
        library = Path(sysconfig.get_paths()["stdlib"])
        paths = [path for path in sorted(library.rglob("*.py")) if not NOT_CODE & {*path.relative_to(library).parts}]
        texts = dict.fromkeys(text for path in paths for text in functions(path.read_text(encoding="utf-8")))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file
