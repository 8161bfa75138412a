"""Client of the public API, shared by the commands, the demo and the benchmarks."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.target import Target
from klein_services.runtime.channels import IMAGE_MESSAGE_BYTES, open_channel

if TYPE_CHECKING:
    from klein_api.v1.image_service_pb2_grpc import ImageServiceAsyncStub


TOKEN_VARIABLE = "KLEIN_TOKEN"
"""Environment variable of the token; there is no flag, because other users of a machine see those."""
_LONGEST_TOKEN_FILE = 8192
_TOKEN = re.compile(r"[!-~]{1,4096}")
OPERATIONS = ("encode-prompt", "encode-initial-image", "encode-reference", "denoise", "decode")
"""Operations of a request, in the order in which it passes them."""


@dataclass(frozen=True)
class Generation:
    """Result of a finished request."""

    images: tuple[api.GeneratedImage, ...]
    """In the order of their seeds."""
    summary: api.GenerationSummary


@asynccontextmanager
async def connect(target: Target | str) -> AsyncIterator[ImageServiceAsyncStub]:
    """Opens a channel to an orchestrator for the duration of the block, in plaintext if only an address is given."""
    called = Target(target) if isinstance(target, str) else target
    async with open_channel(
        called.address,
        message_bytes=IMAGE_MESSAGE_BYTES,
        credentials=called.credentials,
        server_name=called.server_name,
    ) as channel:
        yield ImageServiceStub(channel)


def authorization(token: str = "") -> tuple[tuple[str, str], ...]:
    """Returns the metadata that carries a token, by default that of `KLEIN_TOKEN`; empty without one.

    Raises:
        CliError: the text cannot be a token. It is not shown.
    """
    token = token or os.environ.get(TOKEN_VARIABLE, "").strip()
    if token and not _TOKEN.fullmatch(token):
        raise CliError(
            "The token has characters that no token has, or too many.",
            f"{TOKEN_VARIABLE} and --token-file must hold a token and nothing else.",
            MISUSED,
        )
    return (("authorization", f"Bearer {token}"),) if token else ()


def read_token(file: Path | None) -> str:
    """Returns the token in a file, without the white space around it; empty without a file.

    Raises:
        CliError: the file cannot be read, or is empty.
    """
    if file is None:
        return ""
    try:
        with file.open("rb") as content:
            token = content.read(_LONGEST_TOKEN_FILE).decode("ascii", "replace").strip()
    except OSError as error:
        raise CliError(f"--token-file {file} cannot be read: {error.strerror}.", exit_code=MISUSED) from error
    if not token:
        raise CliError(f"--token-file {file} is empty.", exit_code=MISUSED)
    return token


async def generate(
    stub: ImageServiceAsyncStub,
    spec: api.ImageSpec,
    *,
    timeout_seconds: float | None = None,
    token: str = "",
    on_event: Callable[[api.StreamGenerateImageResponse], None] = lambda event: None,
) -> Generation:
    """Makes the images of `spec` and passes each event to `on_event`; `token` is as in `authorization`.

    Raises:
        CliError: the token cannot be sent.
        grpc.aio.AioRpcError: the call failed.
    """
    images: list[api.GeneratedImage] = []
    summary = api.GenerationSummary()
    request = api.StreamGenerateImageRequest(spec=spec)
    call = stub.StreamGenerateImage(request, timeout=timeout_seconds, metadata=authorization(token))
    async for event in call:
        on_event(event)
        match event.WhichOneof("event"):
            case "image":
                images.append(event.image)
            case "summary":
                summary = event.summary
    # They arrive as they are finished, which may be in another order.
    return Generation(tuple(sorted(images, key=lambda image: image.index)), summary)


def timings_in_order(summary: api.GenerationSummary) -> list[api.StageTiming]:
    """Returns the timings in the order of `OPERATIONS`, unknown operations last."""
    position = {operation: index for index, operation in enumerate(OPERATIONS)}
    return sorted(summary.stage_timings, key=lambda timing: position.get(timing.operation, len(position)))
