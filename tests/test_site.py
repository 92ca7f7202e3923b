"""The documentation site builds without warnings, is complete and loads nothing from elsewhere."""

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import diffusify
from diffusify.sampling.sampling_config import SamplingConfig
from tests.serving.models import tiny_lm

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_reference_has_every_public_name(site: Path) -> None:
    reference = (site / "reference.html").read_text(encoding="utf-8")
    assert not [name for name in diffusify.__all__ if f'id="diffusify.{name}"' not in reference]


AWAY = r"""["']?\s*(?:https?:)?//"""
LOADS = re.compile(rf"<(?!a\b)\w[^>]*?\s(?:src|srcset|href|data|poster|action)\s*=\s*{AWAY}", re.IGNORECASE)
STYLES = re.compile(rf"(?:url\(|@import)\s*{AWAY}", re.IGNORECASE)
# What the theme's script would fetch for diagrams, for a repository's stars, and for browsers of before 2020.
ON_DEMAND = ("unpkg.com/mermaid", "api.github.com/", "${e}/api/v4/", "unpkg.com/resize-observer-polyfill")
DEMANDS = re.compile(r"""class="?mermaid|data-md-component="?source\b""")


@pytest.mark.slow
def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    assert len(pages) > 10
    for page in pages:
        assert not LOADS.search(page) and not STYLES.search(page)
        assert not DEMANDS.search(page)
    for path in site.rglob("*.css"):
        assert not STYLES.search(path.read_text(encoding="utf-8")), path
    for path in site.rglob("*.js"):
        for address in re.findall(r"""["'`]https?://([^"'`]+)["'`]""", path.read_text(encoding="utf-8")):
            assert address.startswith(("www.w3.org/", *ON_DEMAND)), f"{path.name} speaks of {address}"


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_browser_loads_nothing_else_and_finds_words(site: Path, address: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    elsewhere: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda sent: None if sent.url.startswith((address, "data:")) else elsewhere.append(sent.url))
        page.on("pageerror", lambda error: elsewhere.append(str(error)))
        for path in sorted(site.rglob("*.html")):
            page.goto(f"{address}/{path.relative_to(site)}")
        page.goto(f"{address}/index.html")
        page.get_by_role("textbox", name="Search").fill("lossless")
        found = page.locator(".md-search-result__link").first
        playwright.expect(found).to_have_attribute("href", re.compile("html"), timeout=20_000)
        browser.close()
    assert elsewhere == []


def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def behind(picture: Path) -> Any:
    """The data that a picture was drawn from."""
    data = picture.read_text(encoding="utf-8").partition("<dc:description>")[2].partition("</dc:description>")[0]
    return json.loads(html.unescape(data))


def test_the_pictures_show_what_the_classes_say(tmp_path: Path) -> None:
    drawn = pictures()
    seen, curves = drawn.patterns(), drawn.schedules()
    assert behind(IMAGES / "patterns.svg") == seen
    assert behind(IMAGES / "schedules.svg") == curves
    drawn.save(drawn.draw_patterns(seen), tmp_path / "again.svg", seen)
    assert behind(tmp_path / "again.svg") == seen
    assert seen["Causal()"] == [[int(k <= q) for k in range(8)] for q in range(8)]
    assert seen["Prefix(), 3 of prompt"] == [[int(q >= 3 or k < 3) for k in range(8)] for q in range(8)]
    block = seen["BlockCausal(4), [noisy, clean]"]
    for q in range(8):
        assert block[q] == [int(q // 4 == k // 4) for k in range(8)] + [int(k // 4 < q // 4) for k in range(8)]
        assert block[8 + q] == [0] * 8 + [int(k <= q) for k in range(8)]


def test_the_data_flow_names_what_exists() -> None:
    drawn = pictures()
    for name, flow in (("training", drawn.TRAINING), ("sampling", drawn.SAMPLING)):
        assert behind(IMAGES / f"{name}.svg") == [list(box) for box in flow]
        for title, _, file in flow:
            assert f"class {title}" in (ROOT / "src" / "diffusify" / file).read_text(encoding="utf-8"), title


def test_a_text_develops(tmp_path: Path) -> None:
    drawn, lm = pictures(), tiny_lm(infills=True)
    committed = behind(IMAGES / "development.svg") | behind(IMAGES / "writing.svg")
    made = drawn.development(lm, lm.prepare_generation(["The cat"], 12, SamplingConfig(steps=4)))
    assert made[0][-12:] == [None] * 12 and len(made) == 5
    for text in (made, *committed.values()):
        for before, after in zip(text, text[1:], strict=False):
            assert all(token in (None, later) for token, later in zip(before, after, strict=True)) and before != after
        assert None in text[0] and None not in text[-1]
    drawn.save(drawn.draw_development(committed), tmp_path / "again.svg", committed)
    assert behind(tmp_path / "again.svg") == committed
