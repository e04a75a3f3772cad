"""The playground, driven as a reader drives it, in the system's Chromium."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright
from tests.actors.serving.conftest import host_of, listening

from fewstep.actors.serving.chat import ChatTemplate
from fewstep.actors.serving.desk import Desk, DeskOptions
from fewstep.actors.serving.keys import make_key, write_keys
from fewstep.actors.serving.service import CompletionService, ServedModel, created_of
from fewstep.kernels.model.checkpoint import embedded_model, load_model
from fewstep.platform.records import DecodePolicy

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)

MASKS = '#canvas [data-state="mask"], #canvas [data-state="provisional"], #canvas [data-state="ahead"]'


class Visit:
    """A page, and what it asked of whom."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.requests: list[Request] = []
        self.faults: list[str] = []
        page.on("request", lambda request: self.requests.append(request))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda line: self.faults.append(line.text) if line.type == "error" else None)
        page.goto(url)

    def bodies(self) -> list[dict[str, Any]]:
        """Of the requests that generate, in order."""
        found = [request for request in self.requests if request.url.endswith("/completions")]
        return [json.loads(request.post_data or "") for request in found]

    def ask(self, prompt: str, max_tokens: int = 24, seed: int = 7) -> None:
        self.page.fill("#prompt", prompt)
        self.page.fill("#max-tokens", str(max_tokens))
        self.page.fill("#seed", str(seed))
        self.page.locator("#temperature").fill("1")

    def run(self) -> None:
        self.page.click("#run")
        self.done()

    def done(self) -> None:
        expect(self.page.locator("#status")).to_have_text(re.compile(r" in \d+ forwards?, "), timeout=30_000)

    @property
    def answer(self) -> str:
        return "".join(self.page.locator("#canvas .token").all_text_contents())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Containers run tests as root, where Chromium's own sandbox refuses to start.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Visit]]:
    contexts = []

    def visit(url: str, **options: Any) -> Visit:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(15_000)
        return Visit(context.new_page(), url)

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture
def visit(url: str, open_page: Callable[..., Visit]) -> Visit:
    found = open_page(url)
    expect(found.page.locator("#status")).to_have_text("Ready.")
    return found


def test_it_loads_from_this_server_alone_and_under_a_strict_policy(visit: Visit, url: str) -> None:
    visit.ask("abc")
    visit.run()
    assert {request.url.split("/", 3)[2] for request in visit.requests} == {url.removeprefix("http://")}
    policy = httpx.get(url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert visit.faults == []
    visit.page.evaluate(
        "() => { const node = document.createElement('script'); node.textContent = 'window.inline = 1';"
        " document.body.append(node); }"
    )
    assert visit.page.evaluate("window.inline") is None


def test_the_answer_is_that_of_the_same_request_without_a_stream(visit: Visit, url: str) -> None:
    visit.ask("abc")
    visit.run()
    (body,) = visit.bodies()
    assert (body["stream"], body["diffusing"], body["fewstep"]) == (
        True,
        True,
        {"kind": "threshold", "threshold": 0.9},
    )
    plain = {
        name: value for name, value in body.items() if name not in ("stream", "diffusing", "stream_options")
    }
    whole = httpx.post(f"{url}/v1/completions", json=plain).json()
    assert visit.answer == whole["choices"][0]["text"] != ""
    usage = whole["usage"]["fewstep"]
    assert visit.page.inner_text("#forwards") == str(usage["forwards"])
    assert visit.page.inner_text("#tokens") == str(whole["usage"]["completion_tokens"])
    assert visit.page.inner_text("#tokens-per-forward") == f"{usage['tokens_per_forward']:.2f}"


def test_a_chat_is_asked_as_a_chat(visit: Visit, url: str) -> None:
    visit.ask("abc")
    visit.page.get_by_text("Chat", exact=True).click()
    visit.run()
    (body,) = visit.bodies()
    plain = {
        name: value for name, value in body.items() if name not in ("stream", "diffusing", "stream_options")
    }
    whole = httpx.post(f"{url}/v1/chat/completions", json=plain).json()
    assert visit.answer == whole["choices"][0]["message"]["content"] != ""


def test_the_scrubber_goes_from_masks_to_none(visit: Visit) -> None:
    visit.ask("abc")
    visit.run()
    page, scrubber = visit.page, visit.page.locator("#scrubber")
    final = visit.answer
    assert page.locator(MASKS).count() == 0
    assert page.locator("#canvas .token").count() == len(final)  # this model's tokens are characters
    scrubber.press("Home")
    expect(page.locator("#place")).to_contain_text("forward 1 of")
    assert page.locator(MASKS).count() > 15
    assert page.locator('#canvas [data-state="committed"]').count() >= 1
    counts = []
    for _ in range(int(scrubber.get_attribute("max") or 0)):
        scrubber.press("ArrowRight")
        counts.append(page.locator(MASKS).count())
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert visit.answer == final
    page.click("#play")
    expect(page.locator("#place")).to_contain_text("forward 1 of")
    expect(page.locator("#play")).to_have_text("Replay", timeout=30_000)
    assert visit.answer == final


def test_the_model_and_the_kind_that_are_picked_are_asked_for(
    url_of_both: str, open_page: Callable[..., Visit]
) -> None:
    visit = open_page(url_of_both)
    expect(visit.page.locator("#model option")).to_have_text(["tiny", "both"])
    visit.ask("abc")
    visit.page.select_option("#model", "both")
    numbers = {
        "static": {"tokens_per_step": 2},
        "entropy_bound": {"entropy_bound": 0.1},
        "factor": {"factor": 1},
    }
    for kind, number in numbers.items():
        visit.page.select_option("#kind", kind)
        visit.run()
        body = visit.bodies()[-1]
        assert (body["model"], body["fewstep"]) == ("both", {"kind": kind, **number})
    visit.page.select_option("#kind", "")
    visit.run()
    assert visit.bodies()[-1]["fewstep"] == {}
    assert len(visit.bodies()) == 4


@pytest.fixture(scope="module")
def trained() -> Iterator[CompletionService]:
    """The model shipped with the package: one that changes its mind."""
    torch.set_num_threads(1)
    folder = embedded_model()
    model, tokenizer = load_model(folder)
    host = host_of(model, tokenizer)
    policy = DecodePolicy(threshold=0.9)
    yield CompletionService(
        host,
        ServedModel(
            "embedded", created_of(folder), model.config, tokenizer, ChatTemplate(folder), policy, 96
        ),
    )
    host.close()


def test_edits_are_asked_for_and_shown(trained: CompletionService, open_page: Callable[..., Visit]) -> None:
    with listening(trained) as url:
        visit = open_page(url)
        expect(visit.page.locator("#status")).to_have_text("Ready.")
        visit.page.locator("#number").fill("0.05")
        visit.page.check("#edits")
        visit.page.locator("#edit-threshold").fill("0.3")
        visit.run()
        (body,) = visit.bodies()
        assert body["fewstep"] == {"kind": "threshold", "threshold": 0.05, "edit_threshold": 0.3}
        shown = visit.page.locator('#canvas [data-state="edited"]')
        assert shown.count() > 0
        assert int(visit.page.inner_text("#num-edits")) >= shown.count()
        assert "replaced" in (shown.first.get_attribute("title") or "")


def test_a_selection_is_filled_in_between_what_stands_around_it(visit: Visit) -> None:
    visit.ask("abcdefghij")
    visit.page.evaluate("document.getElementById('prompt').setSelectionRange(3, 6)")
    visit.page.click("#infill")
    visit.done()
    (body,) = visit.bodies()
    assert (body["prompt"], body["suffix"], body["max_tokens"]) == ("abc", "ghij", 3)
    text = visit.page.inner_text("#canvas")
    assert text.startswith("abc")
    assert text.endswith("ghij")
    assert visit.answer not in ("", "def")
    # Once more, from the canvas: the second character of the answer is filled in anew.
    whole = visit.page.evaluate("document.getElementById('canvas').textContent")
    visit.page.fill("#hole", "2")
    visit.page.evaluate(
        "() => document.getSelection().selectAllChildren(document.querySelectorAll('#canvas .token')[1])"
    )
    visit.page.click("#infill")
    expect(visit.page.locator("#status")).not_to_have_text("Running…")
    visit.done()
    again = visit.bodies()[1]
    assert (again["prompt"], again["suffix"], again["max_tokens"]) == (whole[:4], whole[5:], 2)


def test_stop_gives_the_slot_back(visit: Visit, service: CompletionService) -> None:
    visit.ask('"#$', max_tokens=1900)  # which this model continues to the end
    visit.page.locator("#temperature").fill("0")
    visit.page.locator("#number").fill("1")
    visit.page.click("#run")
    scrubber = visit.page.locator("#scrubber")
    expect(scrubber).to_be_enabled()
    assert service.host.stats()["running"] == 1
    scrubber.press("Home")
    num_steps = int(scrubber.get_attribute("max") or 0)
    expect(scrubber).not_to_have_attribute("max", str(num_steps))
    assert scrubber.input_value() == "0", "an earlier step is left while the answer goes on"
    visit.page.click("#stop")
    expect(visit.page.locator("#status")).to_contain_text("Stopped")
    deadline = time.monotonic() + 10
    while service.host.stats()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.host.stats()["running"] == 0
    assert num_steps < int(scrubber.get_attribute("max") or 0) < 1899
    visit.ask("abc", max_tokens=8)
    visit.run()


def test_the_keyboard_is_enough(visit: Visit) -> None:
    keyboard, page = visit.page.keyboard, visit.page

    def focused() -> str:
        found: str = page.evaluate("document.activeElement.id || document.activeElement.className")
        return found

    order = []
    for _ in range(12):
        keyboard.press("Tab")
        order.append(focused())
        if order[-1] == "prompt":
            break
    assert order[0] == "skip"
    assert order[-1] == "prompt"
    keyboard.press("Control+A")
    keyboard.type("abcdef")
    keyboard.press("Control+Enter")
    visit.done()
    assert visit.bodies()[0]["prompt"] == "abcdef"
    assert focused() == "prompt"
    keyboard.press("Shift+ArrowLeft")
    keyboard.press("Shift+ArrowLeft")
    expect(page.locator("#infill")).to_have_attribute("aria-disabled", "false")
    keyboard.press("Alt+i")
    expect(page.locator("#status")).not_to_have_text("Running…")
    visit.done()
    assert visit.bodies()[1]["prompt"] == "abcd"
    for expected in ("run", "stop", "infill"):
        keyboard.press("Tab")
        assert focused() == expected
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    assert page.locator('#status[aria-live="polite"]').count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(url: str, open_page: Callable[..., Visit], scheme: str) -> None:
    visit = open_page(url, viewport={"width": 390, "height": 844}, color_scheme=scheme, is_mobile=True)
    visit.ask("a" * 300)
    heights = {visit.page.evaluate("document.documentElement.scrollHeight")}
    visit.run()
    heights.add(visit.page.evaluate("document.documentElement.scrollHeight"))
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 390
    assert len(heights) == 1, "the layout has jumped"


def test_a_refusal_is_shown_in_words(visit: Visit) -> None:
    visit.ask("abc", max_tokens=100_000)
    visit.page.click("#run")
    expect(visit.page.locator("#error")).to_contain_text("The server refused: ")
    expect(visit.page.locator("#error")).to_contain_text("100000")
    expect(visit.page.locator("#canvas")).to_have_text("")
    visit.ask("abc")
    visit.run()
    answer = visit.answer
    visit.page.fill("#max-tokens", "100000")
    visit.page.click("#run")
    expect(visit.page.locator("#error")).to_contain_text("The server refused: ")
    assert visit.answer == answer, "the answer before the refusal is gone"
    visit.ask("abc")
    visit.run()
    expect(visit.page.locator("#error")).to_be_empty()


def test_a_server_that_is_gone_is_said_to_be(
    service: CompletionService, open_page: Callable[..., Visit]
) -> None:
    with listening(service) as url:
        visit = open_page(url)
        expect(visit.page.locator("#status")).to_have_text("Ready.")
    visit.page.click("#run")
    expect(visit.page.locator("#error")).to_have_text("The server does not answer. Is it still running?")


def test_a_server_with_keys_is_asked_with_one(
    service: CompletionService, open_page: Callable[..., Visit], tmp_path: Path
) -> None:
    key, entry = make_key("reader")
    write_keys(tmp_path / "keys.json", [entry])
    desk = Desk(DeskOptions(keys=tmp_path / "keys.json"), lambda: {service.model.name: service.host})
    with listening(service, desk=desk) as url:
        visit = open_page(url)
        dialog, page = visit.page.locator("#key-dialog"), visit.page
        expect(dialog).to_be_visible()
        expect(page.locator("#key-words")).to_contain_text("API key")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-words")).to_be_visible()
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("Ready.")
        visit.ask("abc")
        visit.run()
        assert visit.answer
        stored = page.evaluate(
            "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        )
        assert key not in stored
