"""Watchdog: work that does not end makes a stage NOT_SERVING and ends its process; slow work does not."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from klein_api.v1 import text_encoder_service_pb2 as text_pb2
from klein_api.v1.text_encoder_service_pb2_grpc import TextEncoderServiceStub
from klein_api.v1.vae_decoder_service_pb2_grpc import VaeDecoderServiceStub
from klein_core.text_encoder.encoder import TextEncoder
from klein_core.vae_decoder.decoder import VaeDecoder
from klein_services.runtime import watchdog as module
from klein_services.runtime.channels import open_channel
from klein_services.runtime.server import running_server
from klein_services.runtime.watchdog import EXPECTED_FACTOR, UNMEASURED_FACTOR, Watchdog, WorkTimes, watched
from klein_services.text_encoder.servicer import TextEncoderStage
from klein_services.text_encoder.settings import TextEncoderSettings
from tests.services.fakes import vae_decoder_calls as vae
from tests.services.fakes.denoiser_server import (
    denoise,
    gated_steps,
    request,
    running_denoiser,
    save_checkpoint,
    spec,
)
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.simulated_device import metric
from tests.services.runtime.test_process import process

SCRIPT = """
import ctypes, logging, os, sys, time
from klein_services.runtime.entry import EntryPoint
from klein_services.runtime.stage_settings import StageSettings
from klein_services.runtime.watchdog import watched
from tests.services.fakes.runtime_toy import Toy

def work(kind, seconds):
    logging.getLogger("klein.toy").info("work began")
    with watched("toy work", 1):
        if kind == "sleep":
            time.sleep(float(seconds))
        else:
            # PyDLL keeps the interpreter's lock, so that no thread of Python runs meanwhile.
            ctypes.PyDLL(None).sleep(int(seconds))

def make(settings):
    toy = Toy()

    async def behave(request, context):
        await toy.worker.run(lambda: work(*request.decode().split()))
        yield b"done"

    toy.behavior = behave
    return toy

sys.exit(EntryPoint(StageSettings, make).main(os.environ, {}))
"""


@pytest.fixture
def channel(free_port):
    with grpc.insecure_channel(f"127.0.0.1:{free_port}") as opened:
        yield opened


def work(channel, kind: str, seconds: float):
    """Begins a call whose work takes so long."""
    multicallable = channel.unary_unary("/toy.Toy/unary_unary")
    return multicallable.future(f"{kind} {seconds:g}".encode(), wait_for_ready=True)


def test_work_that_hangs_makes_the_stage_not_serving_and_ends_it(free_port, channel):
    with process(free_port, script=SCRIPT, watchdog_seconds=1) as server:
        server.log_until("serving")
        assert work(channel, "sleep", 0).result() == b"done"
        hung = work(channel, "sleep", 3600)
        line = server.log_until(
            "toy work hangs: it runs for 1 s, and 1 s are its limit (KLEIN_WATCHDOG_SECONDS); "
            "this process ends so that it is replaced"
        )
        assert any("time.sleep" in frame or "in work" in frame for frame in line["stack"])
        health = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service="klein_api.v1.TextEncoderService")
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        deadline = time.monotonic() + 2
        while health.Check(asked).status != not_serving:
            assert time.monotonic() < deadline
        with pytest.raises(grpc.RpcError) as lost:
            hung.result()
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.end()[0] == 1


def test_work_that_keeps_the_interpreters_lock_ends_the_process_with_its_stack(free_port, channel):
    with process(free_port, script=SCRIPT, watchdog_seconds=1) as server:
        server.log_until("serving")
        lost = work(channel, "locked", 3600)
        server.log_until("work began")
        code, log = server.end(60)
        with pytest.raises(grpc.RpcError):
            lost.result(60)
    assert code == 1
    assert "Timeout" in log
    assert "in work" in log


def test_time_in_which_the_process_is_stopped_does_not_count(free_port, channel):
    with process(free_port, script=SCRIPT, watchdog_seconds=1.5) as server:
        server.log_until("serving")
        assert work(channel, "sleep", 0).result() == b"done"
        running = work(channel, "sleep", 1)
        server.log_until("work began")
        server.popen.send_signal(signal.SIGSTOP)
        # Longer than the limit of the work, shorter than the time after which a still process ends.
        time.sleep(3)
        server.popen.send_signal(signal.SIGCONT)
        assert running.result(20) == b"done"
        assert work(channel, "sleep", 0).result() == b"done"


def test_a_watchdog_that_is_off_lets_work_hang(free_port, channel):
    with process(free_port, script=SCRIPT, watchdog_seconds=0) as server:
        server.log_until("serving")
        assert work(channel, "sleep", 0).result() == b"done"
        assert work(channel, "sleep", 2).result(20) == b"done"


class TestWorkTimes:
    def test_nothing_is_expected_before_a_measurement(self):
        assert WorkTimes().expected("decode", 1000) is None

    def test_smaller_work_may_take_as_long_and_larger_work_grows_with_the_square(self):
        times = WorkTimes()
        times.observe("decode", 1024, 0.5)
        assert times.expected("decode", 1024) == 0.5
        assert times.expected("decode", 1) == 0.5
        assert times.expected("decode", 4096) == pytest.approx(0.5 * 16)
        assert times.expected("encode", 1024) is None

    def test_the_nearest_larger_measurement_counts(self):
        times = WorkTimes()
        for size, seconds in ((64, 0.1), (1024, 1.0), (4096, 9.0)):
            times.observe("decode", size, seconds)
        assert times.expected("decode", 900) == 1.0
        assert times.expected("decode", 3000) == 9.0


def test_limits_follow_measured_times_and_unknown_work_gets_the_long_one():
    watchdog = Watchdog("toy", 30, lambda: None, lambda: None)
    assert (
        watchdog.limit_seconds("decode", 10) == watchdog.limit_seconds("decode", 0) == 30 * UNMEASURED_FACTOR
    )
    with watchdog.work("decode", 64):
        pass
    assert watchdog.limit_seconds("decode", 64) == 30
    watchdog._times.observe("slow", 64, 7.0)
    assert watchdog.limit_seconds("slow", 64) == EXPECTED_FACTOR * 7.0


def test_work_that_fails_is_not_measured():
    watchdog = Watchdog("toy", 30, lambda: None, lambda: None)
    with pytest.raises(ZeroDivisionError), watchdog.work("decode", 64):
        raise ZeroDivisionError
    assert watchdog.limit_seconds("decode", 64) == 30 * UNMEASURED_FACTOR


@contextmanager
def watching(monkeypatch) -> Iterator[threading.Event]:
    """Watches this process with a limit of a second; the event is set when work hangs."""
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.0)
    # pytest has a use of its own for faulthandler's timer.
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    hung, ended = threading.Event(), threading.Event()
    watchdog = Watchdog("toy", 1.0, hung.set, ended.set)
    watchdog.start()
    try:
        yield ended
        assert hung.is_set()
    finally:
        watchdog.stop()


class Hang:
    """Device function that stops at its second call, until the block ends."""

    def __init__(self, function) -> None:
        self._function = function
        self.calls = 0
        self.gate = threading.Event()

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.calls > 1:
            assert self.gate.wait(60)
        return self._function(*arguments, **options)


async def ends_after(ended: threading.Event, hang: Hang, call) -> None:
    """Waits until a call's work counts as hung, lets it go on and waits for its end."""
    before = metric("klein_watchdog_hangs_total", stage="toy")
    running = asyncio.create_task(call)
    await until(lambda: ended.is_set(), 30)
    hang.gate.set()
    await running
    assert metric("klein_watchdog_hangs_total", stage="toy") == before + 1


async def test_the_text_encoder_is_watched(tiny_checkpoint, monkeypatch):
    hang = Hang(TextEncoder.encode)
    monkeypatch.setattr(TextEncoder, "encode", lambda *arguments: hang(*arguments))
    settings = TextEncoderSettings(model_path=str(tiny_checkpoint), model_name="tiny", device="cpu")
    async with running_server(TextEncoderStage(settings)) as address, open_channel(address) as opened:
        hang.calls = 0  # without those of the warm-up

        async def encode() -> None:
            asked = text_pb2.EncodePromptRequest(prompt="fox")
            assert [response async for response in TextEncoderServiceStub(opened).EncodePrompt(asked)]

        with watching(monkeypatch) as ended:
            await encode()
            await ends_after(ended, hang, encode())


@pytest.mark.parametrize("operation", ["encode", "decode"])
async def test_the_vae_decoder_is_watched(tiny_checkpoint, monkeypatch, operation):
    method = {"encode": "encode", "decode": "decode_batch"}[operation]
    hang = Hang(getattr(VaeDecoder, method))
    monkeypatch.setattr(VaeDecoder, method, lambda *arguments: hang(*arguments))
    application = vae.tiny_application(tiny_checkpoint, receive_timeout_seconds=30.0)
    async with running_server(application) as address, open_channel(address) as opened:
        hang.calls = 0
        stub = VaeDecoderServiceStub(opened)

        async def call() -> None:
            if operation == "encode":
                await vae.encode_reference(stub, vae.reference_parts(vae.picture()))
            else:
                await vae.decode(stub, vae.decode_parts(vae.latents()))

        with watching(monkeypatch) as ended:
            await call()
            await ends_after(ended, hang, call())


async def test_the_denoisers_steps_are_watched(tmp_path, monkeypatch):
    with gated_steps(monkeypatch) as gate:
        async with running_denoiser(save_checkpoint(tmp_path, distilled=True)) as opened:
            with watching(monkeypatch) as ended:
                await denoise(opened, request(spec()))
                gate.hold()
                running = asyncio.create_task(denoise(opened, request(spec())))
                await until(lambda: ended.is_set(), 30)
                gate.release()
                await running


def test_without_a_watchdog_nothing_is_measured():
    with watched("decode", 64):
        pass
    assert module._current is None
