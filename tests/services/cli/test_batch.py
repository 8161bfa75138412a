"""`klein batch` against a real gRPC server: results, resumption, bad lines, failures, Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_core.errors import InvalidInput, Violation
from klein_services.cli import batch_lines
from klein_services.cli.main import main
from klein_services.cli.process import inherited_environment
from klein_services.runtime.errors import ContentDenied, ModelNotAllowed, QueueFull, StageUnavailable
from tests.services.fakes.answering_orchestrator import Orchestrator, serving

Batch = Callable[..., tuple[int, str]]


class Suite(Orchestrator):
    """Fails prompts as the test wants, and counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, list[Exception]] = {}
        self.running = self.most_running = 0
        self.together = threading.Barrier(1)
        self._lock = threading.Lock()

    def StreamGenerateImage(self, request, context):
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            if waiting := self.errors.get(request.spec.prompt):
                self.error = waiting.pop(0)
            self.together.wait(30)
            yield from super().StreamGenerateImage(request, context)
        finally:
            self.error = None
            with self._lock:
                self.running -= 1

    @property
    def prompts(self) -> list[str]:
        return sorted(spec.prompt for spec in self.specs)


@pytest.fixture
def suite() -> Suite:
    return Suite()


@pytest.fixture
def target(suite: Suite) -> Iterator[str]:
    with serving(suite) as address:
        yield address


@pytest.fixture
def klein_batch(tmp_path: Path, target: str, capfd: pytest.CaptureFixture[str]) -> Batch:
    def run(*arguments: object, lines: list[object] | None = None) -> tuple[int, str]:
        if lines is not None:
            write(tmp_path / "batch.jsonl", lines)
        command = ["batch", tmp_path / "batch.jsonl", "-o", tmp_path / "out", "--target", target, *arguments]
        try:
            exit_code = main([str(argument) for argument in command])
        except SystemExit as end:
            exit_code = int(end.code or 0)
        printed = capfd.readouterr()
        assert printed.out == ""
        return exit_code, printed.err

    return run


def write(file: Path, lines: list[object]) -> None:
    file.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines) + "\n")


def results(folder: Path) -> dict[str, dict]:
    """Returns the last result of each id."""
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    return {result["id"]: result for result in map(json.loads, text.splitlines())}


def test_each_line_is_a_request_of_the_class_batch(klein_batch: Batch, suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "ref.png").write_bytes(b"one")
    line = {
        "id": "a.star",
        "prompt": "ein schöner Stern",
        "references": "ref.png",
        "mask": str(tmp_path / "ref.png"),
        "initial_image": "ref.png",
        "count": 2,
        "steps": 3,
        "expand": [1, 2, 3, 4],
        "adapters": {"ink": 0.5},
        "seed": 5,
    }
    assert klein_batch(lines=[line, "", {"prompt": "a heart"}])[0] == 0
    star, heart = sorted(suite.specs, key=lambda spec: -len(spec.prompt))
    assert star == api.ImageSpec(
        prompt="ein schöner Stern",
        references=[b"one"],
        mask=b"one",
        initial_image=b"one",
        image_count=2,
        step_count=3,
        expand=image_pb2.ImageExpansion(left_px=1, top_px=2, right_px=3, bottom_px=4),
        adapters=[image_pb2.Adapter(name="ink", scale=0.5)],
        seed=5,
        priority=image_pb2.PRIORITY_BATCH,
    )
    assert heart.priority == image_pb2.PRIORITY_BATCH
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.star-1.png",
        "a.star-2.png",
        "line-3.png",
        "results.jsonl",
    ]
    assert (tmp_path / "out" / "a.star-2.png").read_bytes() == b"picture 1"
    done = results(tmp_path / "out")["a.star"]
    assert (done["files"], done["seeds"], done["line"]) == (["a.star-1.png", "a.star-2.png"], [41, 42], 1)


def test_the_same_command_makes_only_what_is_missing(
    klein_batch: Batch, suite: Suite, tmp_path: Path
) -> None:
    suite.errors["bad"] = [InvalidInput([Violation("width_px", "is 70; no")])]
    suite.errors["denied"] = [ContentDenied("request", "WORD", "no")]
    lines = [{"id": name, "prompt": name} for name in ("one", "bad", "gone", "denied")]
    exit_code, text = klein_batch("-c", 1, lines=lines)
    assert exit_code == 1
    assert "line 2, bad: width is 70; no" in text
    assert "2 of 4 are made" in text
    assert results(tmp_path / "out")["bad"]["error"]["fields"] == ["width"]
    (tmp_path / "out" / "gone.png").unlink()
    seeds = {spec.prompt: spec.seed for spec in suite.specs}
    suite.specs.clear()
    assert klein_batch()[0] == 0
    assert suite.prompts == ["bad", "denied", "gone"]
    # A line keeps its seed, although it names none.
    assert {spec.prompt: spec.seed for spec in suite.specs}.items() <= seeds.items()
    suite.specs.clear()
    exit_code, text = klein_batch()
    assert (exit_code, suite.specs) == (0, [])
    assert "4 of 4 are made" in text


def test_bad_lines_are_all_named_before_anything_is_sent(
    klein_batch: Batch, suite: Suite, tmp_path: Path
) -> None:
    lines: list[object] = [
        {"prompt": "x"},
        {"prompt": "x", "widths": 64},
        '{"prompt": ',
        "[1]",
        {"prompt": "x", "seed": "abc"},
        {"prompt": "x", "references": ["/nowhere"]},
        {"prompt": "x", "references": [7]},
        {"id": "a", "prompt": "x", "count": 2},
        {"id": "a-2", "prompt": "x"},
        {"id": "../x", "prompt": "x"},
        {"id": "c"},
        {"prompt": "\ud800"},
        {"prompt": "x", "priority": "interactive"},
        {"prompt": "x", "token": "secret"},
        {"prompt": "x", "format": "gif"},
        {"prompt": "x", "mask": "a\0b"},
        "[" * 100_000,
    ]
    exit_code, text = klein_batch(lines=lines)
    assert exit_code == 2
    for words in (
        "15 lines cannot be used, nothing was sent",
        "line 2: widths is no key; did you mean width?",
        "line 3: is no JSON",
        "line 4: is no JSON object",
        "line 5: seed cannot be of type str",
        "line 6: references[0] /nowhere cannot be read",
        "line 7: references[0] must be a path",
        "line 9: id 'a-2' would give the file names of line 8",
        "line 10: id must have",
        "line 11: prompt is missing",
        "line 12: prompt is not valid UTF-8",
        "line 13: priority is no key",
        "line 14: token is no key",
        "line 15: format is 'gif'; it must be one of png",
        "line 16: mask is no path",
        "line 17: is no JSON",
    ):
        assert words in text
    assert suite.specs == []
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_batch_are_named(
    klein_batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "cannot be read: No such file" in klein_batch()[1]
    assert "has no requests" in klein_batch(lines=["", " "])[1]
    monkeypatch.setattr(batch_lines, "MOST_LINES", 2)
    assert "has more than 2 lines" in klein_batch(lines=[{"prompt": "x"}] * 3)[1]
    monkeypatch.setattr(batch_lines, "LONGEST_LINE_BYTES", 40)
    assert "line 2 has more than 40 bytes" in klein_batch(lines=[{"prompt": "x"}, {"prompt": "x" * 40}])[1]
    (tmp_path / "out").write_text("a file")
    exit_code, text = klein_batch(lines=[{"prompt": "x"}])
    assert exit_code == 2
    assert "out cannot be used" in text


def test_a_folder_with_other_results_is_not_overwritten(
    klein_batch: Batch, suite: Suite, tmp_path: Path
) -> None:
    assert klein_batch(lines=[{"id": "a", "prompt": "one"}])[0] == 0
    exit_code, text = klein_batch(lines=[{"id": "b", "prompt": "two"}, {"id": "a", "prompt": "other"}])
    assert exit_code == 2
    assert "line 2: the id 'a' has a result of another request" in text
    assert suite.prompts == ["one"]
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write("no result\n")
    assert "line 2 is no result of klein batch" in klein_batch()[1]


def test_a_result_that_was_cut_off_is_made_again(klein_batch: Batch, suite: Suite, tmp_path: Path) -> None:
    assert klein_batch(lines=[{"id": "a", "prompt": "one"}])[0] == 0
    file = tmp_path / "out" / "results.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    assert klein_batch()[0] == 0
    assert suite.prompts == ["one", "one"]
    assert list(results(tmp_path / "out")) == ["a"]


def test_a_second_batch_in_the_same_folder_is_refused(
    klein_batch: Batch, suite: Suite, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "results.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        exit_code, text = klein_batch(lines=[{"prompt": "x"}])
    assert exit_code == 2
    assert "Another klein batch works in" in text
    assert suite.specs == []


def test_so_many_requests_run_at_once_and_no_more(klein_batch: Batch, suite: Suite) -> None:
    suite.together = threading.Barrier(3)
    assert klein_batch("-c", 3, lines=[{"prompt": f"a star {index}"} for index in range(9)])[0] == 0
    assert suite.most_running == 3


def test_a_busy_suite_and_one_that_restarts_are_waited_for(klein_batch: Batch, suite: Suite) -> None:
    suite.errors["busy"] = [QueueFull(1, 0.05)] * 2
    # More than gRPC itself repeats.
    suite.errors["restarting"] = [StageUnavailable("the denoiser is loading")] * 5
    exit_code, text = klein_batch("-c", 1, lines=[{"prompt": "busy"}, {"prompt": "restarting"}])
    assert exit_code == 0, text
    assert suite.errors == {"busy": [], "restarting": []}


def test_a_token_without_access_ends_the_batch(klein_batch: Batch, suite: Suite) -> None:
    suite.errors["one"] = [ModelNotAllowed("m", ["pico"])]
    exit_code, text = klein_batch("-c", 1, lines=[{"prompt": "one"}, {"prompt": "two"}])
    assert exit_code == 1
    assert "Ask the server's operator" in text
    assert suite.prompts == ["one"]


def test_nothing_running_is_one_sentence(klein_batch: Batch) -> None:
    exit_code, text = klein_batch("--target", "127.0.0.1:1", lines=[{"prompt": "x"}])
    assert exit_code == 1
    assert text.startswith("Error: Nothing answers at 127.0.0.1:1.")


def test_control_c_keeps_what_is_made(klein_batch: Batch, suite: Suite, target: str, tmp_path: Path) -> None:
    lines = [{"id": "made", "prompt": "one"}, {"id": "cut", "prompt": "two"}]
    write(tmp_path / "batch.jsonl", lines)
    suite.before_answer = lambda: setattr(suite, "blocks", True)  # from the second request on
    command = [
        sys.executable,
        "-m",
        "klein_services.cli.main",
        "batch",
        "batch.jsonl",
        "-o",
        "out",
        "-c",
        "1",
    ]
    with subprocess.Popen(
        [*command, "--target", target],
        cwd=tmp_path,
        env=inherited_environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while len(suite.specs) < 2:
            assert suite.called.wait(60)
            suite.called.clear()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert suite.cancelled.wait(30)
    assert process.returncode == 130
    assert err.splitlines() == ["1 of 2 are made. The same command makes the others.", "Cancelled."]
    suite.blocks = False
    suite.before_answer = lambda: None
    assert klein_batch()[0] == 0
    assert suite.prompts == ["one", "two", "two"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cut.png",
        "made.png",
        "results.jsonl",
    ]
