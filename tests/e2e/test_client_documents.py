"""Python code in the documents about clients runs against a real suite, as it stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from klein_client import Client
from klein_services.cli.main import main
from klein_services.cli.suite import Suite, SuiteOptions
from tests.e2e.running_suite import READY_SECONDS

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "127.0.0.1:50050"
GATEWAY_URL = "http://127.0.0.1:8080"
STAGE_ADDRESSES = {"127.0.0.1:50051": "text-encoder", "127.0.0.1:50053": "vae-decoder"}
BLOCK = re.compile(r"^```python( no-run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(code, id=f"{name}-{number}")
    for name in ("README.md", "docs/clients.md")
    for number, (skipped, code) in enumerate(BLOCK.findall((ROOT / name).read_text(encoding="utf-8")), 1)
    if not skipped
]
BATCH = re.compile(
    r"^\$ cat pictures\.jsonl\n(.*?)^\$ klein (batch .*?)\n(.*?)\n```$", re.MULTILINE | re.DOTALL
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    logs = tmp_path_factory.mktemp("logs")
    options = SuiteOptions(device="cpu", threads=1, log_folder=logs, has_gateway=True, gateway_port=0)
    with Suite(options) as running:
        running.wait_until_ready(timeout_seconds=READY_SECONDS)
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snippets")


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) > 7
    assert SNIPPETS[0].values[0].count("\n") == 3, "README shows the client in three lines"


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs(
    suite: Suite,
    folder: Path,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert any(address in code for address in (ADDRESS, GATEWAY_URL, *STAGE_ADDRESSES))
    code = code.replace(GATEWAY_URL, suite.gateway_url)
    for address, stage in STAGE_ADDRESSES.items():
        code = code.replace(address, f"127.0.0.1:{suite.ports[stage]}")
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    exec(compile(code.replace(ADDRESS, suite.target), "snippet", "exec"), {"__name__": "__main__"})
    written = [path for path in folder.iterdir() if before.get(path) != path.stat().st_mtime_ns]
    # Each one shows something for it.
    assert capsys.readouterr().out or written


def test_the_batch_of_the_document_is_made(
    suite: Suite, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines, command, answer = BATCH.search((ROOT / "docs" / "clients.md").read_text(encoding="utf-8")).groups()
    monkeypatch.chdir(folder)
    Client(suite.target).generate("a large red heart on a yellow background").save("heart.png")
    Path("pictures.jsonl").write_text(lines, encoding="utf-8")
    assert main([*command.split(), "--target", suite.target]) == 0
    assert capfd.readouterr().err.strip().endswith(answer)
    assert Path("pictures/stars-2.jpg").is_file()
