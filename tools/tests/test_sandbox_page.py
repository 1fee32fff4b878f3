"""The sandbox's page in a real browser, beside a real service whose log it reads.

With SANDBOX_SHOTS=FOLDER a test writes screenshots of the page to that folder.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests import chromium
from tests.service import Service, free_port
from tools.dev.mock_provider import ANSWERS
from tools.dev.sandbox import Sandbox

pytestmark = pytest.mark.needs("chromium")

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
NARROW = {"width": 320, "height": 640}
MOCKS = ("email 1", "email 2", "push 1", "push 2")
SWITCH = "**/sandbox/providers/*"
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def browser(processes: None) -> Iterator[Browser]:
    with chromium.browser() as running:
        yield running


@dataclass(frozen=True)
class Stage:
    """A page that shows a sandbox, and the service that the sandbox is for."""

    page: Page
    sandbox: Sandbox
    service: Service

    def send(self) -> None:
        """Send from the form, and wait until the list shows it and its answer."""
        before = self.notifications.count()
        self.page.get_by_role("button", name="Send").click()
        expect(self.notifications).to_have_count(before + 1)
        expect(self.page.locator("#answer")).to_contain_text("The service answered")

    def switch(self, provider: str, behaviour: str) -> None:
        """Choose how a provider answers, and wait until it does."""
        answers = self.page.get_by_role("radiogroup", name=f"{provider} answers")
        with self.page.expect_response(SWITCH):
            answers.get_by_role("radio", name=behaviour).check()

    def provider(self, name: str) -> Locator:
        return self.page.locator(".provider").filter(has_text=name)

    @property
    def notifications(self) -> Locator:
        return self.page.locator(".notification")

    @property
    def newest(self) -> Locator:
        return self.notifications.first


@contextmanager
def opened(browser: Browser, url: str, **options: object) -> Iterator[Page]:
    """Open a page; fail if it broke its security policy or logged an error."""
    problems: list[str] = []
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    try:
        page = context.new_page()
        page.on("console", lambda line: problems.append(f"{line.type}: {line.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        yield page
        assert problems == []
    finally:
        context.close()


def follow(log: Path, sandbox: Sandbox, stopping: threading.Event) -> None:
    """Pass each line of a growing log on, until asked to stop."""
    line = ""
    with log.open() as growing:
        while not stopping.is_set():
            line += growing.readline()
            if line.endswith("\n"):
                sandbox.heard(json.loads(line))
                line = ""
            else:
                stopping.wait(0.02)


@pytest.fixture
def stage(
    browser: Browser,
    add_provider: Callable[..., int],
    start_service: Callable[..., Service],
) -> Iterator[Stage]:
    mocks = [(name, free_port()) for name in MOCKS]
    for priority, (name, port) in enumerate(mocks):
        channel = "Email" if name.startswith("email") else "PushNotification"
        url = f"http://127.0.0.1:{port}/"
        add_provider(url, channel, priority=priority, name=name, secret_key="3fa9c2d1")
    service = start_service(CIRCUIT_BREAKER_MIN_REQUESTS_BEFORE_TRIP="3")
    stopping = threading.Event()
    with Sandbox(mocks, service.url) as sandbox:
        follower = threading.Thread(target=follow, args=(service.log, sandbox, stopping))
        follower.start()
        try:
            with opened(browser, sandbox.url, reduced_motion="reduce") as page:
                yield Stage(page, sandbox, service)
        finally:
            stopping.set()
            follower.join()


def test_the_page_shows_a_delivery_a_fallback_and_an_open_breaker(stage):
    page = stage.page
    expect(page.get_by_text("Nothing has been sent yet.")).to_be_visible()
    expect(stage.provider("email 1")).to_contain_text("breaker closed")

    stage.send()
    expect(stage.newest).to_contain_text("On its way")
    expect(stage.newest).to_contain_text("delivered 200")
    expect(stage.newest.locator(".ways")).to_have_text("Email: email 1: accepted")
    expect(page.get_by_text("Nothing has been sent yet.")).to_be_hidden()

    stage.switch("email 1", "503")
    stage.send()
    fallback = "Email: email 1: 503 → email 2: accepted"
    expect(stage.newest.locator(".ways")).to_have_text(fallback)

    stage.send()
    expect(stage.provider("email 1")).to_contain_text("breaker open")
    expect(stage.provider("email 1")).to_contain_text("1 of 3 accepted")
    expect(stage.provider("email 2")).to_contain_text("breaker closed")

    stage.send()
    skipped = "Email: email 1: skipped, breaker open → email 2: accepted"
    expect(stage.newest.locator(".ways")).to_have_text(skipped)

    page.get_by_role("button", name="Clear").click()
    expect(stage.notifications).to_have_count(0)
    expect(page.get_by_text("Nothing has been sent yet.")).to_be_visible()
    expect(stage.provider("email 2")).to_contain_text("no messages")


def test_a_notification_tells_all_that_its_providers_received(stage):
    stage.switch("email 1", "drop")
    page = stage.page
    page.get_by_label("Title").fill("<b>bold</b>")
    stage.send()
    stage.newest.get_by_text("What the providers received").click()
    for text in ("buyer@example.com", "Your order is on its way.", "secret key 3f***"):
        expect(stage.newest.get_by_text(text).first).to_be_visible()
    expect(stage.newest.get_by_role("heading")).to_have_text("<b>bold</b>")
    received = stage.newest.locator(".received li")
    expect(received.first).to_contain_text("no answer: connection dropped")
    expect(received.last).to_contain_text("200 OK")
    expect(stage.newest).to_contain_text("email 1: connection lost → email 2: accepted")


def test_a_refused_notification_shows_the_answer_and_the_reason(stage):
    stage.page.get_by_label("Title").fill("")
    stage.send()
    expect(stage.page.locator("#answer")).to_contain_text("422")
    expect(stage.page.locator("#answer")).to_contain_text("E101")
    expect(stage.newest).to_contain_text("refused 422")
    expect(stage.newest).to_contain_text("title: ")


def test_the_keyboard_alone_switches_and_sends(stage):
    page, keyboard = stage.page, stage.page.keyboard
    expect(page.locator(".provider")).to_have_count(4)
    keyboard.press("Tab")
    with page.expect_response(SWITCH):
        keyboard.press("ArrowRight")
    for _ in MOCKS[1:]:
        keyboard.press("Tab")
    expect(
        page.get_by_role("radiogroup", name="push 2 answers").get_by_label("accept")
    ).to_be_focused()
    keyboard.press("Tab")
    expect(page.get_by_role("radio", name="buyer")).to_be_focused()
    keyboard.press("ArrowRight")
    for _ in ("Address and text", "To", "Title"):
        keyboard.press("Tab")
    expect(page.get_by_label("Title")).to_be_focused()
    keyboard.press("ControlOrMeta+A")
    keyboard.type("Typed")
    keyboard.press("Enter")

    expect(stage.newest.get_by_role("heading")).to_have_text("Typed")
    ways = stage.newest.locator(".ways li")
    expect(ways).to_have_text(["Email: email 1: 503 → email 2: accepted", "Push: push 1: accepted"])
    expect(page.get_by_label("Title")).to_be_focused()
    keyboard.press("Tab")
    keyboard.press("Tab")
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    outline = "element => getComputedStyle(element).outlineStyle"
    assert page.get_by_role("button", name="Send").evaluate(outline) == "solid"


def test_an_update_keeps_focus_and_open_details(stage):
    stage.send()
    details = stage.newest.locator("summary")
    details.click()
    stage.service.notify("seller")
    expect(stage.notifications).to_have_count(2)
    expect(stage.newest).to_contain_text("Hello")
    expect(stage.newest).to_contain_text("seller")
    older = stage.notifications.last
    expect(older.locator("summary")).to_be_focused()
    expect(older.get_by_text("Your order is on its way.")).to_be_visible()


def fits(page: Page) -> bool:
    script = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    return bool(page.evaluate(script))


def shoot(page: Page, name: str) -> None:
    if folder := os.environ.get("SANDBOX_SHOTS"):
        page.screenshot(path=Path(folder, f"sandbox-{name}.png"))


def play(stage: Stage) -> None:
    """Send notifications until the breaker of email 1 is open."""
    notify = stage.service.notify
    texts = {"to": "ada@example.com", "message": "See your account for the details."}
    notify(json={**texts, "title": "Order received"})
    notify("seller", json={**texts, "title": "Your bicycle is sold"})
    stage.switch("email 1", "503")
    for title in ("Parcel handed over", "Out for delivery", "Delivered"):
        notify(json={**texts, "title": title})
    notify("seller", json={**texts, "title": "You have been paid"})
    notify(json={**texts, "title": ""})
    notify(json={**texts, "title": "How was it?"})
    expect(stage.newest.get_by_role("heading")).to_have_text("How was it?")
    expect(stage.newest).to_contain_text("delivered 200")
    expect(stage.provider("email 1")).to_contain_text("breaker open")


def test_the_page_fits_desktops_and_phones_in_light_and_dark(stage):
    play(stage)
    page = stage.page
    background = "getComputedStyle(document.body).backgroundColor"
    backgrounds = {}
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.set_viewport_size(DESKTOP)
        shoot(page, theme)
        backgrounds[theme] = page.evaluate(background)
        for size in (PHONE, NARROW):
            page.set_viewport_size(size)
            assert fits(page), size
        page.set_viewport_size(PHONE)
        shoot(page, f"phone-{theme}")
    assert backgrounds["light"] != backgrounds["dark"]
    box = stage.newest.bounding_box()
    assert box
    assert box["y"] + box["height"] <= PHONE["height"]


def line(provider: str, outcome: str) -> dict[str, object]:
    """Return the `request` line of a notification with one provider."""
    tried = {"provider": provider, "outcome": outcome, "reason": "open"}
    return {
        "timestamp": "2026-01-01T12:00:00.000Z",
        "level": "INFO",
        "message": "request",
        "request_id": f"{provider} {outcome}",
        "route": "/api/v1.0/recipient/<recipient>/notify",
        "status": 200,
        "duration_ms": 10.0,
        "recipient": "buyer",
        "to": "b***@example.com",
        "channels": [{"channel": "Email", "outcome": "delivered", "providers": [tried]}],
    }


@pytest.mark.parametrize(
    ("outcome", "title"),
    [
        ("accepted", "Title unknown: none of the sandbox\u2019s providers received it"),
        ("skipped", "No provider received it: title unknown"),
    ],
)
def test_an_unknown_title_says_why(browser, outcome, title):
    with Sandbox([("email 1", 0)], NOWHERE) as sandbox, opened(browser, sandbox.url) as page:
        sandbox.heard(line("Acme Mail", outcome))
        expect(page.locator(".notification h3")).to_have_text(title)


def test_large_text_stays_in_its_place(browser):
    """Every switch shows its text in its track, and a title keeps room beside the result."""
    inside = """element => [...element.querySelectorAll("label")].every(label => {
        const text = document.createRange();
        text.selectNodeContents(label.querySelector("span"));
        const [box, own, track] = [text, label, element].map(each => each.getBoundingClientRect());
        return box.left >= own.left && box.right <= own.right && own.right <= track.right
            && track.right <= innerWidth;
    })"""
    mocks = [("email 1", 0), ("push 1", 0)]
    with Sandbox(mocks, NOWHERE) as sandbox, opened(browser, sandbox.url, viewport=PHONE) as page:
        sandbox.heard(line("Acme Mail", "accepted"))
        expect(page.locator(".notification")).to_be_visible()
        page.evaluate("document.documentElement.style.fontSize = '200%'")
        assert fits(page)
        for switch in page.locator(".switch").all():
            assert switch.evaluate(inside)
        title = page.locator(".notification h3").bounding_box()
        assert title
        assert title["width"] > PHONE["width"] / 2


def test_forced_colours_show_the_chosen_switch(browser):
    """The browser replaces a background unless `forced-color-adjust` is none."""
    colours = """element => {
        const { forcedColorAdjust, backgroundColor } = getComputedStyle(element);
        return [forcedColorAdjust, backgroundColor];
    }"""
    with Sandbox([("email 1", 0)], NOWHERE) as sandbox, opened(browser, sandbox.url) as page:
        page.emulate_media(forced_colors="active")
        switches = page.locator(".provider .switch span")
        expect(switches).to_have_count(len(ANSWERS))
        chosen, *others = [switch.evaluate(colours) for switch in switches.all()]
        assert chosen[0] == "none"
        assert chosen[1] not in {background for _, background in others}


def test_a_refused_change_is_told_for_some_seconds(browser):
    with Sandbox([("email 1", 0)], NOWHERE) as sandbox, opened(browser, sandbox.url) as page:
        page.clock.install()
        page.get_by_role("radio", name="slow").check()
        delay = page.get_by_label("Seconds until email 1 accepts")
        delay.fill("99")
        delay.press("Tab")
        notice = page.locator("#notice")
        expect(notice).to_have_text("This could not be changed: expected 0 to 60 seconds")
        page.clock.run_for(3000)
        expect(notice).not_to_be_empty()
        page.clock.run_for(7000)
        expect(notice).to_be_empty()


def test_without_a_service_the_page_says_so(browser):
    with (
        Sandbox([("email 1", 0), ("email 2", 0)], NOWHERE) as sandbox,
        opened(browser, sandbox.url) as page,
    ):
        expect(page.get_by_text(f"No answer from the service at {NOWHERE}")).to_be_visible()
        expect(page.get_by_text("breaker unknown")).to_have_count(2)


def test_a_hidden_page_asks_for_nothing(browser):
    hide = "Object.defineProperty(document, 'hidden', {get: () => window.isHidden})"
    asked: list[str] = []
    with Sandbox([("email 1", 0)], NOWHERE) as sandbox, opened(browser, sandbox.url) as page:
        expect(page.get_by_text("breaker unknown")).to_be_visible()
        page.evaluate(hide)
        page.on("request", lambda request: asked.append(request.url))
        page.clock.install()
        with page.expect_request("**/state"):
            page.clock.run_for(2000)
        page.evaluate("window.isHidden = true")
        asked.clear()
        page.clock.run_for(10_000)
        assert asked == []
