"""Commands about models on this machine: up, pull, plan, inspect."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from klein_core.model_registry import PUBLISHED_MODELS
from klein_core.quantization import constants
from klein_services.cli.output import messages
from klein_services.cli.ports import DEFAULT_PORT

commands = typer.Typer()


class DtypeName(StrEnum):
    """Element types that stages compute in."""

    AUTO = "auto"
    CHECKPOINT = "checkpoint"
    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"


class QuantizationName(StrEnum):
    """Formats that plain weights can be converted to."""

    NONE = constants.NO_QUANTIZATION
    FP8 = constants.FLOAT8
    INT8 = constants.INT8


class PrecisionName(StrEnum):
    """Formats in which transformers are published."""

    BF16 = "bf16"
    FP8 = constants.FLOAT8
    NVFP4 = constants.NVFP4_TILED


class OffloadName(StrEnum):
    """Parts that stay in host memory instead of GPU memory."""

    NONE = "none"
    BLOCKS = "blocks"


@commands.command(
    epilog="[bold]klein up[/]: pico, the embedded model.\n\n"
    "[bold]klein up --model klein-4b --device cuda[/]: a model that [bold]klein pull klein-4b[/] fetched.\n\n"
    "[bold]klein up --model ./FLUX.2-klein-4B[/]: a folder in the diffusers layout.\n\n"
    "[bold]klein up --transformer t.safetensors --vae v.safetensors --text-encoder q.safetensors "
    "--tokenizer ./tokenizer --variant klein-4b[/]: bare files.\n\n"
    "[bold]klein up --port 0 --verbose[/]: next to another suite, with its logs."
)
def up(
    model: Annotated[
        str,
        typer.Option(
            metavar="pico|NAME|FOLDER|FILE",
            help="The embedded model, one fetched by `klein pull`, a folder in the diffusers layout, or one file.",
        ),
    ] = "pico",
    transformer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Transformer that replaces the model's.")
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Autoencoder that replaces the model's.")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text encoder that replaces the model's.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Tokenizer for a text encoder that is a bare file."),
    ] = None,
    variant: Annotated[
        str,
        typer.Option(metavar="NAME", help="Model of a bare transformer, such as klein-4b or klein-base-4b."),
    ] = "",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the public API; 0 takes a free one.")
    ] = DEFAULT_PORT,
    host: Annotated[
        str, typer.Option(help="Address of the public API; 0.0.0.0 accepts calls of other machines.")
    ] = "127.0.0.1",
    device: Annotated[
        str,
        typer.Option(
            metavar="auto|cpu|cuda|cuda:N|mps", help="Device of the stages; auto takes the first GPU."
        ),
    ] = "auto",
    dtype: Annotated[
        DtypeName,
        typer.Option(
            help="Element type of the computation; checkpoint keeps that of the weights, and so does auto but for "
            "VAEs on CUDA, which are bf16."
        ),
    ] = DtypeName.AUTO,
    quantization: Annotated[
        QuantizationName,
        typer.Option(help="Format that plain weights are converted to, which halves their memory."),
    ] = QuantizationName.NONE,
    adapters: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder of adapters that requests may name, as NAME.safetensors."
        ),
    ] = None,
    offload: Annotated[
        OffloadName,
        typer.Option(help="Parts that stay in host memory and are copied to the GPU ahead of their use."),
    ] = OffloadName.NONE,
    threads: Annotated[
        int, typer.Option(min=0, help="CPU threads of each stage; 0 takes half of the cores.")
    ] = 0,
    tls_certificate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="PEM file of the public API's certificate; with it, it speaks TLS."
        ),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of that certificate's private key.")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM file of the authorities one of which must have issued each client's certificate.",
        ),
    ] = None,
    gateway_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of the gateway, which serves HTTP; 0 takes a free one; by default 8080, or a free one where "
            "that is taken.",
            show_default=False,
        ),
    ] = None,
    no_gateway: Annotated[
        bool, typer.Option("--no-gateway", help="Leave the gateway out: gRPC only.")
    ] = False,
    log_folder: Annotated[
        Path | None, typer.Option(help="Folder of the logs; by default a temporary one, kept after failures.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the logs while they are written.")
    ] = False,
) -> None:
    """Run the whole suite on this machine: four processes and the HTTP gateway. Ctrl-C stops them."""
    from klein_services.cli.suite import SuiteOptions
    from klein_services.cli.up import run_up

    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    tls = {"tls_certificate": tls_certificate, "tls_key": tls_key, "tls_client_ca": tls_client_ca}
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
        has_gateway=not no_gateway,
        gateway_port=gateway_port,
        tls={setting: path.resolve() for setting, path in tls.items() if path is not None},
    )
    raise typer.Exit(run_up(options, Console(), verbose=verbose))


@commands.command(
    epilog="[bold]klein pull klein-4b[/]: then [bold]klein up --model klein-4b[/]\n\n"
    "[bold]klein pull klein-9b --precision fp8 --accept-license[/]: a gated model, which requires HF_TOKEN.\n\n"
    "[bold]klein pull owner/repository --to ./model[/]: any klein model in the diffusers layout.\n\n"
    f"Known names: {', '.join(PUBLISHED_MODELS)}.\n\n"
    "Models are stored in KLEIN_MODELS_FOLDER, by default ~/.local/share/klein/models. huggingface_hub reads "
    "HF_TOKEN, HF_ENDPOINT, HF_HOME and the proxy variables. Repeat the command to resume an interrupted download."
)
def pull(
    identifier: Annotated[
        str, typer.Argument(metavar="MODEL", help="Known name such as klein-4b, or OWNER/REPOSITORY.")
    ],
    precision: Annotated[
        PrecisionName | None,
        typer.Option(help="Published format of the transformer's weights; by default bf16."),
    ] = None,
    small_decoder: Annotated[
        bool,
        typer.Option("--small-decoder", help="Replace the model's decoder with the smaller, faster one."),
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder to store the model in; must be new or empty."),
    ] = None,
    accept_license: Annotated[
        bool,
        typer.Option(
            "--accept-license", help="Accept the license of a model that is not free for commercial use."
        ),
    ] = False,
) -> None:
    """Download the files of a model that this suite loads."""
    from klein_services.cli.pull import PullOptions, run_pull

    options = PullOptions(
        identifier=identifier,
        precision=precision.value if precision else None,
        small_decoder=small_decoder,
        to=to,
        license_accepted=accept_license,
    )
    run_pull(options, Console(), messages())


@commands.command(
    epilog="[bold]klein plan --model klein-4b[/]: for the GPU of this machine.\n\n"
    "[bold]klein plan --model klein-9b --device-memory 24GiB[/]: for another GPU, without downloading.\n\n"
    "[bold]klein plan --model ./FLUX.2-klein-4B --device-memory 12GiB --sizes 2048x2048 --references 1[/]"
)
def plan(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME|FOLDER|FILE",
            help="Known name such as klein-4b, pico, folder of a model, or file of a transformer.",
        ),
    ],
    device_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory of one device, such as 24GiB, 24GB or 24 (GiB); by default that of this machine's GPU.",
        ),
    ] = None,
    sizes: Annotated[
        str, typer.Option(metavar="WxH,…", help="Image sizes to plan for; the largest one decides.")
    ] = "1024x1024",
    references: Annotated[int, typer.Option(help="Reference images per image, each of one megapixel.")] = 0,
    batch: Annotated[int, typer.Option(help="Images denoised in one batch.")] = 1,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Allowed format of the transformer's weights; repeatable; by default all."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with sizes in bytes.")] = False,
) -> None:
    """Estimate the memory of a model and print the commands that start it, without loading weights."""
    from klein_services.cli.plan import PlanOptions, run_plan

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


@commands.command(
    epilog="[bold]klein inspect ./flux-2-klein-4b-fp8.safetensors[/]\n\n"
    "The exit code is 0 only if every component can be loaded."
)
def inspect(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Safetensors file, folder of a model, or folder of a component."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the model, layout, precision and missing tensors of a file or folder, without loading weights."""
    from klein_services.cli.inspect import run_inspect

    raise typer.Exit(run_inspect(path, Console(), as_json=as_json))
