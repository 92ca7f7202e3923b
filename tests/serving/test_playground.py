"""The playground in a real browser: wide and narrow, with the mouse and with the keyboard alone."""

import json
import re
import shlex
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
expect = playwright.expect
expect.set_options(timeout=20_000)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def problems() -> list[str]:
    """Errors and warnings of the browser's console, and requests to other hosts. Tests that cause some clear it."""
    return []


WIDE, NARROW = (1280, 900), (390, 844)
at_any_width = pytest.mark.parametrize("page", [WIDE, NARROW], ids=["wide", "narrow"], indirect=True)


@pytest.fixture
def page(browser: Any, server: str, problems: list[str], request: pytest.FixtureRequest) -> Iterator[Any]:
    width, height = getattr(request, "param", WIDE)
    context = browser.new_context(
        viewport={"width": width, "height": height},
        reduced_motion="reduce",
        permissions=["clipboard-read", "clipboard-write"],
    )
    page = context.new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith(server) else problems.append(sent.url))
    page.goto(server)
    model(page).select_option("infiller")
    yield page
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    context.close()
    assert problems == []
    assert overflow <= 0


def model(page: Any) -> Any:
    return page.get_by_label("Model", exact=True)


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def tokens(page: Any) -> Any:
    return page.locator(".canvas [role=option]")


def texts(page: Any) -> list[str]:
    return tokens(page).all_text_contents()


def finish(page: Any) -> None:
    expect(page.locator(".pane[aria-busy=true]")).to_have_count(0)
    expect(button(page, "Generate")).to_be_visible()
    expect(page.locator(".pane .error:not(:empty)")).to_have_count(0)


def configure(pane: Any, length: int = 16, temperature: float = 0.0) -> None:
    """Sets the length and the temperature, with one token per forward pass."""
    pane.locator("summary").click()
    pane.get_by_label("Decoding method").select_option("quality")
    pane.get_by_label("Temperature").fill(str(temperature))
    pane.get_by_label("Max new tokens").fill(str(length))
    pane.locator("summary").click()


def generate(page: Any, prompt: str = "The cat sat", length: int = 16, temperature: float = 0.0) -> None:
    page.get_by_label("Prompt").fill("")
    configure(page.locator(".pane"), length, temperature)
    page.get_by_label("Prompt").fill(prompt)
    button(page, "Generate").click()
    finish(page)
    expect(page.locator(".canvas .open")).to_have_count(0)
    assert tokens(page).count() > length // 2


def sent(page: Any, action: Callable[[], None], path: str = "/v1/infill") -> dict[str, Any]:
    """The body of the request that an action sends."""
    with page.expect_request(f"**{path}") as request:
        action()
    return request.value.post_data_json


def check_accessibility(page: Any) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page).response["violations"]
        assert [(each["id"], [node["target"] for node in each["nodes"]]) for each in found] == []


@at_any_width
def test_a_text_appears_step_by_step_and_can_be_replayed(page: Any) -> None:
    page.evaluate("""() => {
      window.seen = new Set();
      const look = () => window.seen.add(document.querySelectorAll(".canvas .written").length);
      new MutationObserver(look).observe(document.querySelector(".canvas"), {childList: true, subtree: true});
    }""")
    generate(page, length=48)
    assert len(page.evaluate("[...window.seen]")) > 2  # token by token, not all at the end
    written = page.locator(".canvas .written").count()
    counts = {name: page.locator(f"[data-count={name}]").inner_text() for name in ("tokens", "forwards", "rate")}
    assert int(counts["tokens"]) == written
    assert float(counts["rate"]) == pytest.approx(written / int(counts["forwards"]), abs=0.006)
    expect(page.locator("#status")).to_contain_text(
        f"finished: {written} tokens in {counts['forwards']} forward passes"
    )

    slider = page.get_by_role("slider", name="Step")
    slider.fill("3")
    assert 0 < page.locator(".canvas .written").count() < written
    expect(slider).to_have_attribute("aria-valuetext", re.compile(r"step 3 of \d+"))
    slider.press("End")
    slider.press("ArrowLeft")
    button(page, "Play").click()
    expect(page.locator(".canvas .written")).to_have_count(written)
    expect(button(page, "Play")).to_be_visible()


@at_any_width
def test_an_alternative_replaces_a_token_and_is_pinned(page: Any) -> None:
    generate(page)
    before = texts(page)
    tokens(page).nth(8).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(re.compile(r"probability .*%, decoded in step \d+"))
    expect(dialog).to_be_in_viewport(ratio=1)
    choices = dialog.get_by_role("listitem")
    expect(choices).to_have_count(8)
    check_accessibility(page)
    chosen = choices.nth(5).get_by_role("button")
    word = chosen.evaluate("button => button.firstChild.data")
    chosen.click()
    expect(dialog).to_be_hidden()
    expect(tokens(page).nth(8)).to_have_class(re.compile("pinned"))
    expect(tokens(page).nth(8)).to_have_attribute("aria-label", re.compile(re.escape(word) + ".*pinned"))
    assert texts(page)[:8] + texts(page)[9:] == before[:8] + before[9:]
    button(page, "Undo").click()
    assert texts(page) == before
    button(page, "Redo").click()
    expect(tokens(page).nth(8)).to_have_class(re.compile("pinned"))


def test_own_text_replaces_a_token(page: Any) -> None:
    generate(page)
    count = tokens(page).count()
    tokens(page).nth(8).click()
    page.get_by_label("Or your own text").fill("the cat sat")
    button(page, "Insert").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator(".canvas .given.pinned").first).to_be_visible()
    assert tokens(page).count() >= count
    assert "the cat sat" in "".join(texts(page))


@at_any_width
def test_selected_tokens_are_regenerated_and_the_others_stay(page: Any) -> None:
    generate(page, temperature=2)
    before = texts(page)
    tokens(page).nth(7).click()
    page.keyboard.press("Escape")
    tokens(page).nth(10).click(modifiers=["Shift"])
    expect(page.get_by_text("4 selected")).to_be_visible()
    body = sent(page, button(page, "Regenerate").click)
    assert [i for i, token in enumerate(body["tokens"]) if token is None] == [7, 8, 9, 10]
    finish(page)
    after = texts(page)
    assert after[:7] + after[11:] == before[:7] + before[11:]
    assert after != before
    assert sent(page, button(page, "Regenerate").click)["seed"] == body["seed"] + 1


def test_dragging_selects(page: Any) -> None:
    generate(page)
    tokens(page).nth(5).hover()
    page.mouse.down()
    tokens(page).nth(9).hover()
    page.mouse.up()
    expect(page.locator(".canvas [aria-selected=true]")).to_have_count(5)
    expect(page.get_by_role("dialog")).to_be_hidden()


@at_any_width
def test_pinned_tokens_stay_when_the_rest_is_regenerated(page: Any) -> None:
    generate(page, temperature=2)
    before = texts(page)
    button(page, "Select several").click()
    tokens(page).nth(6).click()
    tokens(page).nth(9).click()
    button(page, "Pin").click()
    expect(page.locator(".canvas .pinned")).to_have_count(2)
    given = page.locator(".canvas .given").count()
    tokens(page).nth(6).click()
    tokens(page).nth(9).click()
    body = sent(page, button(page, "Regenerate the rest").click)
    assert [i for i, token in enumerate(body["tokens"]) if token is not None] == [*range(given), 6, 9]
    finish(page)
    after = texts(page)
    assert (after[:given], after[6], after[9]) == (before[:given], before[6], before[9])
    assert after != before
    check_accessibility(page)


@at_any_width
def test_ar_models_regenerate_all_later_tokens(page: Any) -> None:
    model(page).select_option("left-to-right")
    expect(button(page, "Insert masked span")).to_be_hidden()
    generate(page, temperature=1)
    before = texts(page)
    tokens(page).nth(5).click()
    page.keyboard.press("Escape")
    expect(page.get_by_text("This model generates from left to right")).to_be_visible()
    body = sent(page, button(page, "Regenerate from here").click)
    assert [token is None for token in body["tokens"]] == [False] * 5 + [True] * (len(body["tokens"]) - 5)
    finish(page)
    assert texts(page)[:5] == before[:5]


@at_any_width
def test_masked_spans_of_several_lengths(page: Any) -> None:
    page.get_by_label("Prompt").fill("The cat")
    button(page, "Insert masked span").click()
    page.keyboard.type(" sat")
    expect(page.get_by_label("Prompt")).to_have_value("The cat[[8]] sat")
    generate(page, "The [[2-4]] sat on the mat", length=4)
    lengths = page.get_by_label("Candidate lengths").get_by_role("option")
    expect(lengths).to_have_count(3)
    expect(lengths.filter(has_text="kept")).to_have_count(1)
    page.get_by_label("Candidate lengths").select_option("2")
    expect(page.locator(".canvas .written")).to_have_count(4)
    page.get_by_role("slider", name="Step").fill("0")
    expect(page.locator(".canvas .open")).to_have_count(4)
    button(page, "Fill open positions (4)").click()
    finish(page)
    expect(page.locator(".canvas .open")).to_have_count(0)
    check_accessibility(page)


@at_any_width
def test_two_models_side_by_side(page: Any) -> None:
    button(page, "Compare").click()
    panes = page.locator(".pane")
    expect(panes).to_have_count(2)
    configure(panes.first)
    configure(panes.last)
    button(page, "Generate").click()
    finish(page)
    for pane in (panes.first, panes.last):
        expect(pane.locator(".canvas .written").first).to_be_visible()
        expect(pane.locator("[data-count=forwards]")).to_have_text(re.compile("[1-9]"))
    assert len({panes.nth(i).get_by_label("Model", exact=True).input_value() for i in range(2)}) == 2
    check_accessibility(page)
    button(page, "Compare").click()
    expect(panes).to_have_count(1)


@at_any_width
def test_everything_works_by_keyboard(page: Any) -> None:
    configure(page.locator(".pane"))
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("The cat")
    page.keyboard.press("Control+Enter")
    finish(page)
    before = texts(page)
    focused = page.locator(":focus")
    while focused.get_attribute("role") != "option":
        page.keyboard.press("Tab")
    for key in ("End", "ArrowUp", "Home", *["ArrowRight"] * 6):
        page.keyboard.press(key)
    expect(tokens(page).nth(6)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_role("button").first).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(tokens(page).nth(6)).to_be_focused()
    expect(tokens(page).nth(6)).to_have_class(re.compile("pinned"))
    page.keyboard.press("Control+z")
    assert texts(page) == before

    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("p")
    expect(page.locator(".canvas .pinned")).to_have_count(2)
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    page.keyboard.press(" ")
    page.keyboard.press("Escape")
    page.keyboard.press(" ")
    body = sent(page, lambda: page.keyboard.press("Delete"))
    assert body["tokens"].index(None) == 9 and body["tokens"].count(None) == 1
    finish(page)


def test_stop_ends_the_request(page: Any) -> None:
    page.route("**/v1/completions", lambda route: None)
    button(page, "Generate").click()
    button(page, "Stop").click()
    finish(page)
    expect(page.locator("#status")).to_have_text("Stopped.")


def test_errors_are_shown_at_their_field(page: Any, problems: list[str]) -> None:
    configure(page.locator(".pane"), temperature=-1)
    button(page, "Generate").click()
    expect(page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Temperature")).to_have_accessible_description(re.compile("greater than or equal to 0"))
    check_accessibility(page)
    page.get_by_label("Temperature").fill("0")
    button(page, "Generate").click()
    finish(page)
    model(page).select_option("left-to-right")
    page.get_by_label("Prompt").fill("The [[3]] sat")
    button(page, "Generate").click()
    expect(page.locator(".error:visible")).to_have_count(1)
    assert all("400" in line for line in problems)
    problems.clear()


def test_a_key_is_requested(page: Any, problems: list[str]) -> None:
    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            error = {"error": {"message": "this server requires a key", "param": None}}
            route.fulfill(status=401, body=json.dumps(error), content_type="application/json")

    page.route("**/v1/**", guard)
    page.reload()
    expect(page.get_by_text("this server requires a key")).to_be_visible()
    check_accessibility(page)
    page.get_by_label("This server requires an API key").fill("secret")
    button(page, "Continue").click()
    expect(page.get_by_label("This server requires an API key")).to_be_hidden()
    generate(page)
    button(page, "Copy as Python").click()
    code = page.evaluate("navigator.clipboard.readText()")
    assert "secret" not in code and 'os.environ["DIFFUSIFY_KEY"]' in code
    problems.clear()


@pytest.mark.parametrize("prompt", ['It\'s the "cat"', "It's the [[3]] cat"])
def test_requests_can_be_copied(page: Any, server: str, prompt: str) -> None:
    page.locator(".pane summary").click()
    page.get_by_label("Seed").fill("")
    page.locator(".pane summary").click()
    generate(page, prompt, length=4)
    button(page, "Copy as curl").click()
    words = shlex.split(page.evaluate("navigator.clipboard.readText()").replace("\\\n", " "))
    assert words[:2] == ["curl", f"{server}/v1/{'infill' if '[[' in prompt else 'completions'}"]
    request = urllib.request.Request(
        words[1], words[words.index("-d") + 1].encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        text = json.load(answer)["choices"][0]["text"]
    button(page, "Copy text").click()
    assert page.evaluate("navigator.clipboard.readText()").endswith(text)

    button(page, "Copy as Python").click()
    code = page.evaluate("navigator.clipboard.readText()")
    compile(code, "copied", "exec")
    assert f'base_url="{server}/v1"' in code and '"preset": "quality"' in code and "undefined" not in code
