"""The playground as people use it: in a real browser, wide and narrow, with a mouse and without."""

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
def complaints() -> list[str]:
    """What the browser's console complains of, and requests to other places. Tests that provoke some clear it."""
    return []


WIDE, NARROW = (1280, 900), (390, 844)
at_any_width = pytest.mark.parametrize("page", [WIDE, NARROW], ids=["wide", "narrow"], indirect=True)


@pytest.fixture
def page(browser: Any, server: str, complaints: list[str], request: pytest.FixtureRequest) -> Iterator[Any]:
    width, height = getattr(request, "param", WIDE)
    context = browser.new_context(
        viewport={"width": width, "height": height},
        reduced_motion="reduce",
        permissions=["clipboard-read", "clipboard-write"],
    )
    page = context.new_page()
    page.on("console", lambda told: complaints.append(told.text) if told.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: None if sent.url.startswith(server) else complaints.append(sent.url))
    page.goto(server)
    model(page).select_option("infiller")
    yield page
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    context.close()
    assert complaints == []
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
    expect(button(page, "Write")).to_be_visible()
    expect(page.locator(".pane .error:not(:empty)")).to_have_count(0)


def settle(pane: Any, room: int = 16, temperature: float = 0.0) -> None:
    """Sets how a text is written: so many tokens, one per forward."""
    pane.locator("summary").click()
    pane.get_by_label("Way of writing").select_option("quality")
    pane.get_by_label("Temperature").fill(str(temperature))
    pane.get_by_label("Tokens at most").fill(str(room))
    pane.locator("summary").click()


def write(page: Any, prompt: str = "The cat sat", room: int = 16, temperature: float = 0.0) -> None:
    page.get_by_label("Prompt").fill("")
    settle(page.locator(".pane"), room, temperature)
    page.get_by_label("Prompt").fill(prompt)
    button(page, "Write").click()
    finish(page)
    expect(page.locator(".canvas .open")).to_have_count(0)
    assert tokens(page).count() > room // 2


def sent(page: Any, act: Callable[[], None], path: str = "/v1/infill") -> dict[str, Any]:
    """The request that an act leads to."""
    with page.expect_request(f"**{path}") as request:
        act()
    return request.value.post_data_json


def clean(page: Any) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page).response["violations"]
        assert [(each["id"], [node["target"] for node in each["nodes"]]) for each in found] == []


@at_any_width
def test_a_text_develops_and_can_be_looked_back_at(page: Any) -> None:
    page.evaluate("""() => {
      window.seen = new Set();
      const look = () => window.seen.add(document.querySelectorAll(".canvas .written").length);
      new MutationObserver(look).observe(document.querySelector(".canvas"), {childList: true, subtree: true});
    }""")
    write(page, room=48)
    assert len(page.evaluate("[...window.seen]")) > 2  # token by token, not all at the end
    written = page.locator(".canvas .written").count()
    counted = {name: page.locator(f"[data-count={name}]").inner_text() for name in ("tokens", "forwards", "rate")}
    assert int(counted["tokens"]) == written
    assert float(counted["rate"]) == pytest.approx(written / int(counted["forwards"]), abs=0.006)
    expect(page.locator("#status")).to_contain_text(f"is done: {written} tokens in {counted['forwards']} forwards")

    slider = page.get_by_role("slider", name="StepEvent")
    slider.fill("3")
    assert 0 < page.locator(".canvas .written").count() < written
    expect(slider).to_have_attribute("aria-valuetext", re.compile(r"step 3 of \d+"))
    slider.press("End")
    slider.press("ArrowLeft")
    button(page, "Play").click()
    expect(page.locator(".canvas .written")).to_have_count(written)
    expect(button(page, "Play")).to_be_visible()


@at_any_width
def test_an_alternative_is_put_in_place_and_pinned(page: Any) -> None:
    write(page)
    before = texts(page)
    tokens(page).nth(8).click()
    card = page.get_by_role("dialog")
    expect(card).to_contain_text(re.compile(r"% sure, written in step \d+"))
    expect(card).to_be_in_viewport(ratio=1)
    choices = card.get_by_role("listitem")
    expect(choices).to_have_count(8)
    clean(page)
    chosen = choices.nth(5).get_by_role("button")
    word = chosen.evaluate("button => button.firstChild.data")
    chosen.click()
    expect(card).to_be_hidden()
    expect(tokens(page).nth(8)).to_have_class(re.compile("pinned"))
    expect(tokens(page).nth(8)).to_have_attribute("aria-label", re.compile(re.escape(word) + ".*pinned"))
    assert texts(page)[:8] + texts(page)[9:] == before[:8] + before[9:]
    button(page, "Undo").click()
    assert texts(page) == before
    button(page, "Redo").click()
    expect(tokens(page).nth(8)).to_have_class(re.compile("pinned"))


def test_own_words_are_put_in_place(page: Any) -> None:
    write(page)
    count = tokens(page).count()
    tokens(page).nth(8).click()
    page.get_by_label("Or your own words").fill("the cat sat")
    button(page, "Put").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator(".canvas .given.pinned").first).to_be_visible()
    assert tokens(page).count() >= count
    assert "the cat sat" in "".join(texts(page))


@at_any_width
def test_tokens_are_masked_again_and_the_others_stay(page: Any) -> None:
    write(page, temperature=2)
    before = texts(page)
    tokens(page).nth(7).click()
    page.keyboard.press("Escape")
    tokens(page).nth(10).click(modifiers=["Shift"])
    expect(page.get_by_text("4 selected")).to_be_visible()
    body = sent(page, button(page, "Write again").click)
    assert [i for i, token in enumerate(body["tokens"]) if token is None] == [7, 8, 9, 10]
    finish(page)
    after = texts(page)
    assert after[:7] + after[11:] == before[:7] + before[11:]
    assert after != before
    assert sent(page, button(page, "Write again").click)["seed"] == body["seed"] + 1


def test_dragging_selects(page: Any) -> None:
    write(page)
    tokens(page).nth(5).hover()
    page.mouse.down()
    tokens(page).nth(9).hover()
    page.mouse.up()
    expect(page.locator(".canvas [aria-selected=true]")).to_have_count(5)
    expect(page.get_by_role("dialog")).to_be_hidden()


@at_any_width
def test_pinned_tokens_stay_when_the_rest_is_written_anew(page: Any) -> None:
    write(page, temperature=2)
    before = texts(page)
    button(page, "Select several").click()
    tokens(page).nth(6).click()
    tokens(page).nth(9).click()
    button(page, "Pin").click()
    expect(page.locator(".canvas .pinned")).to_have_count(2)
    given = page.locator(".canvas .given").count()
    tokens(page).nth(6).click()
    tokens(page).nth(9).click()
    body = sent(page, button(page, "Write the rest anew").click)
    assert [i for i, token in enumerate(body["tokens"]) if token is not None] == [*range(given), 6, 9]
    finish(page)
    after = texts(page)
    assert (after[:given], after[6], after[9]) == (before[:given], before[6], before[9])
    assert after != before
    clean(page)


@at_any_width
def test_left_to_right_opens_all_that_follows(page: Any) -> None:
    model(page).select_option("left-to-right")
    expect(button(page, "Insert a hole")).to_be_hidden()
    write(page, temperature=1)
    before = texts(page)
    tokens(page).nth(5).click()
    page.keyboard.press("Escape")
    expect(page.get_by_text("This model writes from left to right")).to_be_visible()
    body = sent(page, button(page, "Write anew from here").click)
    assert [token is None for token in body["tokens"]] == [False] * 5 + [True] * (len(body["tokens"]) - 5)
    finish(page)
    assert texts(page)[:5] == before[:5]


@at_any_width
def test_holes_of_several_sizes(page: Any) -> None:
    page.get_by_label("Prompt").fill("The cat")
    button(page, "Insert a hole").click()
    page.keyboard.type(" sat")
    expect(page.get_by_label("Prompt")).to_have_value("The cat[[8]] sat")
    write(page, "The [[2-4]] sat on the mat", room=4)
    sizes = page.get_by_label("Sizes tried").get_by_role("option")
    expect(sizes).to_have_count(3)
    expect(sizes.filter(has_text="kept")).to_have_count(1)
    page.get_by_label("Sizes tried").select_option("2")
    expect(page.locator(".canvas .written")).to_have_count(4)
    page.get_by_role("slider", name="StepEvent").fill("0")
    expect(page.locator(".canvas .open")).to_have_count(4)
    button(page, "Write the 4 open").click()
    finish(page)
    expect(page.locator(".canvas .open")).to_have_count(0)
    clean(page)


@at_any_width
def test_two_models_side_by_side(page: Any) -> None:
    button(page, "Compare").click()
    panes = page.locator(".pane")
    expect(panes).to_have_count(2)
    settle(panes.first)
    settle(panes.last)
    button(page, "Write").click()
    finish(page)
    for pane in (panes.first, panes.last):
        expect(pane.locator(".canvas .written").first).to_be_visible()
        expect(pane.locator("[data-count=forwards]")).to_have_text(re.compile("[1-9]"))
    assert len({panes.nth(i).get_by_label("Model", exact=True).input_value() for i in range(2)}) == 2
    clean(page)
    button(page, "Compare").click()
    expect(panes).to_have_count(1)


@at_any_width
def test_the_keyboard_is_enough(page: Any) -> None:
    settle(page.locator(".pane"))
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
    button(page, "Write").click()
    button(page, "Stop").click()
    finish(page)
    expect(page.locator("#status")).to_have_text("Stopped.")


def test_a_refusal_stands_where_it_belongs(page: Any, complaints: list[str]) -> None:
    settle(page.locator(".pane"), temperature=-1)
    button(page, "Write").click()
    expect(page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("Temperature")).to_have_accessible_description(re.compile("greater than or equal to 0"))
    clean(page)
    page.get_by_label("Temperature").fill("0")
    button(page, "Write").click()
    finish(page)
    model(page).select_option("left-to-right")
    page.get_by_label("Prompt").fill("The [[3]] sat")
    button(page, "Write").click()
    expect(page.locator(".error:visible")).to_have_count(1)
    assert all("400" in line for line in complaints)
    complaints.clear()


def test_a_key_is_asked_for(page: Any, complaints: list[str]) -> None:
    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            refusal = {"error": {"message": "this server needs a key", "param": None}}
            route.fulfill(status=401, body=json.dumps(refusal), content_type="application/json")

    page.route("**/v1/**", guard)
    page.reload()
    expect(page.get_by_text("this server needs a key")).to_be_visible()
    clean(page)
    page.get_by_label("This server asks for a key").fill("secret")
    button(page, "Go on").click()
    expect(page.get_by_label("This server asks for a key")).to_be_hidden()
    write(page)
    button(page, "Copy as Python").click()
    code = page.evaluate("navigator.clipboard.readText()")
    assert "secret" not in code and 'os.environ["DIFFUSIFY_KEY"]' in code
    complaints.clear()


@pytest.mark.parametrize("prompt", ['It\'s the "cat"', "It's the [[3]] cat"])
def test_requests_can_be_copied(page: Any, server: str, prompt: str) -> None:
    write(page, prompt, room=4)
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
    assert f'base_url="{server}/v1"' in code and '"preset": "quality"' in code
