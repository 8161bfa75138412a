"""Commands that call a running suite: generate, batch, adapters, status, top."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from klein_services.cli.output import messages
from klein_services.cli.target import (
    DEFAULT_TARGET,
    AuthorityFlag,
    CertificateFlag,
    KeyFlag,
    ServerNameFlag,
    TargetFlag,
    read_target,
    read_token,
)

LONGEST_TIMEOUT_SECONDS = 24 * 3600.0
"""Longest duration that an orchestrator's settings allow a request; gRPC's own timers have a limit, too."""


Timeout = Annotated[
    float,
    typer.Option(
        min=0.001, max=LONGEST_TIMEOUT_SECONDS, metavar="SECONDS", help="Longest wait for an answer."
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="File with the token for the orchestrator; by default KLEIN_TOKEN is sent."
    ),
]

commands = typer.Typer()


class FormatName(StrEnum):
    """Formats of encoded images."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


@commands.command(
    epilog='[bold]klein generate "a green star" -o star.png[/]\n\n'
    '[bold]klein generate "make the background blue" --reference star.png -o blue.webp[/]\n\n'
    '[bold]klein generate "a star" --adapter watercolor:0.8 -o star.png[/]: adapters are listed by `klein adapters`\n\n'
    '[bold]klein generate "a blue heart" --initial star.png --mask mask.png -o heart.png[/]: only white parts of the '
    "mask are made anew\n\n"
    '[bold]klein generate "a ring" --size 128x192 --seed 7 --count 4 -o ring.png[/]: ring-1.png … ring-4.png'
)
def generate(
    prompt: Annotated[
        str,
        typer.Argument(help="What to make, or what to change in the references; - reads standard input."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write; - is standard output; by default klein-1.png, klein-2.png … in this folder.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    reference: Annotated[
        list[Path] | None,
        typer.Option(
            "--reference",
            "-r",
            metavar="FILE",
            help="An image to start from; may be repeated; - reads standard input.",
        ),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option("--negative-prompt", help="What the image should not show; base models only."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="Pixels, multiples of 16; by default those of the first reference, else of the model.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the model's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; base models only.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed makes the same image; random by default.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="Number of images: FILE-1, FILE-2 … with consecutive seeds.")
    ] = None,
    image_format: Annotated[
        FormatName | None,
        typer.Option("--format", help="Encoding; by default that of FILE's suffix, else PNG."),
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Quality of JPEG and WebP, 1 to 100.")] = None,
    model: Annotated[str, typer.Option(help="A model of the server; by default its default model.")] = "",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="NAME[:SCALE]",
            help="An adapter of the server with its scale, -10 to 10, by default 1; may be repeated.",
        ),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="An image to paint over; it decides the size; - reads standard input."
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An image of the same aspect: white is made anew, black is kept; by default all is made anew.",
        ),
    ] = None,
    mask_alpha: Annotated[
        bool,
        typer.Option("--mask-alpha", help="Take the mask's transparent parts instead of its white ones."),
    ] = False,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps that are run on --initial: above 0, at most 1; by default 0.8."
        ),
    ] = None,
    mask_padding: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Make only the mask's surroundings, so many pixels wide, at full resolution.",
        ),
    ] = None,
    expand: Annotated[
        str | None,
        typer.Option(
            metavar="L,T,R,B", help="Add pixels left, top, right and bottom of --initial and make them."
        ),
    ] = None,
    no_preserve: Annotated[
        bool,
        typer.Option(
            "--no-preserve",
            help="Outside the mask, keep what the model makes of --initial in place of its own pixels.",
        ),
    ] = False,
    embed_prompt: Annotated[
        bool, typer.Option("--embed-prompt", help="Store the prompts in the files' metadata.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object: files, seeds, model, timings, warnings."),
    ] = False,
    target: TargetFlag = DEFAULT_TARGET,
    tls_ca: AuthorityFlag = None,
    tls_certificate: CertificateFlag = None,
    tls_key: KeyFlag = None,
    tls_name: ServerNameFlag = "",
    timeout: Annotated[
        float,
        typer.Option(
            min=0.001, max=LONGEST_TIMEOUT_SECONDS, metavar="SECONDS", help="Longest wait for all images."
        ),
    ] = 600.0,
    token_file: TokenFile = None,
) -> None:
    """Make images through a running suite and write them to files."""
    from klein_services.cli.generate import GenerateOptions, run_generate

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
        embed_prompt=embed_prompt,
        initial=initial,
        mask=mask,
        mask_alpha=mask_alpha,
        strength=strength,
        mask_padding=mask_padding,
        expand=expand,
        no_preserve=no_preserve,
        force=force,
        as_json=as_json,
    )
    called = read_target(target, tls_ca, tls_certificate, tls_key, tls_name)
    run_generate(options, called, timeout, messages(), read_token(token_file))


@commands.command(
    epilog='A line: [bold]{"id": "ring", "prompt": "a red ring", "width": 128, "height": 128, "seed": 7}[/]. Keys are '
    "the arguments of klein_client's generate(); only prompt is needed. Paths are relative to the file's folder.\n\n"
    "[bold]klein batch pictures.jsonl --out pictures[/]; the same command again makes what is missing.\n\n"
    "Exits with 0 only when every line has its images, with 2 when a line cannot be used and nothing was sent."
)
def batch(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Requests, one JSON object a line.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the images and results.jsonl.")
    ],
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-c", min=1, max=256, help="Requests at once.")
    ] = 4,
    target: TargetFlag = DEFAULT_TARGET,
    tls_ca: AuthorityFlag = None,
    tls_certificate: CertificateFlag = None,
    tls_key: KeyFlag = None,
    tls_name: ServerNameFlag = "",
    timeout: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=LONGEST_TIMEOUT_SECONDS,
            metavar="SECONDS",
            help="Longest time of one request, with its waits for a busy suite.",
        ),
    ] = 3600.0,
    token_file: TokenFile = None,
) -> None:
    """Make the images of many requests in a file, after all other work; can be interrupted and repeated."""
    from klein_services.cli.batch import run_batch

    called = read_target(target, tls_ca, tls_certificate, tls_key, tls_name)
    exit_code = run_batch(
        file,
        out,
        called,
        concurrency=concurrency,
        timeout_seconds=timeout,
        console=messages(),
        token=read_token(token_file),
    )
    raise typer.Exit(exit_code)


@commands.command(
    epilog="[bold]klein generate --adapter NAME:0.8[/] takes these names. Exits with 0 only when all can be used."
)
def adapters(
    target: TargetFlag = DEFAULT_TARGET,
    tls_ca: AuthorityFlag = None,
    tls_certificate: CertificateFlag = None,
    tls_key: KeyFlag = None,
    tls_name: ServerNameFlag = "",
    timeout: Timeout = 10.0,
    token_file: TokenFile = None,
) -> None:
    """List the adapters that requests may name: kind, rank, layers, size, problems."""
    from klein_services.cli.status import run_adapters

    called = read_target(target, tls_ca, tls_certificate, tls_key, tls_name)
    raise typer.Exit(run_adapters(called, timeout, Console(), read_token(token_file)))


@commands.command(epilog="Exits with 0 only when every stage of every model serves: `klein status && …`.")
def status(
    target: TargetFlag = DEFAULT_TARGET,
    tls_ca: AuthorityFlag = None,
    tls_certificate: CertificateFlag = None,
    tls_key: KeyFlag = None,
    tls_name: ServerNameFlag = "",
    timeout: Timeout = 10.0,
    token_file: TokenFile = None,
) -> None:
    """Show the models and their stages: health, device, load, problems."""
    from klein_services.cli.status import run_status

    called = read_target(target, tls_ca, tls_certificate, tls_key, tls_name)
    raise typer.Exit(run_status(called, timeout, Console(), read_token(token_file)))


@commands.command(
    epilog="[bold]klein top[/]: the suite of this machine\n\n"
    "[bold]klein top --metrics dns:///denoiser.klein.svc:9465 --metrics dns:///orchestrator.klein.svc:9467[/]\n\n"
    "[bold]klein top --once --json | jq .images_per_second[/]"
)
def top(
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metrics",
            "-m",
            metavar="HOST:PORT",
            help="A metrics page; may be repeated; dns:///NAME:PORT is every address of a name; by default those of "
            "this machine, 127.0.0.1:9464 to 9467.",
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, metavar="SECONDS", help="Time between two looks.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the load of one interval and exit.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line instead of a table.")
    ] = False,
) -> None:
    """Watch the load of every process: queues, steps, throughput, refusals. Ctrl-C ends it."""
    from klein_services.cli.top import run_top
    from klein_services.runtime.scrape import DEFAULT_TARGETS

    raise typer.Exit(run_top(metrics or DEFAULT_TARGETS, interval, Console(), once=once, as_json=as_json))
