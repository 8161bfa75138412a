"""A server as a process: signals, ports and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import asyncio, logging, sys, time
from klein_core.errors import DeviceFault
from klein_services.runtime.entry import EntryPoint
from klein_services.runtime.settings import ServerSettings
from tests.services.fakes.runtime_toy import Toy

async def behave(request, context):
    if request == b"fault":
        raise DeviceFault("the context is lost")
    logging.getLogger("klein.toy").info("call began")
    await asyncio.sleep(float(request))
    yield b"done"

class SlowToLoad(Toy):
    async def load(self):
        await self.worker.run(lambda: time.sleep(float(sys.argv[1])))
        await super().load()

def make(settings):
    toy = SlowToLoad()
    toy.behavior = behave
    return toy

import os
sys.exit(EntryPoint(ServerSettings, make).main(os.environ, {}))
"""


class Process:
    def __init__(self, popen, port):
        self.popen = popen
        self.port = port

    def log_until(self, message, seconds=20):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            line = self.popen.stderr.readline()
            if not line:
                break
            parsed = json.loads(line)
            if parsed["message"] == message:
                return parsed
        raise AssertionError(f"the process never said {message!r}")

    def end(self, seconds=20):
        rest = self.popen.communicate(timeout=seconds)[1]
        return self.popen.returncode, rest


@contextmanager
def process(port, load_seconds=0.0, script=SCRIPT, **settings):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "protos", ROOT / "services"))),
        "KLEIN_PORT": str(port),
        "KLEIN_METRICS_PORT": "0",
        "KLEIN_DRAIN_DELAY_SECONDS": "0",
        **{f"KLEIN_{name.upper()}": str(value) for name, value in settings.items()},
    }
    command = [sys.executable, "-c", script, str(load_seconds)]
    popen = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield Process(popen, port)
    finally:
        popen.kill()
        popen.communicate()


@pytest.fixture
def channel(free_port):
    with grpc.insecure_channel(f"127.0.0.1:{free_port}") as opened:
        yield opened


def started_call(server, channel, request):
    """Begins a call, and waits until the server runs it."""
    call = channel.unary_unary("/toy.Toy/unary_unary").future(request, wait_for_ready=True)
    server.log_until("call began")
    return call


def test_sigterm_lets_a_call_finish_refuses_new_ones_and_exits_0(free_port, channel):
    with process(free_port) as server:
        server.log_until("serving")
        running = started_call(server, channel, b"1.0")
        server.popen.send_signal(signal.SIGTERM)
        server.log_until("draining")
        time.sleep(0.2)
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/toy.Toy/unary_unary")(b"0")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert running.result() == b"done"
        assert server.end()[0] == 0


def test_sigterm_while_loading_exits_0_without_waiting_for_the_load(free_port):
    with process(free_port, load_seconds=600) as server:
        server.log_until("listening")
        server.popen.send_signal(signal.SIGTERM)
        code, log = server.end(30)
        assert code == 0
        assert '"serving"' not in log


def test_health_answers_over_the_wire_while_the_model_loads(free_port, channel):
    with process(free_port, load_seconds=30) as server:
        server.log_until("listening")
        stub = health_pb2_grpc.HealthStub(channel)
        status = health_pb2.HealthCheckResponse
        assert stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True).status == status.SERVING
        ready = health_pb2.HealthCheckRequest(service="klein_api.v1.TextEncoderService")
        assert stub.Check(ready).status == status.NOT_SERVING


def test_a_second_signal_does_not_wait_for_running_calls(free_port, channel):
    with process(free_port) as server:
        server.log_until("serving")
        running = started_call(server, channel, b"30")
        server.popen.send_signal(signal.SIGINT)
        server.log_until("draining")
        server.popen.send_signal(signal.SIGINT)
        assert server.end(10)[0] == 0
        with pytest.raises(grpc.RpcError):
            running.result()


def test_a_taken_port_is_one_clear_line_and_exit_code_1(free_port):
    with process(free_port) as first:
        first.log_until("serving")
        with process(free_port) as second:
            code, log = second.end()
    (line,) = log.splitlines()
    assert code == 1
    assert f":{free_port}" in json.loads(line)["message"]
    assert "KLEIN_PORT" in json.loads(line)["message"]


def test_a_taken_metrics_port_is_told_too(free_port):
    with process(0, metrics_port=free_port) as first:
        first.log_until("serving")
        page = urllib.request.urlopen(f"http://127.0.0.1:{free_port}/metrics").read().decode()
        assert 'klein_serving{stage="text-encoder"} 1.0' in page
        with process(0, metrics_port=free_port) as second:
            code, log = second.end()
    assert code == 1
    assert "KLEIN_METRICS_PORT" in log


def fetched(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_healthz_is_200_only_while_the_server_serves(free_port):
    with process(0, load_seconds=600, metrics_port=free_port) as loading:
        loading.log_until("listening")
        assert fetched(free_port, "/healthz")[0] == 503
        assert fetched(free_port, "/metrics")[0] == 200
    with process(0, metrics_port=free_port, drain_delay_seconds=600) as server:
        server.log_until("serving")
        assert fetched(free_port, "/healthz") == (200, "serving\n")
        server.popen.send_signal(signal.SIGTERM)
        server.log_until("draining")
        assert fetched(free_port, "/healthz") == (503, "not serving\n")


def test_other_paths_of_the_metrics_port_are_404(free_port):
    with process(0, metrics_port=free_port) as server:
        server.log_until("serving")
        for path in ("/", "/favicon.ico", "/metrics/", "/healthz/live"):
            status, text = fetched(free_port, path)
            assert (status, text) == (404, "not found; there are /metrics and /healthz\n")


def test_a_bad_setting_is_one_sentence_and_exit_code_2(free_port):
    with process(free_port, queue_limit="none") as server:
        code, log = server.end()
    assert code == 2
    assert log == "KLEIN_QUEUE_LIMIT is 'none'; it must be a whole number\n"


def test_all_bad_settings_are_reported_at_once(free_port):
    with process(free_port, queue_limit="none", log_level="loud") as server:
        code, log = server.end()
    assert code == 2
    assert [line.split()[0] for line in log.splitlines()] == ["KLEIN_LOG_LEVEL", "KLEIN_QUEUE_LIMIT"]


def test_a_lost_device_drains_the_process_and_exits_1(free_port, channel):
    with process(free_port) as server:
        server.log_until("serving")
        with pytest.raises(grpc.RpcError) as lost:
            channel.unary_unary("/toy.Toy/unary_unary")(b"fault")
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.end()[0] == 1
