"""A real Chromium before a real suite with pico, and the mistakes of a page that every test looks for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, expect, sync_playwright

from klein_services.cli.suite import Suite, SuiteOptions
from tests.deploy.tools import tool

READY_SECONDS = 180.0
PATIENCE_MS = 60_000
"""Other tests may keep every core busy."""


@dataclass
class Visit:
    """A page that is open, and what went wrong in it."""

    page: Page
    url: str
    messages: list[str] = field(default_factory=list)
    """Errors and warnings of the console, violations of the content security policy among them."""
    strangers: list[str] = field(default_factory=list)
    """Requests to other hosts."""

    def open(self) -> Visit:
        """Opens the page and waits until it has the model."""
        self.page.goto(self.url)
        expect(self.page.locator("#health .dot")).to_have_attribute("data-state", "serving")
        return self

    def generate(self, prompt: str) -> None:
        """Makes a picture with the button, and waits for it."""
        page = self.page
        before = page.locator("#history li").count()
        page.fill("#prompt", prompt)
        page.click("#generate")
        expect(page.locator("#history li")).to_have_count(before + 1)
        expect(page.locator("#picture")).to_have_attribute("data-state", "finished")

    def pixel(self, x: float, y: float, selector: str = "#picture") -> tuple[int, int, int]:
        """Returns the color of a picture at a place, given as shares of its width and height."""
        red, green, blue = self.page.eval_on_selector(
            selector,
            """(picture, [x, y]) => {
                const canvas = new OffscreenCanvas(picture.naturalWidth, picture.naturalHeight);
                const context = canvas.getContext("2d");
                context.drawImage(picture, 0, 0);
                const place = [x * picture.naturalWidth, y * picture.naturalHeight].map(Math.floor);
                return [...context.getImageData(...place, 1, 1).data].slice(0, 3);
            }""",
            [x, y],
        )
        return red, green, blue


def _note_message(visit: Visit, message: ConsoleMessage) -> None:
    # Refusals and lost connections, which tests cause, are reported by the browser itself.
    if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
        visit.messages.append(message.text)


def _note_response(visit: Visit, response: Response) -> None:
    if response.status >= 400 and "/page/api/" not in response.url:
        visit.messages.append(f"{response.url}: {response.status}")


def _note_request(visit: Visit, request: Request) -> None:
    address = urlsplit(request.url)
    if address.scheme not in ("blob", "data") and address.netloc != urlsplit(visit.url).netloc:
        visit.strangers.append(request.url)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Runs Debian's Chromium; skips where there is none."""
    with sync_playwright() as playwright:
        # Chromium's own sandbox needs privileges that containers lack; it shows nothing but the page under test.
        browser = playwright.chromium.launch(
            executable_path=tool("chromium-headless-shell"), args=["--no-sandbox"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(browser: Browser, url: str, **context: object) -> Iterator[Visit]:
    """Opens a window without history or storage."""
    window = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | context))  # type: ignore[arg-type]
    try:
        page = window.new_page()
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        found = Visit(page, url)
        page.on("console", lambda message: _note_message(found, message))
        page.on("pageerror", lambda error: found.messages.append(str(error)))
        page.on("response", lambda response: _note_response(found, response))
        page.on("request", lambda request: _note_request(found, request))
        yield found
    finally:
        window.close()


@contextmanager
def suite_with_page(folder: Path, **options: object) -> Iterator[Suite]:
    """Runs the processes of `klein up` with pico, the gateway among them, on free ports."""
    given = SuiteOptions(  # type: ignore[arg-type]
        **(
            {"device": "cpu", "threads": 1, "log_folder": folder, "has_gateway": True, "gateway_port": 0}
            | options
        )
    )
    with Suite(given) as suite:
        suite.wait_until_ready(timeout_seconds=READY_SECONDS)
        yield suite


def kill_and_restart(suite: Suite, process: str, pause_seconds: float = 0.0) -> None:
    """Kills a process like the kernel would, and starts it again after a while, as `klein up` does."""
    suite.children[process].kill()
    assert suite.children[process].wait(READY_SECONDS)
    time.sleep(pause_seconds)
    suite.restart(process)
