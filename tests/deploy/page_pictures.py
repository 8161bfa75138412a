"""Makes the pictures of the page in docs/pictures: `python -m tests.deploy.page_pictures`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import expect

from tests.deploy.browser import Visit, chromium, suite_with_page, visit
from tests.deploy.tools import ROOT

FOLDER = ROOT / "docs" / "pictures"
MAXIMUM_BYTES = 300_000
PROMPTS = (
    "a small yellow star on a purple background",
    "a large blue ring on the left on a white background",
    "a green triangle on an orange background",
    "a large purple circle on a green background",
    "a black square on the right on a blue background",
    "a large red heart on a yellow background",
)


def make_pictures(visited: Visit) -> None:
    """Fills the history, then edits its last picture and divides both."""
    page = visited.page
    for number, prompt in enumerate(PROMPTS):
        page.fill("#seed", str(number + 1))
        visited.generate(prompt)
    page.click("#as-reference")
    visited.generate("make the background blue")
    page.select_option("#compare", label="Reference 1")
    page.mouse.move(0, 0)


def save(visited: Visit, file: Path) -> None:
    """Saves what the window shows; a file larger than `MAXIMUM_BYTES` is an error."""
    visited.page.evaluate("() => scrollTo(0, 0)")
    file.write_bytes(visited.page.screenshot())
    size = file.stat().st_size
    if size > MAXIMUM_BYTES:
        sys.exit(f"{file} has {size} bytes; at most {MAXIMUM_BYTES} are allowed.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.page_pictures", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the pictures are written")
    folder: Path = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as logs, chromium() as browser, suite_with_page(Path(logs)) as suite:
        for scheme in ("light", "dark"):
            window = {"color_scheme": scheme, "viewport": {"width": 1360, "height": 940}}
            with visit(browser, suite.gateway_url, **window) as visited:
                visited.open().page.click("#tab-suite")
                # Rates are of the time since the first reading.
                expect(visited.page.locator("#processes > li")).to_have_count(4)
                visited.page.click("#tab-create")
                make_pictures(visited)
                save(visited, folder / f"page-{scheme}.png")
                if scheme == "dark":
                    continue
                visited.page.click("#tab-suite")
                expect(visited.page.locator("#timeline li").first).to_be_visible()
                # Lines need some readings.
                time.sleep(6)
                save(visited, folder / "page-suite.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
