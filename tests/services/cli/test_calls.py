"""`klein generate` and `klein status` against a real gRPC server with a servicer that only answers."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from klein_api.v1 import image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_api.v1 import stage_service_pb2 as stage_api
from klein_core.errors import InvalidInput, Violation
from klein_core.params import DEFAULT_LIMITS, Expansion, inpainting_violations, size_violations
from klein_services.cli.main import main
from klein_services.cli.ports import ReservedPort
from klein_services.cli.process import inherited_environment
from klein_services.runtime.errors import (
    ContentDenied,
    ContentPolicyFailed,
    ModelNotAllowed,
    QueueFull,
    StageUnavailable,
    UnknownAdapter,
    UnknownModel,
    UnusableAdapter,
)
from tests.services.fakes.answering_orchestrator import Orchestrator, serving

Result = tuple[int, str, str]
Klein = Callable[..., Result]


@pytest.fixture
def orchestrator() -> Orchestrator:
    return Orchestrator()


@pytest.fixture
def target(orchestrator: Orchestrator) -> Iterator[str]:
    with serving(orchestrator) as address:
        yield address


@pytest.fixture
def klein(capfd: pytest.CaptureFixture[str]) -> Klein:
    def run(*arguments: object) -> Result:
        try:
            exit_code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            exit_code = int(end.code or 0)
        printed = capfd.readouterr()
        return exit_code, printed.out, printed.err

    return run


def test_every_flag_reaches_the_request(
    klein: Klein, target: str, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    flags = f"""--reference {first} --reference {second} --size 64x96 --steps 7 --guidance 2.5 --seed 41 --count 2
        --format webp --quality 80 --model fake --adapter ink -a oil.v2:-0.5 --target {target}
        -o {tmp_path / "star.webp"}"""
    exit_code, _, err = klein("generate", "a star", "--negative-prompt", "a heart", *flags.split())
    assert (exit_code, err) == (0, "")
    assert orchestrator.specs == [
        api.ImageSpec(
            model="fake",
            prompt="a star",
            negative_prompt="a heart",
            references=[b"one", b"two"],
            width_px=64,
            height_px=96,
            step_count=7,
            guidance_scale=2.5,
            seed=41,
            image_count=2,
            format=image_pb2.IMAGE_FORMAT_WEBP,
            quality=80,
            priority=image_pb2.PRIORITY_INTERACTIVE,
            adapters=[image_pb2.Adapter(name="ink"), image_pb2.Adapter(name="oil.v2", scale=-0.5)],
        )
    ]
    assert (tmp_path / "star-1.webp").read_bytes() == b"picture 0"
    assert (tmp_path / "star-2.webp").read_bytes() == b"picture 1"


def test_the_flags_of_a_masked_edit_reach_the_request(
    klein: Klein, target: str, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    initial, mask = tmp_path / "initial.png", tmp_path / "mask.png"
    initial.write_bytes(b"painted over")
    mask.write_bytes(b"white")
    flags = f"""--initial {initial} --mask {mask} --mask-alpha --strength 0.3 --mask-padding 0 --expand 1,2,3,40
        --no-preserve --target {target} -o {tmp_path / "star.png"}"""
    exit_code, _, err = klein("generate", "a star", *flags.split())
    assert (exit_code, err) == (0, "")
    assert orchestrator.specs == [
        api.ImageSpec(
            prompt="a star",
            format=image_pb2.IMAGE_FORMAT_PNG,
            priority=image_pb2.PRIORITY_INTERACTIVE,
            initial_image=b"painted over",
            mask=b"white",
            mask_is_alpha=True,
            strength=0.3,
            mask_padding_px=0,
            expand=image_pb2.ImageExpansion(left_px=1, top_px=2, right_px=3, bottom_px=40),
            preserve_unmasked=False,
        )
    ]


def test_an_option_that_is_not_given_is_left_to_the_server(
    klein: Klein, target: str, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    exit_code, out, _ = klein("generate", "", "--target", target, "-o", tmp_path / "any.JPG")
    assert exit_code == 0
    spec = orchestrator.specs[0]
    assert {field.name for field, _ in spec.ListFields()} == {"format", "priority"}
    assert spec.format == image_pb2.IMAGE_FORMAT_JPEG
    assert out.count("\n") == 1
    for fact in ("any.JPG", "64×96", "seed 41", "fake", "1.50 s", "denoise 123 ms"):
        assert fact in out


def test_a_dash_writes_only_the_image_to_standard_output(klein: Klein, target: str) -> None:
    exit_code, out, err = klein("generate", "long", "--target", target, "-o", "-")
    assert (exit_code, out) == (0, "picture 0")
    assert "seed 41" in err
    assert "cut off" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "picture.bmp"], ["picture.bmp", ".webp", "--format"]),
        (["-o", "q.png", "--format", "jpeg"], ["q.png ends in .png", "--format is jpeg"]),
        (["-o", "p.png", "-r", "-", "-r", "-"], ["Standard input", "only once"]),
        (["-o", "-", "--json"], ["--json", "-o -"]),
        (["-o", "p.png", "--target", "http://localhost:50050/"], ["--target", "is a URL", "localhost:50050"]),
        (["-o", "nowhere/picture.png"], ["nowhere", "does not exist"]),
        (["-o", "."], ["folder"]),
        (["-o", "/proc/picture.png"], ["/proc/picture.png cannot be written"]),
        (["-o", "ring.png", "--count", "2"], ["ring-2.png is a folder"]),
        (["-o", "there.png"], ["there.png exists already", "--force"]),
        (["-o", "-", "--count", "2"], ["standard output"]),
        (["-o", "p.png", "--reference", "missing.png"], ["missing.png", "No such file"]),
        (["-o", "p.png", "--size", "large"], ["--size", "1024x768"]),
        (["-o", "p.png", "--size", "64x"], ["--size", "1024x768"]),
        (["-o", "p.png", "--initial", "missing.png"], ["--initial missing.png", "No such file"]),
        (["-o", "p.png", "--mask", "missing.png"], ["--mask missing.png", "No such file"]),
        (["-o", "p.png", "--initial", "-", "--mask", "-"], ["Standard input", "only once"]),
        (["-o", "p.png", "--expand", "64"], ["--expand '64'", "LEFT,TOP,RIGHT,BOTTOM"]),
        (["-o", "p.png", "--expand", "0,0,-1,0"], ["--expand '0,0,-1,0'", "LEFT,TOP,RIGHT,BOTTOM"]),
        (["-o", "p.png", "--timeout", "inf"], ["--timeout", "86400"]),
        (["-o", "p.png", "--target", " "], ["--target", "HOST:PORT"]),
        (["-o", "p.png", "--seed", str(2**63)], ["far outside", str(2**63)]),
        (["-o", "p.png", "--steps", str(2**31)], ["far outside", str(2**31)]),
    ],
)
def test_misuse_is_refused_before_a_call(
    klein: Klein, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ring-2.png").mkdir()
    (tmp_path / "there.png").write_bytes(b"mine")
    exit_code, out, err = klein("generate", "a star", *arguments)
    assert (exit_code, out) == (2, "")
    assert all(word in " ".join(err.split()) for word in words), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ring-2.png", "there.png"]
    assert (tmp_path / "there.png").read_bytes() == b"mine"


def test_an_image_that_is_not_written_leaves_its_seed_and_the_others(
    klein: Klein, target: str, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    # A folder with the first image's name appears between the check and the end of the request.
    orchestrator.before_answer = lambda: (tmp_path / "ring-1.png").mkdir()
    exit_code, out, err = klein(
        "generate", "a ring", "--count", 2, "--target", target, "-o", tmp_path / "ring.png"
    )
    assert exit_code == 1
    assert "ring-1.png cannot be written: File exists" in err
    assert (tmp_path / "ring-2.png").read_bytes() == b"picture 1"
    assert f"{tmp_path / 'ring-2.png'}: 64×96, seeds 41, 42" in out


def test_without_a_name_files_are_numbered_after_those_that_exist(
    klein: Klein,
    target: str,
    orchestrator: Orchestrator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("klein-2.png").write_bytes(b"mine")
    assert klein("generate", "a star", "--target", target)[0] == 0
    _, out, _ = klein("generate", "a star", "--count", 2, "--target", target)
    assert out.startswith("klein-3.png, klein-4.png: ")
    assert Path("klein-1.png").read_bytes() == Path("klein-3.png").read_bytes() == b"picture 0"
    assert Path("klein-2.png").read_bytes() == b"mine"
    orchestrator.before_answer = lambda: Path("klein-5.png").write_bytes(b"another command's")
    _, out, _ = klein("generate", "a star", "--target", target)
    assert out.startswith("klein-6.png: ")


def test_force_replaces_a_file(klein: Klein, target: str, tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"mine")
    assert klein("generate", "a star", "--force", "--target", target, "-o", tmp_path / "p.png")[0] == 0
    assert (tmp_path / "p.png").read_bytes() == b"picture 0"


def test_a_prompt_or_a_reference_comes_from_standard_input(
    target: str, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    for arguments in (["-", "-o", "a.png"], ["a star", "-r", "-", "-o", "b.png"]):
        subprocess.run(
            [sys.executable, "-m", "klein_services.cli.main", "generate", *arguments, "--target", target],
            cwd=tmp_path,
            env=inherited_environment(),
            input="ein schöner Stern\n".encode(),
            timeout=60,
            check=True,
        )
    prompt, reference = orchestrator.specs
    assert (prompt.prompt, list(prompt.references)) == ("ein schöner Stern", [])
    assert list(reference.references) == ["ein schöner Stern\n".encode()]


def test_no_image_goes_to_a_terminal(target: str, orchestrator: Orchestrator) -> None:
    master, terminal = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "klein_services.cli.main", "generate", "a", "-o", "-", "--target", target],
        env=inherited_environment(),
        stdout=terminal,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(terminal)
    os.close(master)
    assert done.returncode == 2
    assert "is a terminal" in done.stderr
    assert orchestrator.specs == []


def test_json_is_one_object_on_standard_output(
    klein: Klein, target: str, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    orchestrator.warnings = ["It knows no cat."]
    described = api.RoutedModel(name="fake", description="It knows hearts and stars.")
    orchestrator.models = api.ListModelsResponse(models=[described])
    file = tmp_path / "p.png"
    exit_code, out, err = klein(
        *("generate", "long", "--count", 2, "--json", "--embed-prompt", "--target", target, "-o", file)
    )
    assert exit_code == 0
    answer = json.loads(out)
    assert answer["files"] == [str(tmp_path / "p-1.png"), str(tmp_path / "p-2.png")]
    assert (answer["seeds"], answer["model"], answer["total_ms"]) == ([41, 42], "fake", 1500)
    assert [(each["operation"], each["call_ms"]) for each in answer["timings"]] == [
        ("encode-prompt", 7),
        ("denoise", 123),
    ]
    assert answer["warnings"][0] == "It knows no cat."
    assert "cut off" in answer["warnings"][1]
    assert "Warning: It knows no cat." in err
    assert "It knows hearts and stars." in err
    assert orchestrator.specs[0].embed_prompt


def test_images_are_in_the_order_of_their_seeds_however_they_arrive(
    klein: Klein, target: str, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    orchestrator.last_image_first = True
    _, out, _ = klein(
        "generate", "a star", "--count", 3, "--json", "--target", target, "-o", tmp_path / "p.png"
    )
    answer = json.loads(out)
    assert answer["files"] == [str(tmp_path / f"p-{number}.png") for number in (1, 2, 3)]
    assert answer["seeds"] == [41, 42, 43]
    assert [Path(file).read_bytes() for file in answer["files"]] == [
        b"picture %d" % index for index in range(3)
    ]


def test_timings_follow_a_request_s_life(klein: Klein, target: str, tmp_path: Path) -> None:
    _, out, _ = klein("generate", "a star", "--target", target, "-o", tmp_path / "p.png")
    assert "(encode-prompt 7 ms · denoise 123 ms)" in out


def test_a_refused_reference_is_named_by_its_file(
    klein: Klein, target: str, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for file in files:
        file.write_bytes(b"x")
    orchestrator.error = InvalidInput([Violation("references[1]", "is not an image")])
    exit_code, _, err = klein(
        *("generate", "a", "-r", files[0], "-r", files[1], "--target", target, "-o", tmp_path / "p.png")
    )
    assert exit_code == 2
    assert f"--reference {files[1]} (references[1]) is not an image" in err


def test_a_full_output_is_one_sentence(target: str, orchestrator: Orchestrator) -> None:
    orchestrator.models = api.ListModelsResponse(models=[api.RoutedModel(name="fake")])
    for command in (["status", "--target", target], ["generate", "a", "--target", target, "-o", "-"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "klein_services.cli.main", *command],
                env=inherited_environment(),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        assert not any(word in done.stderr for word in ("fault in klein", "Traceback", "ignored"))


def test_nothing_running_is_one_sentence_and_a_hint(klein: Klein, tmp_path: Path) -> None:
    for arguments in (["generate", "a star", "-o", str(tmp_path / "p.png")], ["status"]):
        with ReservedPort() as reserved:
            target = f"127.0.0.1:{reserved.port}"
            exit_code, out, err = klein(*arguments, "--target", target)
        assert (exit_code, out) == (1, "")
        assert err.splitlines() == [
            f"Error: Nothing answers at {target}.",
            "Hint: Start the suite with `klein up`, or name another server with --target.",
        ]


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (
            InvalidInput([Violation("width_px", "is 70; no"), Violation("references[1]", "is no image")]),
            2,
            ["2 values", "--size (width_px) is 70; no\n", "--reference[1] (references[1]) is no image"],
        ),
        (
            InvalidInput(size_violations(1024, 1024, replace(DEFAULT_LIMITS, pixel_count=65536))),
            2,
            ["Error: --size is 1024 × 1024 = 1048576 pixels; "],
        ),
        (
            InvalidInput(
                inpainting_violations(
                    has_initial_image=False,
                    has_mask=True,
                    strength=0.5,
                    mask_padding_px=1,
                    expand=Expansion(1),
                    has_size=False,
                )
            ),
            2,
            [
                "4 values",
                "\n  --mask needs --initial\n",
                "\n  --strength needs --initial\n",
                "\n  --mask-padding (mask_padding_px) needs --initial\n",
                "\n  --expand needs --initial",
            ],
        ),
        (
            InvalidInput(
                inpainting_violations(
                    has_initial_image=True,
                    has_mask=False,
                    strength=None,
                    mask_padding_px=None,
                    expand=Expansion(),
                    has_size=True,
                )
            ),
            2,
            ["Error: --size cannot be given: --initial decides the size."],
        ),
        (UnknownModel("model", "nono", ["pico"]), 2, ["There is no model 'nono'", "pico", "klein status"]),
        (
            UnknownAdapter("adapters[0].name", "nono", ["ink", "oil"]),
            2,
            ["There is no adapter 'nono'", "ink, oil", "klein adapters"],
        ),
        (UnusableAdapter("adapters[0].name", "ink", "it is truncated"), 1, ["it is truncated", "operator"]),
        (InvalidInput([Violation("adapters[0].scale", "is 99; no")]), 2, ["--adapter[0].scale", "is 99; no"]),
        (QueueFull(3, 4.0), 1, ["full", "4 s"]),
        (StageUnavailable("the denoiser is loading"), 1, ["The denoiser is loading.", "klein status"]),
        (ModelNotAllowed("m", ["pico"]), 1, ["'m'; it allows pico.", "Hint: Ask the server's operator"]),
        (
            ContentDenied("request", "WORD", "no"),
            1,
            ["denies this request: no.", "Hint: Ask for something else."],
        ),
        (
            ContentPolicyFailed(),
            1,
            ["gave no decision", "Hint: The server's operator can repair the policy."],
        ),
        (ZeroDivisionError("secret"), 1, ["INTERNAL", "log"]),
    ],
)
def test_a_refusal_says_what_to_do(
    klein: Klein,
    target: str,
    orchestrator: Orchestrator,
    tmp_path: Path,
    error: Exception,
    exit_code: int,
    words: list[str],
) -> None:
    orchestrator.error = error
    got, out, err = klein("generate", "a star", "--target", target, "-o", tmp_path / "p.png")
    assert (got, out) == (exit_code, "")
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    assert "secret" not in err
    assert not (tmp_path / "p.png").exists()


def test_the_timeout_ends_the_call(
    klein: Klein, target: str, orchestrator: Orchestrator, tmp_path: Path
) -> None:
    orchestrator.blocks = True
    exit_code, _, err = klein(
        "generate", "a star", "--timeout", 0.3, "--target", target, "-o", tmp_path / "p.png"
    )
    assert exit_code == 1
    assert "--timeout" in err
    assert orchestrator.cancelled.wait(30)


def test_control_c_cancels_the_call(target: str, orchestrator: Orchestrator, tmp_path: Path) -> None:
    orchestrator.blocks = True
    command = [
        sys.executable,
        "-m",
        "klein_services.cli.main",
        "generate",
        "a star",
        "--target",
        target,
        "-o",
        "p.png",
    ]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=inherited_environment(),
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore it, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert orchestrator.called.wait(60)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert orchestrator.cancelled.wait(30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "Cancelled."
    assert "Traceback" not in err


def test_control_c_while_the_command_is_imported_is_no_traceback() -> None:
    script = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'klein_services.cli.app': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from klein_services.cli.main import main\n"
        "sys.exit(main(['--version']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=inherited_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "Cancelled.\n")


def stage(
    name: str, *, serving: bool = True, loaded: bool = False, problem: str = "", described: bool = True
) -> api.RoutedStage:
    description = stage_api.DescribeStageResponse(
        stage=name, model="fake", serving=serving, device="cpu", dtype="bf16"
    )
    if serving or loaded:
        description.denoiser.default_step_count = 4
    description.load.queued_count, description.load.queue_limit = 3, 64
    return api.RoutedStage(
        target=f"{name}:1", problem=problem, description=description if described else None
    )


@pytest.mark.parametrize(
    ("denoiser", "exit_code", "word"),
    [
        (stage("denoiser"), 0, "serving"),
        (stage("denoiser", serving=False, problem="it loads"), 1, "loading"),
        (stage("denoiser", serving=False, loaded=True, problem="it stops"), 1, "draining"),
        (stage("denoiser", problem="it serves another model"), 1, "wrong"),
        (stage("denoiser", described=False, problem="connection refused"), 1, "unreachable"),
    ],
)
def test_status_is_good_only_when_all_stages_serve(
    klein: Klein,
    target: str,
    orchestrator: Orchestrator,
    monkeypatch: pytest.MonkeyPatch,
    denoiser: api.RoutedStage,
    exit_code: int,
    word: str,
) -> None:
    stages = [stage("text-encoder"), denoiser, stage("vae-decoder")]
    model = api.RoutedModel(
        name="fake", serving=exit_code == 0, stages=stages, description="It knows hearts."
    )
    orchestrator.models = api.ListModelsResponse(models=[model], default_model="fake")
    got, out, _ = klein("status", "--target", target)
    assert got == exit_code
    row = next(line for line in out.splitlines() if "denoiser" in line)
    assert word in row
    assert denoiser.problem in out
    assert "3/64" in out
    assert "fake: It knows hearts." in out


@pytest.mark.parametrize("problem", ["", "ink.safetensors: for layers that this model does not have: up"])
def test_adapters_are_listed_with_what_is_wrong_with_them(
    klein: Klein, target: str, orchestrator: Orchestrator, problem: str
) -> None:
    listed = [
        stage_api.AdapterDescription(
            name="oil",
            kind="LoRA",
            rank=16,
            layer_count=80,
            size_bytes=5 << 20,
            notes=["header entry lora_alpha (2) is ignored"],
        ),
        stage_api.AdapterDescription(name="ink", kind="LoKr", layer_count=3, size_bytes=700, problem=problem),
    ]
    models = [api.RoutedModel(name="fake", adapters=listed), api.RoutedModel(name="bare")]
    orchestrator.models = api.ListModelsResponse(models=models, default_model="fake")
    got, out, _ = klein("adapters", "--target", target)
    assert got == (1 if problem else 0)
    oil, ink = (next(line for line in out.splitlines() if line.startswith(name)) for name in ("oil", "ink"))
    assert oil.split() == ["oil", "LoRA", "16", "80", "5.24", "MB"]
    assert ("unusable" in ink) == bool(problem)
    assert problem in out
    assert "bare offers no adapters" in out
    assert "oil: header entry lora_alpha (2) is ignored" in out


def test_a_scale_that_is_no_number_is_misuse(klein: Klein, tmp_path: Path) -> None:
    got, _, err = klein("generate", "a star", "--adapter", "ink:strong", "-o", tmp_path / "p.png")
    assert got == 2
    assert "'ink:strong' has no number" in err


def test_status_without_models_is_not_good(klein: Klein, target: str) -> None:
    assert klein("status", "--target", target)[0] == 1


def test_the_client_side_imports_no_model_library() -> None:
    script = (
        "import sys, pkgutil, importlib, klein_services.cli as c;"
        "[importlib.import_module(f'klein_services.cli.{m.name}') for m in pkgutil.iter_modules(c.__path__)];"
        "print({'torch','transformers','numpy','PIL','safetensors'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=inherited_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"
