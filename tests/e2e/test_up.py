"""`klein up` with real processes and a tiny random checkpoint: life, death, and nothing left behind."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from klein_core.pipeline import Pipeline
from klein_services.cli.process import PROCESSES, inherited_environment
from tests.services.fakes.denoiser_server import one_thread
from tests.tiny.checkpoint import save_tiny_checkpoint
from tests.tiny.layouts import bare_text_encoder, bfl_transformer, bfl_vae, prefixed

READY_SECONDS = 150.0
STOP_SECONDS = 90.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_tiny_checkpoint(folder)
    return folder


class Up:
    """A running `klein up`."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output
        self.logs = output.with_suffix("")

    @property
    def text(self) -> str:
        return self._output.read_text()

    @property
    def target(self) -> str:
        """The public API's address; shown once all are ready."""
        shown = re.search(r"Ready after .* at (\S+)\.\n", self.text)
        assert shown, self.text
        return shown[1]

    def wait_for_stages(self) -> dict[str, psutil.Process]:
        """Waits until all were started; they may be far from ready."""
        assert soon(lambda: set(self._children()) == set(PROCESSES), READY_SECONDS)
        return self._children()

    def _children(self) -> dict[str, psutil.Process]:
        # Between its fork and its exec a child has its parent's command line; one that ended has none.
        return {(child.cmdline() or [""])[-1]: child for child in psutil.Process(self.process.pid).children()}

    def denoiser_other_than(self, pids: set[int]) -> psutil.Process | None:
        """The running denoiser, unless its process is one of `pids`."""
        try:
            found = self._children().get("denoiser")
        except psutil.Error:
            return None
        return found if found is not None and found.pid not in pids else None

    def wait_until_ready(self) -> dict[str, psutil.Process]:
        assert soon(
            lambda: "Ctrl-C stops every" in self.text or self.process.poll() is not None, READY_SECONDS
        )
        assert "Ready after" in self.text, self.text
        return self.wait_for_stages()


@contextmanager
def klein_up(checkpoint: Path | None, folder: Path, *options: str) -> Iterator[Up]:
    folder.mkdir(exist_ok=True)
    output = folder / "up.txt"
    command = [
        sys.executable,
        "-m",
        "klein_services.cli.main",
        "up",
        *(["--model", str(checkpoint)] if checkpoint else []),
        *options,
        "--port",
        "0",
    ]
    command += ["--threads", "1", "--log-folder", str(folder / "up"), "--device", "cpu"]
    environment = inherited_environment() | {"KLEIN_DEFAULT_SIZE_PX": "64"}
    with (
        output.open("w") as file,
        subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process,
    ):
        try:
            yield Up(process, output)
        finally:
            process.kill()


def klein(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "klein_services.cli.main", *arguments],
        env=inherited_environment(),
        capture_output=True,
        text=True,
        timeout=READY_SECONDS,
        check=False,
    )


def soon(condition: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def all_gone(stages: dict[str, psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in stages.values())


def test_up_serves_until_control_c(checkpoint: Path, tmp_path: Path) -> None:
    with klein_up(checkpoint, tmp_path) as up:
        stages = up.wait_until_ready()

        picture = tmp_path / "picture.png"
        made = klein("generate", "a star", "--seed", "5", "--target", up.target, "-o", str(picture))
        assert made.returncode == 0, made.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert "64×64, seed 5" in made.stdout

        edited = klein(
            *("generate", "make it blue", "-r", str(picture), "--count", "2", "--target", up.target),
            *("-o", str(tmp_path / "edit.webp")),
        )
        assert edited.returncode == 0, edited.stderr
        assert (tmp_path / "edit-2.webp").read_bytes().startswith(b"RIFF")

        refused = klein(
            "generate",
            "",
            "--size",
            "70x64",
            "--steps",
            "0",
            "--target",
            up.target,
            "--force",
            "-o",
            str(picture),
        )
        assert refused.returncode == 2
        assert "--size" in refused.stderr
        assert "--steps" in refused.stderr

        shown = klein("status", "--target", up.target)
        assert shown.returncode == 0, shown.stdout
        assert all(stage in shown.stdout for stage in ("text-encoder", "denoiser", "vae-decoder"))

        # As a terminal does it, to the whole foreground group.
        os.kill(up.process.pid, signal.SIGINT)
        assert up.process.wait(STOP_SECONDS) == 0, up.text
        assert all_gone(stages)
        assert "by force" not in up.text
        assert "Traceback" not in up.text + "".join(log.read_text() for log in up.logs.glob("*.log"))


def test_three_bare_files_make_the_folder_s_image(tmp_path: Path) -> None:
    """In other layouts and behind a prefix; with klein's prompt length, which no tensor shows."""
    folder = tmp_path / "whole"
    save_tiny_checkpoint(folder, text_encoder={"max_sequence_length": 512})
    weights = "diffusion_pytorch_model.safetensors"
    transformer = bfl_transformer(load_file(folder / "transformer" / weights))
    save_file(prefixed(transformer, "model.diffusion_model."), tmp_path / "t.safetensors")
    save_file(bfl_vae(load_file(folder / "vae" / weights)), tmp_path / "v.safetensors")
    language = load_file(folder / "text_encoder" / "model.safetensors")
    save_file(bare_text_encoder(language, lm_head=True), tmp_path / "q.safetensors")
    options = ["--transformer", str(tmp_path / "t.safetensors"), "--vae", str(tmp_path / "v.safetensors")]
    options += ["--text-encoder", str(tmp_path / "q.safetensors"), "--tokenizer", str(folder / "tokenizer")]
    with klein_up(None, tmp_path, *options, "--variant", "klein-4b") as up:
        up.wait_until_ready()
        picture = tmp_path / "picture.png"
        made = klein("generate", "a star", "--seed", "5", "--target", up.target, "-o", str(picture))
        assert made.returncode == 0, made.stderr
    with Image.open(picture) as image:
        pixels = np.array(image)
    with one_thread():
        [expected] = Pipeline.from_folder(folder).generate("a star", width_px=64, height_px=64, seeds=[5])
    assert np.array_equal(pixels, expected.numpy())


def test_a_stage_that_dies_is_started_again_on_its_port_until_the_third_death(
    checkpoint: Path, tmp_path: Path
) -> None:
    with klein_up(checkpoint, tmp_path) as up:
        stages = up.wait_until_ready()
        first = tmp_path / "first.png"
        assert (
            klein("generate", "a star", "--seed", "5", "--target", up.target, "-o", str(first)).returncode
            == 0
        )

        stages["denoiser"].kill()
        assert soon(lambda: "The denoiser serves again." in up.text, READY_SECONDS), up.text
        assert "The denoiser ended by signal SIGKILL; it starts again in 1 s." in up.text
        again = tmp_path / "again.png"
        made = klein("generate", "a star", "--seed", "5", "--target", up.target, "-o", str(again))
        assert made.returncode == 0, made.stderr
        assert again.read_bytes() == first.read_bytes()
        assert "listening" in (up.logs / "denoiser.log").read_text()

        # Before it serves, so that the deaths are in a row however long a start takes.
        killed = {stages["denoiser"].pid}
        while up.process.poll() is None:
            assert soon(
                lambda: up.denoiser_other_than(killed) or up.process.poll() is not None, READY_SECONDS
            )
            denoiser = up.denoiser_other_than(killed)
            if denoiser is not None:
                killed.add(denoiser.pid)
                denoiser.kill()
        assert up.process.wait(STOP_SECONDS) == 1, up.text
        assert len(killed) in (3, 4)
        assert all_gone(stages)
        assert "times in a row, at last by signal SIGKILL" in up.text
        assert str(up.logs / "denoiser.log") in " ".join(up.text.split())
        assert "Traceback" not in up.text


def test_two_suites_that_start_at_once_share_no_port(checkpoint: Path, tmp_path: Path) -> None:
    with klein_up(checkpoint, tmp_path / "one") as one, klein_up(checkpoint, tmp_path / "two") as two:
        for up in (one, two):
            up.wait_until_ready()
        assert one.target != two.target
        for up in (one, two):
            assert klein("status", "--target", up.target).returncode == 0


def test_no_stage_outlives_a_parent_that_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    with klein_up(checkpoint, tmp_path) as up:
        # Not ready yet: a stage that still imports must go, too.
        stages = up.wait_for_stages()
        up.process.kill()
        assert soon(lambda: all_gone(stages), STOP_SECONDS)


def test_a_broken_checkpoint_ends_the_suite_with_the_stage_s_words(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"bn.running_mean": tensors["bn.running_mean"][:-1].clone()}, weights)
    with klein_up(broken, tmp_path) as up:
        stages = up.wait_for_stages()
        assert up.process.wait(READY_SECONDS) == 1
        assert "The vae-decoder ended with exit code 1" in up.text
        assert "bn.running_mean (15,) instead of (16,)" in " ".join(up.text.split())
        assert all_gone(stages)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere"], ["nowhere", "klein pull"]),
        (["--vae", "nowhere.safetensors"], ["nowhere.safetensors", "--vae"]),
        (["--port", "PORT"], ["taken", "--port 0"]),
        (["--port", "99999"], ["65535"]),
        (["--device", "gpu"], ["--device is 'gpu'", "cuda:N"]),
        (["--dtype", "f8"], ["--dtype", "bf16"]),
        (["--threads", "5000"], ["--threads is '5000'", "1024"]),
    ],
)
def test_up_refuses_what_cannot_work_before_it_starts(arguments: list[str], words: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = klein("up", *(argument.replace("PORT", port) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert "KLEIN_" not in done.stderr


def test_parts_that_do_not_fit_each_other_are_refused_before_anything_starts(
    checkpoint: Path, tmp_path: Path
) -> None:
    save_tiny_checkpoint(tmp_path / "vae", vae={"latent_channels": 8})
    save_tiny_checkpoint(tmp_path / "text", text_encoder={"hidden_size": 48})
    for flag, part, words in (
        ("--vae", tmp_path / "vae/vae", "takes 16 latent channels but the VAE"),
        ("--text-encoder", tmp_path / "text/text_encoder", "text encoder"),
    ):
        done = klein("up", "--model", str(checkpoint), flag, str(part), "--port", "0")
        assert done.returncode == 1, done.stderr
        assert words in " ".join(done.stderr.split()), done.stderr
        assert "Traceback" not in done.stderr
