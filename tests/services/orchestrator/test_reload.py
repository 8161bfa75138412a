"""SIGHUP: the orchestrator takes another routing table while requests run, or keeps the one that it has."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from prometheus_client import REGISTRY

from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_services.orchestrator.servicer import Orchestrator
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.runtime.name_resolution import DnsName
from klein_services.runtime.server import reload_signal, running_server
from klein_services.runtime.status import explain
from tests.services.fakes.fake_denoiser import FakeDenoiser
from tests.services.fakes.fake_stages import MODEL, FakeTextEncoder, FakeVaeDecoder
from tests.services.fakes.orchestrator_suite import generate
from tests.services.fakes.runtime_toy import failure, until


@dataclass
class TwoDenoisers:
    """An orchestrator with a table file, and two pools that its rows can name."""

    path: Path
    orchestrator: Orchestrator
    images: ImageServiceStub
    denoisers: dict[str, FakeDenoiser]
    targets: dict[str, str]

    def write(self, **rows: str) -> None:
        self.path.write_text(table_text(self.targets, rows))

    async def reloaded(self, outcome: str = "loaded") -> None:
        before = loads(outcome)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: loads(outcome) == before + 1)

    @property
    def channel_targets(self) -> set[str]:
        return {target for target, _ in self.orchestrator.generator.channels._channels}


def table_text(targets: dict[str, str], rows: dict[str, str]) -> str:
    text = f'default_model = "{next(iter(rows))}"\n'
    for name, denoiser in rows.items():
        text += f'[models.{name}]\ntext_encoder = "{targets["encoder"]}"\ndenoiser = "{targets[denoiser]}"\n'
        text += f'vae_decoder = "{targets["decoder"]}"\ndefault_size_px = 64\n'
        text += "".join(
            f'{stage}_model = "{MODEL}"\n' for stage in ("text_encoder", "denoiser", "vae_decoder")
        )
    return text


def loads(outcome: str) -> float:
    return REGISTRY.get_sample_value("klein_routing_table_loads_total", {"outcome": outcome}) or 0.0


@asynccontextmanager
async def two_denoisers(tmp_path: Path, **options: float):
    async with AsyncExitStack() as stack:
        denoisers = {"first": FakeDenoiser(), "second": FakeDenoiser()}
        stages = {"encoder": FakeTextEncoder(), "decoder": FakeVaeDecoder(), **denoisers}
        targets = {
            name: await stack.enter_async_context(running_server(stage)) for name, stage in stages.items()
        }
        path = tmp_path / "routing.toml"
        path.write_text(table_text(targets, {"fake": "first"}))
        settings = OrchestratorSettings(
            port=0,
            metrics_port=0,
            drain_delay_seconds=0,
            routing_table=str(path),
            stage_wait_seconds=0,
            **options,
        )
        orchestrator = Orchestrator(settings, settings.table())
        address = await stack.enter_async_context(running_server(orchestrator, settings))
        await stack.enter_async_context(reload_signal(orchestrator))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        yield TwoDenoisers(path, orchestrator, ImageServiceStub(channel), denoisers, targets)


async def test_running_requests_keep_their_route_and_new_ones_take_the_other(tmp_path):
    async with two_denoisers(tmp_path) as suite:
        first, second = suite.denoisers["first"], suite.denoisers["second"]
        first.step_gate = asyncio.Event()
        running = asyncio.create_task(generate(suite, prompt="fox", seed=1))
        await until(lambda: first.calls == 1)
        suite.write(fake="second")
        await suite.reloaded()
        await generate(suite, prompt="hen", seed=2)
        assert (first.calls, second.calls) == (1, 1)
        assert suite.targets["first"] in suite.channel_targets
        first.step_gate.set()
        assert len((await running).images) == 1
        await until(lambda: suite.targets["first"] not in suite.channel_targets)
        assert suite.targets["second"] in suite.channel_targets


async def test_no_request_is_lost_while_the_table_changes_again_and_again(tmp_path):
    async with two_denoisers(tmp_path) as suite:
        is_over = False
        made = 0

        async def client(number: int) -> None:
            nonlocal made
            while not is_over:
                assert len((await generate(suite, prompt=f"fox {number}", seed=made)).images) == 1
                made += 1

        clients = [asyncio.create_task(client(number)) for number in range(4)]
        for name in ("second", "first") * 6:
            suite.write(fake=name)
            await suite.reloaded()
            so_far = made
            await until(lambda so_far=so_far: made > so_far + 4)
        is_over = True
        await asyncio.gather(*clients)
        assert all(denoiser.calls > 5 for denoiser in suite.denoisers.values())


async def test_models_come_and_go(tmp_path):
    async with two_denoisers(tmp_path) as suite:
        suite.write(fake="first", other="second")
        await suite.reloaded()
        await generate(suite, prompt="fox", seed=1, model="other")
        assert suite.denoisers["second"].calls == 1
        suite.write(other="second")
        await suite.reloaded()
        details = explain(await failure(generate(suite, prompt="fox", seed=1, model="fake")))
        assert details.code is grpc.StatusCode.NOT_FOUND
        assert "known: other" in details.message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "models is missing"),
        ("[models.a\n", "is not TOML"),
        ('[models.a]\ndenoiser = "d:1"\n', "models.a.text_encoder is missing"),
        (None, "cannot be read"),
    ],
)
async def test_a_broken_table_changes_nothing_and_is_logged(tmp_path, caplog, text, named):
    async with two_denoisers(tmp_path) as suite:
        if text is None:
            suite.path.unlink()
        else:
            suite.path.write_text(text)
        with caplog.at_level(logging.ERROR, "klein.orchestrator"):
            await suite.reloaded("refused")
        assert any(named in record.getMessage() for record in caplog.records)
        await generate(suite, prompt="fox", seed=1)
        assert suite.denoisers["first"].calls == 1


async def test_a_table_that_the_other_settings_do_not_allow_is_refused(tmp_path, caplog):
    async with two_denoisers(tmp_path) as suite:
        suite.orchestrator._settings.__dict__["maximum_image_count"] = 64
        suite.write(fake="second")
        await suite.reloaded("refused")
        assert "KLEIN_MAXIMUM_IMAGE_COUNT" in caplog.text
        assert suite.orchestrator.generator.table.route("fake").denoiser.target == suite.targets["first"]


async def test_without_a_table_file_the_signal_keeps_its_usual_effect():
    settings = OrchestratorSettings(port=0, metrics_port=0)
    before = signal.getsignal(signal.SIGHUP)
    async with reload_signal(Orchestrator(settings, settings.table())):
        assert signal.getsignal(signal.SIGHUP) is before


async def test_requests_in_progress_survive_a_change_of_addresses(tmp_path, monkeypatch):
    answers = [frozenset({"127.0.0.1"})]

    async def addresses(self):
        return answers[0]

    monkeypatch.setattr(DnsName, "addresses", addresses)
    async with two_denoisers(tmp_path, dns_interval_seconds=0.02) as suite:
        first, channels = suite.denoisers["first"], suite.orchestrator.generator.channels
        suite.targets = {
            name: f"dns:///localhost:{target.rpartition(':')[2]}" for name, target in suite.targets.items()
        }
        suite.write(fake="first")
        await suite.reloaded()
        first.step_gate = asyncio.Event()
        running = [asyncio.create_task(generate(suite, prompt=f"fox {seed}", seed=seed)) for seed in range(4)]
        await until(lambda: first.calls == 4)
        address = suite.orchestrator.generator.table.route("fake").denoiser
        before = channels.serving(address)
        answers[0] = frozenset({"127.0.0.1", "127.0.0.2"})
        await until(lambda: channels.serving(address) is not before)
        first.step_gate.set()
        assert [len(response.images) for response in await asyncio.gather(*running)] == [1] * 4
        assert first.calls == 4, "a call that was cancelled would have been made again"
        await until(lambda: before.get_state() is grpc.ChannelConnectivity.SHUTDOWN)
