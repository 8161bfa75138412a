"""The `klein` command."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.errors import FAILED, INTERRUPTED, CliError
from services.cli.serve import StageGroup

DEFAULT_PORT = 50050
DEFAULT_TARGET = f"127.0.0.1:{DEFAULT_PORT}"

app = typer.Typer(
    name="klein",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "First steps: [bold]klein up[/] in one terminal, then in another\n\n"
        '[bold]klein generate "a large red heart on a yellow background" -o heart.png[/]'
    ),
)
serve_app = typer.Typer(
    cls=StageGroup, no_args_is_help=True, help="Run one stage of the suite in this process."
)
app.add_typer(serve_app, name="serve")

Target = Annotated[
    str, typer.Option(metavar="HOST:PORT", envvar="KLEIN_TARGET", help="The orchestrator to call.")
]


class FormatName(StrEnum):
    """How images are encoded."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class DtypeName(StrEnum):
    """What stages compute in."""

    CHECKPOINT = "checkpoint"
    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"


class QuantizationName(StrEnum):
    """What weights can be made into."""

    NONE = "none"
    FP8 = "fp8"
    INT8 = "int8"


class PrecisionName(StrEnum):
    """What the transformer's weights are published as."""

    BF16 = "bf16"
    FP8 = "fp8"
    NVFP4 = "nvfp4"


class OffloadName(StrEnum):
    """What is kept in the machine's memory instead of a GPU's."""

    NONE = "none"
    BLOCKS = "blocks"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; every failure becomes a sentence on standard error and an exit code."""
    try:
        app(arguments)
    except CliError as error:
        error.show(_console())
        return error.exit_code
    except KeyboardInterrupt:
        _console().print("Cancelled.")
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("KLEIN_TRACEBACK"):
            raise
        sentence = f"{type(error).__name__}: {error}. This is a fault in klein itself."
        CliError(sentence, "Set KLEIN_TRACEBACK=1 to see where, and report it.").show(_console())
        return FAILED
    return 0


def _console() -> Console:
    return Console(stderr=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"klein-suite {metadata.version('klein-suite')}")
        raise typer.Exit


@app.callback()
def klein(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """FLUX.2 klein as four gRPC services: start them, watch them, make pictures with them."""


@app.command(
    epilog="[bold]klein up[/]: the embedded model.\n\n"
    "[bold]klein up --model klein-4b --device cuda[/]: one that [bold]klein pull klein-4b[/] fetched.\n\n"
    "[bold]klein up --model ./FLUX.2-klein-4B[/]: a folder in the diffusers layout.\n\n"
    "[bold]klein up --transformer t.safetensors --vae v.safetensors --text-encoder q.safetensors "
    "--tokenizer ./tokenizer --variant klein-4b[/]: bare files.\n\n"
    "[bold]klein up --port 0 --verbose[/]: beside another suite, logs shown."
)
def up(
    model: Annotated[
        str,
        typer.Option(
            metavar="pico|NAME|FOLDER|FILE",
            help="The embedded model, one that `klein pull` fetched, a folder in the diffusers layout, or one file.",
        ),
    ] = "pico",
    transformer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The transformer, instead of the model's own.")
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The autoencoder, instead of the model's own.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text encoder, instead of the model's own.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The tokenizer, where the text encoder is a bare file."),
    ] = None,
    variant: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Which model a bare transformer is, such as klein-4b or klein-base-4b."
        ),
    ] = "",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the public API; 0 takes a free one.")
    ] = DEFAULT_PORT,
    host: Annotated[
        str, typer.Option(help="Address of the public API; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="Where to compute.")
    ] = "auto",
    dtype: Annotated[DtypeName, typer.Option(help="What to compute in.")] = DtypeName.CHECKPOINT,
    quantization: Annotated[
        QuantizationName, typer.Option(help="What plain weights are made into, to take half the memory.")
    ] = QuantizationName.NONE,
    adapters: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Adapters that requests may name: NAME.safetensors each."),
    ] = None,
    offload: Annotated[
        OffloadName,
        typer.Option(help="What stays in the machine's memory and is brought to a GPU ahead of its use."),
    ] = OffloadName.NONE,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads of each stage; 0 chooses.")] = 0,
    log_folder: Annotated[
        Path | None, typer.Option(help="Where logs stay; else a temporary folder, kept after failures.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the logs as they are written.")
    ] = False,
) -> None:
    """Run the whole suite on this machine: four processes, one public port. Ctrl-C stops them."""
    from services.cli.suite import SuiteOptions
    from services.cli.up import run_up

    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    options = SuiteOptions(
        model=model,
        parts={component: path for component, path in parts.items() if path is not None},
        variant=variant,
        host=host,
        port=port,
        device=device,
        dtype=dtype.value,
        quantization=quantization.value,
        adapters=adapters,
        offload=offload.value,
        threads=threads,
        log_folder=log_folder,
    )
    raise typer.Exit(run_up(options, Console(), verbose=verbose))


@app.command(
    epilog="[bold]klein pull klein-4b[/]: then [bold]klein up --model klein-4b[/]\n\n"
    "[bold]klein pull klein-9b --precision fp8 --accept-license[/]: a gated one; needs HF_TOKEN.\n\n"
    "[bold]klein pull owner/repository --to ./model[/]: any klein model in diffusers' layout.\n\n"
    "Models go to KLEIN_MODELS_FOLDER, by default ~/.local/share/klein/models. HF_TOKEN, HF_ENDPOINT, HF_HOME "
    "and proxies mean what they mean to huggingface_hub. Interrupted, the same command goes on."
)
def pull(
    identifier: Annotated[
        str, typer.Argument(metavar="MODEL", help="A known name such as klein-4b, or OWNER/REPOSITORY.")
    ],
    precision: Annotated[
        PrecisionName | None, typer.Option(help="What the transformer's weights are published as; else bf16.")
    ] = None,
    small_decoder: Annotated[
        bool, typer.Option("--small-decoder", help="With the faster decoder instead of the model's own.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the model goes; must not hold anything else.")
    ] = None,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Needed for models that are not free for commercial use.")
    ] = False,
) -> None:
    """Download a model: only the files that this suite needs."""
    from services.cli.pull import PullOptions, run_pull

    options = PullOptions(
        identifier=identifier,
        precision=precision.value if precision else None,
        small_decoder=small_decoder,
        to=to,
        licence_accepted=accept_license,
    )
    run_pull(options, Console(), _console())


@app.command(
    epilog='[bold]klein generate "a green star" -o star.png[/]\n\n'
    '[bold]klein generate "make the background blue" --reference star.png -o blue.webp[/]\n\n'
    '[bold]klein generate "a star" --adapter watercolour:0.8 -o star.png[/]: what `klein adapters` lists\n\n'
    '[bold]klein generate "a ring" --size 128x192 --seed 7 --count 4 -o ring.png[/]: ring-1.png … ring-4.png'
)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to make, or what to change in the references.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to write; replaced if there; - is standard output."
        ),
    ],
    reference: Annotated[
        list[Path] | None,
        typer.Option("--reference", "-r", metavar="FILE", help="An image to start from; may be repeated."),
    ] = None,
    negative: Annotated[
        str | None, typer.Option("--negative-prompt", help="What it should not be; base models only.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH", help="Pixels, multiples of 16; else the first reference's or the model's own."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; else the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance; base models only.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same image; else random.")] = None,
    count: Annotated[
        int | None, typer.Option(help="Images to make: FILE-1, FILE-2 … with following seeds.")
    ] = None,
    image_format: Annotated[
        FormatName | None, typer.Option("--format", help="Encoding; else what FILE's suffix says.")
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Quality of JPEG and WebP, 1 to 100.")] = None,
    model: Annotated[str, typer.Option(help="A model that the server routes; else its default.")] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="NAME[:SCALE]",
            help="A LoRA of the server's, -10 to 10, by default 1; may be repeated.",
        ),
    ] = None,
    target: Target = DEFAULT_TARGET,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="Longest wait for all of it.")
    ] = 600.0,
) -> None:
    """Make images through a running suite and write them to files."""
    from services.cli.generate import GenerateOptions, run_generate

    options = GenerateOptions(
        prompt=prompt,
        output=output,
        references=tuple(reference or ()),
        negative_prompt=negative,
        size=size,
        steps=steps,
        guidance=guidance,
        seed=seed,
        count=count,
        image_format=image_format.value if image_format else None,
        quality=quality,
        model=model,
        adapters=tuple(adapter or ()),
    )
    run_generate(options, target, timeout, _console())


@app.command(
    epilog="[bold]klein plan --model klein-9b --device-memory 24GiB[/]: before downloading.\n\n"
    "[bold]klein plan --model ./FLUX.2-klein-4B --device-memory 12GiB --sizes 2048x2048 --references 1[/]"
)
def plan(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER|FILE",
            help="A known name such as klein-4b, pico, a model's folder, or a transformer's file.",
        ),
    ],
    device_memory: Annotated[str, typer.Option(metavar="SIZE", help="Of one device, such as 12GiB or 24GB.")],
    sizes: Annotated[
        str, typer.Option(metavar="WxH,…", help="Images that must be possible; the largest counts.")
    ] = "1024x1024",
    references: Annotated[int, typer.Option(help="References of each image, of a megapixel each.")] = 0,
    batch: Annotated[int, typer.Option(help="Images in one step.")] = 1,
    precision: Annotated[
        list[str] | None, typer.Option(help="What the denoiser's weights may be; may be repeated; else any.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
) -> None:
    """Tell what a model needs and how to start it on a device, without loading anything."""
    from services.cli.plan import PlanOptions, run_plan

    options = PlanOptions(
        model=model,
        device_memory=device_memory,
        sizes=sizes,
        references=references,
        batch=batch,
        precisions=tuple(precision or ()),
        as_json=as_json,
    )
    raise typer.Exit(run_plan(options, Console()))


@app.command(
    epilog="Names are what [bold]klein generate --adapter NAME:0.8[/] takes. Exits with 0 only when all can be used."
)
def adapters(
    target: Target = DEFAULT_TARGET,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="Longest wait for an answer.")
    ] = 10.0,
) -> None:
    """List the adapters that requests may name: kind, rank, layers, size, problems."""
    from services.cli.adapters import run_adapters

    raise typer.Exit(run_adapters(target, timeout, Console()))


@app.command(
    epilog="[bold]klein inspect ./flux-2-klein-4b-fp8.safetensors[/]\n\n"
    "Exits with 0 only when everything that it holds could be loaded."
)
def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A safetensors file, a model's or a component's folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a file holds without loading it: model, layout, precision, what is missing."""
    from services.cli.inspect import run_inspect

    raise typer.Exit(run_inspect(path, Console(), as_json=as_json))


@app.command(epilog="Exits with 0 only when every stage of every model serves: `klein status && …`.")
def status(
    target: Target = DEFAULT_TARGET,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="Longest wait for an answer.")
    ] = 10.0,
) -> None:
    """Show the models and their stages: health, device, load, problems."""
    from services.cli.status import run_status

    raise typer.Exit(run_status(target, timeout, Console()))


if __name__ == "__main__":
    sys.exit(main())
