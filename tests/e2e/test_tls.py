"""Four processes that speak mutual TLS on every hop: the same bytes as in plaintext, also while certificates rotate."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import grpc
import pytest

from klein_api.v1.stage_service_pb2 import DescribeStageRequest
from klein_api.v1.stage_service_pb2_grpc import StageServiceStub
from klein_client import AsyncClient, Tls
from klein_core.pico import WEIGHTS
from klein_core.pipeline import Pipeline
from klein_services.cli.suite import Suite, SuiteOptions
from klein_services.runtime.channels import open_channel
from klein_services.runtime.status import explain
from tests.e2e.running_suite import READY_SECONDS, picture
from tests.services.fakes.certificates import Authority, Pair
from tests.services.fakes.denoiser_server import one_thread
from tests.services.fakes.runtime_toy import until

IDENTITY = "suite.klein"
PROMPT = "a small green star on a white background"


@dataclass(frozen=True)
class LockedSuite:
    """A suite in which every process presents one certificate and requires its name of all callers."""

    suite: Suite
    authority: Authority
    pair: Pair
    """Files of the certificate that all processes present."""
    tls: Tls

    async def images(self, seed: int, references: tuple[bytes, ...] = ()) -> list[bytes]:
        async with AsyncClient(self.suite.target, tls=self.tls, timeout_seconds=120, retry=False) as client:
            made = await client.generate(PROMPT, seed=seed, references=references, format="raw")
        return [image.data for image in made]

    def log(self, process: str) -> str:
        return (self.suite.log_folder / f"{process}.log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LockedSuite]:
    folder = tmp_path_factory.mktemp("locked")
    authority = Authority(folder)
    pair = authority.issue(IDENTITY)
    files = {"CERTIFICATE": str(pair.certificate), "KEY": str(pair.key)}
    settings = {f"KLEIN_TLS_{name}": path for name, path in files.items()}
    settings |= {f"KLEIN_STAGE_TLS_{name}": path for name, path in files.items()}
    settings |= {
        "KLEIN_TLS_CLIENT_CA": str(authority.file),
        "KLEIN_TLS_CLIENT_NAMES": IDENTITY,
        "KLEIN_STAGE_TLS_CA": str(authority.file),
        "KLEIN_STAGE_TLS_NAME": IDENTITY,
        "KLEIN_TLS_RELOAD_SECONDS": "0.2",
    }
    options = SuiteOptions(device="cpu", threads=1, log_folder=folder / "logs", settings=settings)
    with one_thread(), Suite(options) as suite:
        suite.wait_until_ready(timeout_seconds=READY_SECONDS)
        own = authority.issue(IDENTITY)
        tls = Tls(ca=authority.file, certificate=own.certificate, key=own.key, server_name=IDENTITY)
        yield LockedSuite(suite, authority, pair, tls)


def test_images_over_mutual_tls_have_the_bytes_of_the_pipeline(locked: LockedSuite) -> None:
    pipeline = Pipeline.from_folder(WEIGHTS)
    reference = picture(128, 128, 5)
    for references in ((), (reference,)):
        (image,) = asyncio.run(locked.images(7, references))
        (expected,) = pipeline.generate(PROMPT, references=references, seeds=(7,))
        assert image == expected.numpy().tobytes()


def test_a_stage_refuses_callers_without_the_identity_of_the_suite(locked: LockedSuite) -> None:
    stranger = locked.authority.credentials(locked.authority.issue("notebook.example"))
    nameless = locked.authority.credentials()

    async def describe(process: str, credentials: object) -> grpc.aio.AioRpcError:
        address = f"127.0.0.1:{locked.suite.ports[process]}"
        async with open_channel(address, credentials=credentials, server_name=IDENTITY) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await StageServiceStub(channel).DescribeStage(DescribeStageRequest(), timeout=30)
        return refused.value

    for process in ("text-encoder", "denoiser", "vae-decoder"):
        details = explain(asyncio.run(describe(process, stranger)))
        assert (details.code, details.reason) == (grpc.StatusCode.PERMISSION_DENIED, "UNKNOWN_PEER")
        for credentials in (nameless, None):
            assert asyncio.run(describe(process, credentials)).code() is grpc.StatusCode.UNAVAILABLE


async def test_every_certificate_rotates_under_load_without_a_failed_request(locked: LockedSuite) -> None:
    first, rotations, done = await locked.images(3), 3, asyncio.Event()

    async def load() -> None:
        count = 0
        while not done.is_set() or count < 2:
            assert await locked.images(3) == first
            count += 1

    async def rotate() -> None:
        try:
            for rotation in range(rotations):
                newer = locked.authority.issue(IDENTITY)
                locked.pair.replaced_by(newer)
                for process, port in locked.suite.ports.items():
                    await until(partial(presents, port, newer), 60)
                    # The orchestrator has two: for clients and for stages.
                    count = (rotation + 1) * (2 if process == "orchestrator" else 1)
                    await until(partial(has_replaced, locked, process, count), 60)
        finally:
            done.set()

    async with asyncio.timeout(300):
        await asyncio.gather(load(), load(), rotate())


async def presents(port: int, pair: Pair) -> bool:
    """Returns whether a port presents a certificate."""
    presented = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
    return presented.split() == pair.certificate.read_text().split()


def has_replaced(locked: LockedSuite, process: str, count: int) -> bool:
    return locked.log(process).count("credentials were replaced") >= count
