"""Channels to stages follow the files of TLS: new calls use new credentials, running calls end on the old ones."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from klein_services.orchestrator.routing import TEXT_ENCODER as STAGE
from klein_services.orchestrator.routing import StageAddress
from klein_services.orchestrator.servicer import Orchestrator
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.orchestrator.stage_channels import Channels
from klein_services.runtime.pem import PemFiles
from klein_services.runtime.server import running_server
from klein_services.runtime.settings import ServerSettings, SettingsError
from klein_services.runtime.tls import CLIENT, CredentialStore
from tests.services.fakes.certificates import Authority
from tests.services.fakes.runtime_toy import call, until


async def test_new_calls_present_the_new_certificate_and_running_ones_end(toy, tmp_path):
    authority = Authority(tmp_path)
    served, own = authority.issue("127.0.0.1"), authority.issue("first.example")
    presented, may_end = [], asyncio.Event()

    async def behave(request, context):
        presented.append(context.auth_context()["x509_subject_alternative_name"][0].decode())
        yield b"begun"
        if request == b"slow":
            await may_end.wait()
        yield b"ended"

    toy.behavior = behave
    settings = ServerSettings(
        drain_delay_seconds=0,
        grace_seconds=5,
        metrics_port=0,
        tls_certificate=str(served.certificate),
        tls_key=str(served.key),
        tls_client_ca=str(authority.file),
    )
    files = PemFiles(str(own.certificate), str(own.key), str(authority.file), ("certificate", "key", "ca"))
    store = CredentialStore(files, "orchestrator", CLIENT, 0.05)
    channels = Channels(store)
    store.start()
    try:
        async with running_server(toy, settings) as address:
            stage = StageAddress(STAGE, address, "toy")
            channel = channels.any(stage)
            slow = channel.unary_stream("/toy.Toy/unary_stream")(b"slow")
            channels.called(channel, slow)
            await until(lambda: presented == ["first.example"])
            before = store.current
            own.replaced_by(authority.issue("second.example"))
            await until(lambda: store.current is not before, 60)
            assert await call(channels.any(stage), "unary_unary") == b"begunended"
            assert presented == ["first.example", "second.example"]
            assert channels.any(stage) is channels.any(stage)
            assert not slow.done()
            may_end.set()
            assert b"".join([part async for part in slow]) == b"begunended"
            await until(lambda: channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN)
    finally:
        store.stop()
        await channels.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_tls_ca": "/nowhere"}, "KLEIN_STAGE_TLS_CA: /nowhere cannot be read"),
        ({"stage_tls_name": "stage.example"}, "need KLEIN_STAGE_TLS_CA"),
        ({"stage_tls_key": "/dev/null"}, "KLEIN_STAGE_TLS_KEY is set without KLEIN_STAGE_TLS_CERTIFICATE"),
    ],
)
def test_an_orchestrator_does_not_start_with_tls_that_would_not_work(changes, message):
    settings = replace(OrchestratorSettings(), **changes)
    assert any(message in problem for problem in settings.problems())
    with pytest.raises(SettingsError, match=message):
        Orchestrator(settings, settings.table())
