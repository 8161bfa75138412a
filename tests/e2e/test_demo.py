"""What `make demo` runs, with a tiny random checkpoint: only the images mean nothing."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from klein_services.cli.demo import IMAGES, SHEET, klein_command, right_half_mask, run_demo
from klein_services.cli.errors import CliError
from klein_services.cli.suite import SuiteOptions
from tests.tiny.checkpoint import save_tiny_checkpoint


def test_the_demo_makes_every_image_and_a_sheet(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "tiny")
    console = Console(record=True, width=120)
    options = SuiteOptions(
        model=str(tmp_path / "tiny"),
        device="cpu",
        threads=1,
        log_folder=tmp_path / "logs",
        settings={"KLEIN_DEFAULT_SIZE_PX": "64"},
    )
    run_demo(tmp_path / "out", console, options)

    for image in IMAGES:
        with Image.open(image.file_in(tmp_path / "out")) as file:
            assert file.size == (64, 64)
    with Image.open(tmp_path / "out" / SHEET) as sheet:
        assert sheet.width > 3 * 256
    text = console.export_text()
    for image in IMAGES:
        assert image.prompt in text
    assert "reference" in text
    assert SHEET in text


def test_a_demo_without_its_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"model_index\.json is missing"):
        run_demo(tmp_path / "out", Console(quiet=True), SuiteOptions(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("installed", "on_path", "expected"),
    [
        (True, True, "klein"),
        (True, False, ".venv/bin/klein"),
        (False, False, "{folder}/.venv/bin/python -m klein_services.cli.main"),
    ],
)
def test_the_demo_names_a_command_that_this_shell_finds(
    installed: bool, on_path: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    if installed:
        (programs / "klein").touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(programs if on_path else tmp_path))
    assert klein_command() == expected.format(folder=tmp_path)


def test_the_mask_of_the_demo_is_white_on_the_right() -> None:
    with Image.open(BytesIO(right_half_mask(128))) as file:
        mask = file.convert("L")
    expected = Image.new("L", (128, 128))
    expected.paste(255, (64, 0, 128, 128))
    assert mask.tobytes() == expected.tobytes()
