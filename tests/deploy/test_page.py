"""The page in a real Chromium before real processes with pico."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from klein_services.cli.suite import Suite
from klein_services.orchestrator.tokens import Tenant, new_token, tenant_table
from tests.deploy.browser import Visit, chromium, kill_and_restart, suite_with_page, visit

DONE = re.compile("^Done in")
NOTHING_YET = re.compile("^$")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Suite]:
    with suite_with_page(tmp_path_factory.mktemp("suite")) as found:
        yield found


@pytest.fixture
def visited(browser: Browser, suite: Suite) -> Iterator[Visit]:
    with visit(browser, suite.gateway_url) as found:
        yield found.open()
        assert found.messages == []
        assert found.strangers == []


def drop(visited: Visit, *files: tuple[str, str, bytes]) -> None:
    """Drops files on the page."""
    shown = [[name, kind, base64.b64encode(data).decode()] for name, kind, data in files]
    visited.page.eval_on_selector(
        "#drop",
        """(target, files) => {
            const dataTransfer = new DataTransfer();
            for (const [name, type, data] of files) {
                const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
                dataTransfer.items.add(new File([bytes], name, { type }));
            }
            for (const type of ["dragover", "drop"]) {
                target.dispatchEvent(new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer }));
            }
        }""",
        shown,
    )


def plain(color: str, size: tuple[int, int] = (128, 128)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def is_near(color: tuple[int, int, int], expected: tuple[int, int, int]) -> bool:
    return all(abs(one - other) < 70 for one, other in zip(color, expected, strict=True))


def test_a_picture_is_made_kept_and_made_again(visited: Visit):
    page = visited.page
    visited.generate("a large red heart on a yellow background")
    expect(page.locator("#status")).to_have_text(DONE)
    assert is_near(visited.pixel(0.5, 0.5), (220, 30, 40))
    assert is_near(visited.pixel(0.05, 0.05), (255, 225, 50))
    with page.expect_download() as download:
        page.click("#download")
    first = Path(download.value.path()).read_bytes()
    assert Image.open(BytesIO(first)).size == (128, 128)
    assert re.fullmatch(
        r"a-large-red-heart-on-a-yellow-background-\d+\.png", download.value.suggested_filename
    )
    visited.generate("a blue ring")
    page.reload()
    expect(page.locator("#history li")).to_have_count(2)
    page.locator("#history button").nth(1).click()
    page.click("#use-settings")
    expect(page.locator("#prompt")).to_have_value("a large red heart on a yellow background")
    page.click("#generate")
    expect(page.locator("#history li")).to_have_count(3)
    with page.expect_download() as download:
        page.click("#download")
    assert Path(download.value.path()).read_bytes() == first


def test_a_dropped_reference_is_edited_and_compared(visited: Visit):
    page = visited.page
    visited.generate("a large red circle on a white background")
    page.click("#as-reference")
    expect(page.locator("#inputs li")).to_have_count(1)
    page.get_by_role("button", name="Remove Reference 1").click()
    expect(page.locator("#inputs li")).to_have_count(0)
    with page.expect_download() as download:
        page.click("#download")
    drop(visited, ("circle.png", "image/png", Path(download.value.path()).read_bytes()))
    expect(page.get_by_role("img", name="Reference 1")).to_be_visible()
    visited.generate("make the circle blue")
    assert is_near(visited.pixel(0.5, 0.5), (30, 80, 220))
    page.select_option("#compare", label="Reference 1")
    expect(page.locator("#compared")).to_be_visible()
    assert is_near(visited.pixel(0.5, 0.5, "#compared"), (220, 30, 40))
    page.locator("#divider").focus()
    page.keyboard.press("Home")
    expect(page.locator("#divider")).to_have_value("0")


def test_files_that_cannot_be_references_are_refused_by_name(visited: Visit):
    drop(visited, ("notes.txt", "text/plain", b"no picture"))
    expect(visited.page.locator("#references-error")).to_contain_text("notes.txt is no PNG")
    drop(visited, *((f"{number}.png", "image/png", plain("red")) for number in range(6)))
    expect(visited.page.locator("#inputs li")).to_have_count(4)
    expect(visited.page.locator("#references-error")).to_contain_text("at most 4 references")


def test_a_file_that_is_no_picture_is_an_error_at_its_field(visited: Visit):
    page = visited.page
    drop(visited, ("broken.png", "image/png", b"\x89PNG\r\n\x1a\n broken"))
    page.fill("#prompt", "make it red")
    page.click("#generate")
    expect(page.locator("#problem")).to_contain_text("Reference 1")
    expect(page.locator("#references-error")).not_to_be_empty()


def test_a_painted_mask_changes_only_what_is_painted(visited: Visit):
    page = visited.page
    drop(visited, ("white.png", "image/png", plain("white")))
    page.get_by_role("button", name="Paint a mask on Reference 1").click()
    page.click("#mask-use")
    expect(page.locator("#mask-status")).to_contain_text("Nothing is marked")
    canvas = page.locator("#mask-canvas").bounding_box()
    assert canvas
    for share in (0.7, 0.8, 0.9):
        page.mouse.move(canvas["x"] + canvas["width"] * share, canvas["y"] + canvas["height"] * 0.1)
        page.mouse.down()
        page.mouse.move(canvas["x"] + canvas["width"] * share, canvas["y"] + canvas["height"] * 0.9, steps=4)
        page.mouse.up()
    page.click("#mask-undo")
    page.click("#mask-use")
    mask = page.get_by_role("img", name="Its mask")
    expect(mask).to_be_visible()
    assert visited.pixel(0.75, 0.5, ".mask-overlay") == (255, 255, 255)
    assert visited.pixel(0.98, 0.5, ".mask-overlay") == (0, 0, 0)
    assert visited.pixel(0.2, 0.5, ".mask-overlay") == (0, 0, 0)
    expect(page.locator("#width_px")).to_be_disabled()
    visited.generate("a large blue square on a red background")
    assert visited.pixel(0.2, 0.5) == (255, 255, 255)
    assert visited.pixel(0.75, 0.5) != (255, 255, 255)
    expect(page.locator("#warnings")).to_be_empty()


def test_a_mask_by_numbers_needs_no_pointer(visited: Visit):
    page = visited.page
    drop(visited, ("white.png", "image/png", plain("white")))
    page.get_by_role("button", name="Paint a mask on Reference 1").focus()
    page.keyboard.press("Enter")
    page.get_by_label("Left").fill("500")
    page.locator("#mask-rectangle").press("Enter")
    expect(page.locator("#mask-status")).to_contain_text("outside the picture, which has 128 × 128 pixels")
    page.get_by_label("Left").fill("0")
    page.locator("#mask-rectangle").press("Enter")
    page.locator("#mask-invert").press("Enter")
    page.locator("#mask-use").press("Enter")
    expect(page.get_by_role("img", name="Its mask")).to_be_visible()
    assert visited.pixel(0.25, 0.5, ".mask-overlay") == (0, 0, 0)
    assert visited.pixel(0.75, 0.5, ".mask-overlay") == (255, 255, 255)


def test_cancel_ends_the_request_in_the_suite_too(visited: Visit):
    page = visited.page
    visited.generate("a green star")
    page.fill("#prompt", "a red star")
    page.locator("#more summary").click()
    page.fill("#step_count", "1000")
    page.click("#generate")
    expect(page.locator("#status")).to_have_text(re.compile("^Step "))
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#history li")).to_have_count(1)
    assert is_near(visited.pixel(0.5, 0.5), (40, 160, 70))
    page.click("#tab-suite")
    expect(page.locator("#timeline li").first).to_contain_text("cancelled")


def test_previews_come_while_a_picture_is_made(visited: Visit):
    page = visited.page
    page.fill("#prompt", "a purple triangle")
    page.locator("#more summary").click()
    page.fill("#step_count", "60")
    page.click("#generate")
    expect(page.locator("#picture")).to_have_attribute("data-state", "preview")
    expect(page.locator("#picture")).to_have_attribute("alt", re.compile(r"^The picture after step \d+$"))
    expect(page.locator("#progress")).to_be_visible()
    expect(page.locator("#picture")).to_have_attribute("data-state", "finished")
    expect(page.locator("#progress")).to_be_hidden()


def test_bad_settings_are_named_where_they_are(visited: Visit):
    page = visited.page
    page.fill("#prompt", "a red ring")
    page.fill("#width_px", "70")
    page.fill("#image_count", "99")
    page.fill("#seed", "much")
    page.click("#generate")
    expect(page.locator("#seed-error")).to_contain_text("it must be a whole number from 0")
    expect(page.locator("#seed")).to_be_focused()
    page.fill("#seed", "7")
    page.click("#generate")
    expect(page.locator("#width_px-error")).to_contain_text("multiple of 16")
    expect(page.locator("#image_count-error")).to_contain_text("8")
    expect(page.locator("#seed-error")).to_be_empty()
    expect(page.locator("#problem")).to_contain_text("Correct the marked fields")
    expect(page.locator("#width_px")).to_have_attribute("aria-invalid", "true")
    page.fill("#width_px", "64")
    page.fill("#image_count", "2")
    page.click("#generate")
    expect(page.locator("#batch li")).to_have_count(2)
    expect(page.locator("#problem")).to_be_hidden()


def test_the_picture_follows_the_prompt_while_it_is_typed(visited: Visit):
    page = visited.page
    page.fill("#seed", "11")
    page.locator("#more summary").click()
    page.fill("#step_count", "40")
    page.get_by_role("switch", name="Follow my typing").check()
    page.locator("#prompt").press_sequentially("a large red heart", delay=60)
    expect(page.locator("#status")).to_have_text(DONE)
    expect(page.locator("#history li")).to_have_count(0)
    assert is_near(visited.pixel(0.5, 0.5), (220, 30, 40))
    page.locator("#prompt").press_sequentially(" on a green background", delay=400)
    expect(page.locator("#status")).to_have_text(DONE)
    expect(page.locator("#seed")).to_have_value("11")
    page.click("#keep")
    expect(page.locator("#history li")).to_have_count(1)
    page.click("#tab-suite")
    expect(page.locator('#timeline li[data-outcome="cancelled"]').first).to_be_visible()
    expect(page.locator('#timeline li[data-outcome="succeeded"]').first).to_be_visible()


def test_words_of_the_model_are_put_into_the_prompt(visited: Visit):
    page = visited.page
    for word in ("large", "red", "heart"):
        page.get_by_role("button", name=word, exact=True).click()
    expect(page.locator("#prompt")).to_have_value("large red heart")
    visited.generate("a house")
    expect(page.locator("#warnings")).not_to_be_empty()


def test_everything_works_with_the_keyboard_alone(visited: Visit):
    page = visited.page
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.locator("#prompt").focus()
    page.keyboard.type("a yellow star on a black background")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#history li")).to_have_count(1)
    page.locator("#tab-create").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#view-suite")).to_be_visible()
    page.keyboard.press("Home")
    expect(page.locator("#tab-create")).to_be_focused()
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id"))
    wanted = {"prompt", "scrub", "add-files", "width_px", "height_px", "seed", "dice", "lock", "image_count"}
    assert (
        wanted | {"generate", "download", "as-reference", "show-code", "delete", "clear-history"} <= reached
    )


def test_code_makes_the_same_picture(visited: Visit, tmp_path: Path):
    page = visited.page
    visited.generate('it\'s a "blue" ring on $white `background`')
    with page.expect_download() as download:
        page.click("#download")
    expected = Path(download.value.path()).read_bytes()
    page.click("#show-code")
    for language in ("python", "curl"):
        page.click(f"#code-{language}")
        code = page.locator("#code").input_value()
        folder = tmp_path / language
        folder.mkdir()
        if language == "python":
            (folder / "code.py").write_text(code)
            command = [sys.executable, "code.py"]
        else:
            command = ["bash", "-euo", "pipefail", "-c", code]
        subprocess.run(command, cwd=folder, check=True, timeout=120)
        (made,) = folder.glob("*.png")
        assert made.name == download.value.suggested_filename
        assert Image.open(made).tobytes() == Image.open(BytesIO(expected)).tobytes()


def test_the_suite_is_shown_and_a_dead_stage_is_named(browser: Browser, suite: Suite, visited: Visit):
    page = visited.page
    visited.generate("a white square on a purple background")
    page.click("#tab-suite")
    cards = page.locator("#processes > li")
    expect(cards).to_have_count(4)
    for name in ("text-encoder", "denoiser", "vae-decoder", "orchestrator"):
        expect(cards.filter(has_text=name).locator(".state")).to_have_text("serving")
    expect(page.locator("#timeline li").first).to_contain_text("text-to-image")
    expect(page.locator("#timeline li").first.locator('[data-phase="denoise"]')).to_have_count(1)
    expect(page.locator("#caches tbody tr").filter(has_text="prompt embedding")).to_be_visible()
    suite.children["vae-decoder"].kill()
    try:
        expect(cards.filter(has_text="vae-decoder").locator(".state")).to_have_text("not reachable")
        expect(cards.filter(has_text="denoiser").locator(".state")).to_have_text("serving")
        expect(page.locator("#health-text")).to_contain_text("pico:")
    finally:
        kill_and_restart(suite, "vae-decoder")
    expect(cards.filter(has_text="vae-decoder").locator(".state")).to_have_text("serving")
    expect(page.locator("#health-text")).to_have_text("pico is ready")


@pytest.mark.parametrize("process", ["denoiser", "orchestrator", "gateway"])
def test_a_request_goes_on_after_its_process_was_killed(browser: Browser, suite: Suite, process: str):
    with visit(browser, suite.gateway_url) as visited:
        page = visited.open().page
        page.fill("#seed", "5")
        page.fill("#prompt", "a large orange triangle on a blue background")
        page.locator("#more summary").click()
        page.fill("#step_count", "200")
        page.click("#generate")
        expect(page.locator("#status")).to_have_text(re.compile("^Step "))
        kill_and_restart(suite, process, pause_seconds=1.0)
        expect(page.locator("#history li")).to_have_count(1)
        expect(page.locator("#status")).to_have_text(DONE)
        expect(page.locator("#problem")).to_be_hidden()
        expect(page.locator("#facts")).to_contain_text("seed 5")
        assert visited.messages == []
        assert visited.strangers == []


def test_every_control_has_a_name_and_every_picture_a_text(visited: Visit):
    page = visited.page
    visited.generate("a red circle")
    page.locator("#more summary").click()
    drop(visited, ("white.png", "image/png", plain("white")))
    for open_view in ("#tab-create", "#tab-suite"):
        page.click(open_view)
        snapshot = page.locator("body").aria_snapshot()
        unnamed = re.findall(
            r"- (?:button|textbox|combobox|spinbutton|checkbox|switch|slider|link|img)\s*$", snapshot, re.M
        )
        assert unnamed == []
    problems = page.evaluate(
        """() => {
            const found = [];
            const ids = [...document.querySelectorAll("[id]")].map(({ id }) => id);
            for (const id of new Set(ids)) if (ids.filter((each) => each === id).length > 1) found.push(`two #${id}`);
            for (const each of document.querySelectorAll("[aria-describedby], [aria-labelledby], [aria-controls]")) {
                for (const name of ["aria-describedby", "aria-labelledby", "aria-controls"]) {
                    for (const id of (each.getAttribute(name) ?? "").split(" ").filter(Boolean)) {
                        if (!document.getElementById(id)) found.push(`${each.id}: ${name} ${id}`);
                    }
                }
            }
            for (const image of document.images) if (!image.hasAttribute("alt")) found.push(`no alt: ${image.id}`);
            if (!document.documentElement.lang || !document.title) found.push("no language or title");
            return found;
        }"""
    )
    assert problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(browser: Browser, suite: Suite, scheme: str):
    with visit(browser, suite.gateway_url, color_scheme=scheme) as visited:
        visited.open()
        visited.generate("a red circle")
        faint = visited.page.evaluate(CONTRAST)
        assert faint == []
        visited.page.click("#tab-suite")
        expect(visited.page.locator("#processes > li")).to_have_count(4)
        assert visited.page.evaluate(CONTRAST) == []


def test_a_phone_shows_everything_without_scrolling_sideways(browser: Browser, suite: Suite):
    with visit(browser, suite.gateway_url, viewport={"width": 360, "height": 740}, has_touch=True) as visited:
        page = visited.open().page
        visited.generate("a red circle")
        for tab in ("create", "suite"):
            page.click(f"#tab-{tab}")
            assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        page.click("#tab-create")
        expect(page.locator("#generate")).to_be_in_viewport()


def test_a_suite_with_tokens_asks_for_one_and_keeps_it_in_the_tab(browser: Browser, tmp_path: Path):
    token = new_token()
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(tenant_table(Tenant(name="acme"), token))
    settings = {"KLEIN_TOKENS_FILE": str(tokens)}
    with (
        suite_with_page(tmp_path / "logs", settings=settings) as suite,
        visit(browser, suite.gateway_url) as visited,
    ):
        page = visited.page
        page.goto(suite.gateway_url)
        page.get_by_label("Token").fill("klein_wrong")
        page.get_by_role("button", name="Use token").click()
        expect(page.locator("#token-hint")).to_contain_text("does not take this token")
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Use token").click()
        expect(page.locator("#health .dot")).to_have_attribute("data-state", "serving")
        expect(page.locator("#token-form")).to_be_hidden()
        visited.generate("a red circle")
        kept = page.evaluate("() => [JSON.stringify(localStorage), document.cookie, sessionStorage.length]")
        assert kept == ["{}", "", 1]


CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const parts = (color) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    };
    const light = (color) => {
        const [red, green, blue] = color.map((each) => {
            const share = each / 255;
            return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const ground = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const color = parts(getComputedStyle(each).backgroundColor);
            if (color[3] > 250) return color;
        }
        return [255, 255, 255];
    };
    const faint = [];
    for (const element of document.querySelectorAll("body *")) {
        const hasText = [...element.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
        if (!hasText || !element.checkVisibility() || element.closest(".badge, option, :disabled")) continue;
        const shades = [light(parts(getComputedStyle(element).color)), light(ground(element))];
        const ratio = (Math.max(...shades) + 0.05) / (Math.min(...shades) + 0.05);
        if (ratio < 4.5) faint.push(`${element.tagName} ${element.textContent.trim()}: ${ratio.toFixed(2)}`);
    }
    return faint;
}"""
