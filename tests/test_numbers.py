"""Numbers in README and documentation are the measured ones; every claim has its command and its file.

In a paragraph or table row that names `results/NAME.json`, every number is in that file, up to rounding; integers may
also be settings in the script. A paragraph without a file refers to the last one under the same heading. Without any
file, decimal numbers are formatted as code, which is ignored. Each row of a table is about another part of its file.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"(?<![\w.,-])(\d[\d,]*(?:\.\d+)?)([kMG]\b)?(?![\d.]*\d|-\w)")
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "": 1.0}
NAMED = re.compile(r"results/(\w+)\.json")


def words(text: str) -> str:
    """Prose without code, pictures and links' targets."""
    text = re.sub(r"```.*?```|`[^`]*`|!\[[^]]*\]", " ", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)|\barXiv \S+|Python \d\.\d+", "]", text)


def numbers(text: str) -> list[str]:
    return ["".join(found) for found in NUMBER.findall(words(text))]


def matches(number: str, values: set[float]) -> bool:
    """Whether a number is one of the values, rounded as it is written; a share may be told in percent."""
    digits, unit = re.fullmatch(r"([\d.,]+?),?([kMG]?)", number).groups()  # pyright: ignore[reportOptionalMemberAccess]
    decimals = len(digits.partition(".")[2])
    wanted = float(digits.replace(",", ""))
    scaled = [value / UNITS[unit] for value in values] + [100 * value for value in values if 0 < value <= 1]
    return any(abs(value - wanted) <= 0.5 * 10**-decimals + 1e-9 for value in scaled)


def values(node: Any) -> set[float]:
    """Every number in a JSON value, those in its keys and strings too."""
    if isinstance(node, dict):
        return {n for key, value in node.items() for n in values(key) | values(value)}
    if isinstance(node, list):
        return {float(len(node))} | {n for value in node for n in values(value)}
    if isinstance(node, str):
        return {float(n) for n in re.findall(r"\d+(?:\.\d+)?", node)}
    return set() if node is None or isinstance(node, bool) else {float(node)}


def smallest(node: Any, wanted: list[str], path: tuple = ()) -> tuple:
    """The path of the innermost part of a result that has all the numbers; what its keys say counts."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, part in inner:
        if isinstance(part, dict | list) and all(matches(n, values(part) | values([*path, key])) for n in wanted):
            return smallest(part, wanted, (*path, str(key)))
    return path


def paragraphs(page: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Tables as lines, and paragraphs as one, each with the results that it is about."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: list[str] = []
    for part in re.split(r"\n\s*\n", text):
        names = NAMED.findall(part) or ([] if part.startswith("#") else names)
        yield part.splitlines() if part.startswith("|") else [part], names


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def settings(name: str) -> set[float]:
    script = RESULTS.parent / f"{name}.py"
    return values(script.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_numbers_are_those_that_were_measured(page: Path) -> None:
    for lines, names in paragraphs(page):
        for part in lines:
            here = NAMED.findall(part) or names
            measured = {n for name in here for n in values(result(name))}
            whole = {n for name in here for n in settings(name)}
            for number in numbers(part):
                if here:
                    fine = matches(number, measured) or ("." not in number and matches(number, whole))
                    assert fine, f"{number} is in none of {here}: {part}"
                else:
                    assert "." not in number, f"{number} names no file in results/, or is to be written as code: {part}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_row_of_a_table_is_about_a_part_of_its_own(page: Path) -> None:
    for lines, names in paragraphs(page):
        rows = [line for line in lines[2:] if line.startswith("|") and not NAMED.search(line)]
        if len(names) == 1 and len(rows) > 1:
            found = [smallest(result(names[0])["result"], numbers(row)) for row in rows]
            assert all(found) and len(set(found)) == len(rows), dict(zip(found, rows, strict=False))


def test_every_claim_has_its_command_and_its_file() -> None:
    page = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if NAMED.search(line)]
    commands = {NAMED.findall(row[2])[0]: row[1].strip("`") for row in rows}
    assert commands == {path.stem: result(path.stem)["command"] for path in RESULTS.glob("*.json")}
    for script in RESULTS.parent.glob("*.py"):
        assert script.name in page or script.stem in commands, script.name


def test_make_bench_runs_them_all() -> None:
    done = subprocess.run(["make", "-n", "bench", "DATA=data"], cwd=ROOT, capture_output=True, text=True, check=True)
    run = dict(re.findall(r"benchmarks/(\w+)\.py(.*)", done.stdout.replace("\\\n", " ")))
    assert set(run) == {path.stem for path in RESULTS.glob("*.json")}
    for name, options in run.items():
        script = (RESULTS.parent / f"{name}.py").read_text(encoding="utf-8")
        for option in re.findall(r"--(\w+)", options):
            assert f'"--{option}"' in script or f"    {option}:" in script, f"{name}.py has no --{option}"


def test_the_rules_can_fail() -> None:
    held = {"AR": {"bleu": 19.26}, "block(4)": {"bleu": 13.66, "steps": 16}}
    assert matches("19.3", values(held)) and matches("20", {0.2}) and matches("1.4M", {1433600.0})
    assert not matches("19.4", values(held)) and not matches("1.5M", {1433600.0})
    assert smallest(held, ["16", "13.66"]) == ("block(4)",) and smallest(held, ["19.26", "13.66"]) == ()
    assert numbers("SmolLM2-135M took 1,209 MiB, 2.17 times `0.9` in Python 3.11.") == ["1,209", "2.17"]
