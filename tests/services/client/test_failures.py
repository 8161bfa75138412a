"""Both clients with servers that fail, hang, vanish or are something else, and with users in a hurry."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest

from klein_api.v1 import image_service_pb2 as api
from klein_client import (
    AsyncClient,
    Cancelled,
    Client,
    DeadlineExceeded,
    FailedPrecondition,
    Image,
    InternalError,
    InvalidRequest,
    KleinError,
    NotFound,
    Overloaded,
    PermissionDenied,
    Queued,
    Step,
    Summary,
    Unauthenticated,
    Unavailable,
    UnusableClient,
    WrongServer,
)
from klein_core.errors import InvalidInput
from klein_core.errors import Violation as ServerViolation
from klein_services.cli.ports import ReservedPort
from klein_services.cli.process import inherited_environment
from klein_services.runtime import errors as server
from klein_services.runtime.status import status_of
from tests.services.fakes.answering_orchestrator import Orchestrator, serving


@pytest.fixture
def orchestrator() -> Orchestrator:
    return Orchestrator()


@pytest.fixture
def target(orchestrator: Orchestrator) -> Iterator[str]:
    with serving(orchestrator) as address:
        yield address


def failure_of(call: Callable[[], object]) -> KleinError:
    with pytest.raises(KleinError) as failure:
        call()
    return failure.value


@pytest.mark.parametrize(
    ("error", "kind", "facts"),
    [
        (
            InvalidInput(
                [ServerViolation("width_px", "is 70"), ServerViolation("references[1]", "is empty")]
            ),
            InvalidRequest,
            {"text": "width is 70; references[1] is empty", "reason": ""},
        ),
        (server.UnknownModel("model", "nono", ["pico"]), NotFound, {"reason": "UNKNOWN_MODEL"}),
        (server.UnusableAdapter("adapters[0].name", "ink", "x"), FailedPrecondition, {}),
        (server.QueueFull(3, 4.5), Overloaded, {"reason": "QUEUE_FULL", "retry_after_seconds": 4.5}),
        (server.Unauthenticated(), Unauthenticated, {}),
        (
            server.ContentDenied("request", "WORD", "no"),
            PermissionDenied,
            {"reason": "CONTENT_DENIED", "metadata": {"subject": "request", "reason_code": "WORD"}},
        ),
        (server.StagesLost("the denoiser is gone"), Unavailable, {"text": "the denoiser is gone"}),
        (server.DeadlinePassed("too late"), DeadlineExceeded, {"reason": "DEADLINE_PASSED"}),
    ],
)
async def test_a_status_becomes_an_error_of_its_kind(
    orchestrator: Orchestrator, target: str, error: Exception, kind: type[KleinError], facts: dict
) -> None:
    orchestrator.error = error
    with Client(target, retry=False) as client:
        one = failure_of(lambda: client.generate("a star"))
    async with AsyncClient(target, retry=False) as client:
        with pytest.raises(KleinError) as other:
            await client.generate("a star")
    for failure in (one, other.value):
        assert type(failure) is kind
        assert failure.code is status_of(error).code
        for name, value in facts.items():
            assert (str(failure) if name == "text" else getattr(failure, name)) == value


def test_a_fault_of_the_server_has_an_id_and_no_secret(orchestrator: Orchestrator, target: str) -> None:
    orchestrator.error = ZeroDivisionError("secret")
    with Client(target) as client:
        failure = failure_of(lambda: client.generate("a star"))
    assert isinstance(failure, InternalError)
    assert failure.error_id
    assert failure.error_id in str(failure)
    assert "secret" not in str(failure)


class Flaky(Orchestrator):
    """Ends its first streams in the middle or refuses them, and remembers keys and times."""

    def __init__(self, breaks: int = 0, refusals: int = 0) -> None:
        super().__init__()
        self.breaks, self.refusals = breaks, refusals
        self.keys: list[str] = []
        self.times: list[float] = []

    def StreamGenerateImage(self, request, context):
        self.times.append(time.monotonic())
        self.keys.append(dict(context.invocation_metadata()).get("idempotency-key", ""))
        if self.refusals:
            self.refusals -= 1
            status = status_of(server.QueueFull(1, 0.2))
            context.set_trailing_metadata(status.trailing_metadata())
            context.abort(status.code, status.message)
        for event in super().StreamGenerateImage(request, context):
            yield event
            if event.HasField("image") and self.breaks:
                self.breaks -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "as the test wants it")


@pytest.mark.parametrize("options", [{}, {"seed": 7}, {"idempotency_key": "mine"}])
async def test_a_broken_stream_goes_on_with_the_same_key_and_seed(options: dict) -> None:
    for is_async in (False, True):
        flaky = Flaky(breaks=2)
        with serving(flaky) as target:
            if is_async:
                async with AsyncClient(target) as client:
                    events = [event async for event in client.stream("a star", count=2, **options)]
            else:
                with Client(target) as client:
                    events = list(client.stream("a star", count=2, **options))
        assert len(set(flaky.keys)) == 1
        assert flaky.keys[0] == options.get("idempotency_key", flaky.keys[0]) != ""
        assert len({spec.SerializeToString() for spec in flaky.specs}) == 1
        assert flaky.specs[0].HasField("seed")
        assert len(flaky.specs) == 3
        assert [event.index for event in events if isinstance(event, Image)] == [0, 1]
        assert isinstance(events[-1], Summary)


def test_an_own_key_gives_the_same_request_in_another_process(
    orchestrator: Orchestrator, target: str
) -> None:
    for _ in range(2):
        with Client(target) as client:
            client.generate("a star", idempotency_key="job-17")
            client.generate("a star")
    first, other, again, another = (spec.seed for spec in orchestrator.specs)
    assert first == again
    assert len({first, other, another}) == 3


def test_attempts_end_with_the_policy() -> None:
    flaky = Flaky(breaks=100)
    with serving(flaky) as target, Client(target) as client:
        assert isinstance(failure_of(lambda: client.generate("a star")), Unavailable)
        assert len(flaky.specs) == 4


def test_without_retry_nothing_is_repeated_or_chosen() -> None:
    flaky = Flaky(breaks=1)
    with serving(flaky) as target, Client(target, retry=False) as client:
        failure_of(lambda: client.generate("a star"))
    assert flaky.keys == [""]
    assert not flaky.specs[0].HasField("seed")


async def test_an_overloaded_server_is_asked_again_when_it_wants() -> None:
    for is_async in (False, True):
        flaky = Flaky(refusals=2)
        with serving(flaky) as target:
            if is_async:
                async with AsyncClient(target) as client:
                    await client.generate("a star")
            else:
                with Client(target) as client:
                    client.generate("a star")
        assert [late - early >= 0.2 for early, late in zip(flaky.times, flaky.times[1:], strict=False)] == [
            True,
            True,
        ]


def test_an_overloaded_server_is_not_waited_for_beyond_the_deadline() -> None:
    flaky = Flaky(refusals=100)
    with serving(flaky) as target, Client(target) as client:
        failure = failure_of(lambda: client.generate("a star", timeout_seconds=0.15))
    assert isinstance(failure, Overloaded)
    assert failure.retry_after_seconds == 0.2
    assert len(flaky.times) == 1


async def test_a_server_that_hangs_is_left_at_the_deadline(orchestrator: Orchestrator, target: str) -> None:
    orchestrator.blocks = True
    with Client(target) as client:
        assert isinstance(failure_of(lambda: client.generate("a", timeout_seconds=0.3)), DeadlineExceeded)
    assert orchestrator.cancelled.wait(30)
    orchestrator.cancelled.clear()
    async with AsyncClient(target, timeout_seconds=0.3) as client:
        with pytest.raises(DeadlineExceeded, match="longer than its timeout"):
            await client.generate("a")


def test_nothing_at_the_address_is_unavailable_at_once() -> None:
    with ReservedPort() as reserved, Client(f"127.0.0.1:{reserved.port}") as client:
        failure = failure_of(lambda: client.generate("a star"))
        assert isinstance(failure, Unavailable)
        assert f"no klein orchestrator answers at 127.0.0.1:{reserved.port}" in str(failure)
        assert isinstance(failure_of(client.status), Unavailable)


@contextmanager
def silent_port() -> Iterator[str]:
    """Yields the address of a socket that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_port_that_accepts_and_is_silent_ends_at_the_deadline() -> None:
    with silent_port() as target, Client(target) as client:
        assert isinstance(failure_of(lambda: client.generate("a", timeout_seconds=0.5)), KleinError)
        assert isinstance(failure_of(lambda: client.status(timeout_seconds=0.5)), KleinError)


class Web(BaseHTTPRequestHandler):
    """An HTTP server, as at a wrong port."""

    def do_GET(self) -> None:
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


def test_an_http_server_is_no_orchestrator() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as web:
        threading.Thread(target=web.serve_forever).start()
        with Client(f"127.0.0.1:{web.server_port}") as client:
            failure = failure_of(lambda: client.generate("a star", timeout_seconds=10))
        web.shutdown()
    assert isinstance(failure, Unavailable | DeadlineExceeded)


def test_another_grpc_server_is_named() -> None:
    server_of_nothing = grpc.server(ThreadPoolExecutor(1))
    port = server_of_nothing.add_insecure_port("127.0.0.1:0")
    server_of_nothing.start()
    try:
        with Client(f"127.0.0.1:{port}") as client:
            failure = failure_of(lambda: client.generate("a star"))
    finally:
        server_of_nothing.stop(0).wait()
    assert isinstance(failure, WrongServer)
    assert f"127.0.0.1:{port} is not a klein orchestrator" in str(failure)


class Truncated(Orchestrator):
    """Ends streams without a summary."""

    def StreamGenerateImage(self, request, context):
        yield api.StreamGenerateImageResponse(queued=api.GenerationQueued())


def test_a_stream_without_its_end_is_an_error() -> None:
    with serving(Truncated()) as target, Client(target) as client:
        failure = failure_of(lambda: client.generate("a star"))
    assert "without a summary" in str(failure)


class Endless(Orchestrator):
    """Streams steps until its client goes."""

    def StreamGenerateImage(self, request, context):
        context.add_callback(self.cancelled.set)
        while context.is_active():
            yield api.StreamGenerateImageResponse(step=api.GenerationStep(step=1, step_count=2))
            time.sleep(0.01)


@pytest.fixture
def endless() -> Iterator[tuple[Endless, str]]:
    orchestrator = Endless()
    with serving(orchestrator) as target:
        yield orchestrator, target


def test_leaving_the_loop_or_the_block_cancels_the_request(endless: tuple[Endless, str]) -> None:
    orchestrator, target = endless
    with Client(target) as client:
        for event in client.stream("a star"):
            assert isinstance(event, Step)
            break
        gc.collect()
        assert orchestrator.cancelled.wait(30)
        orchestrator.cancelled.clear()
        with client.stream("a star") as events:
            next(events)
        assert orchestrator.cancelled.wait(30)
        with pytest.raises(StopIteration):
            next(events)
        events.close()


async def test_leaving_an_async_loop_or_block_cancels_the_request(endless: tuple[Endless, str]) -> None:
    orchestrator, target = endless
    async with AsyncClient(target) as client:
        async for _ in client.stream("a star"):
            break
        gc.collect()
        assert await asyncio.to_thread(orchestrator.cancelled.wait, 30)
        orchestrator.cancelled.clear()
        async with client.stream("a star") as events:
            await anext(events)
        assert await asyncio.to_thread(orchestrator.cancelled.wait, 30)
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        await events.aclose()


def test_another_thread_closes_a_stream(orchestrator: Orchestrator, target: str) -> None:
    orchestrator.blocks = True
    with Client(target) as client:
        events = client.stream("a star")
        closer = threading.Thread(target=lambda: (orchestrator.called.wait(30), events.close()))
        closer.start()
        assert isinstance(failure_of(lambda: next(events)), Cancelled)
        closer.join()
        assert orchestrator.cancelled.wait(30)


async def test_another_task_closes_a_stream(orchestrator: Orchestrator, target: str) -> None:
    orchestrator.blocks = True
    async with AsyncClient(target) as client:
        events = client.stream("a star")
        reader = asyncio.ensure_future(anext(events))
        assert await asyncio.to_thread(orchestrator.called.wait, 30)
        await events.aclose()
        with pytest.raises(Cancelled):
            await reader
    assert await asyncio.to_thread(orchestrator.cancelled.wait, 30)


async def test_a_cancelled_task_cancels_its_request(orchestrator: Orchestrator, target: str) -> None:
    orchestrator.blocks = True
    async with AsyncClient(target) as client:
        task = asyncio.create_task(client.generate("a star"))
        assert await asyncio.to_thread(orchestrator.called.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(orchestrator.cancelled.wait, 30)


async def test_a_closed_client_cannot_be_used_and_may_be_closed_again(
    orchestrator: Orchestrator, target: str
) -> None:
    client = Client(target)
    client.generate("a star")
    client.close()
    client.close()
    for call in (lambda: client.generate("a star"), client.status, client.models):
        assert isinstance(failure_of(call), UnusableClient)
    never_used = Client(target)
    never_used.close()
    asynchronous = AsyncClient(target)
    await asynchronous.status()
    await asynchronous.aclose()
    await asynchronous.aclose()
    with pytest.raises(UnusableClient, match="closed"):
        await asynchronous.generate("a star")


async def test_closing_a_client_ends_its_calls(orchestrator: Orchestrator, target: str) -> None:
    orchestrator.blocks = True
    client = Client(target)
    closer = threading.Thread(target=lambda: (orchestrator.called.wait(30), client.close()))
    closer.start()
    with pytest.raises(Cancelled):
        await asyncio.to_thread(client.generate, "a star")
    closer.join()
    orchestrator.called.clear()
    orchestrator.cancelled.clear()
    asynchronous = AsyncClient(target)
    running = asyncio.create_task(asynchronous.generate("a star"))
    assert await asyncio.to_thread(orchestrator.called.wait, 30)
    await asynchronous.aclose()
    with pytest.raises(Cancelled):
        await running


def test_an_async_client_belongs_to_one_event_loop(target: str) -> None:
    client = AsyncClient(target)
    asyncio.run(client.generate("a star"))
    with pytest.raises(UnusableClient, match="another event loop"):
        asyncio.run(client.generate("a star"))


def test_many_threads_share_a_client(orchestrator: Orchestrator, target: str) -> None:
    results: list[int] = []
    with Client(target) as client:
        threads = [
            threading.Thread(target=lambda: results.append(len(client.generate("a star", count=2))))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [2] * 16


async def test_a_running_event_loop_is_no_obstacle(target: str) -> None:
    """As in Jupyter, whose cells run inside of one."""
    with Client(target) as client:
        assert len(client.generate("a star")) == 1
        assert [type(event) for event in client.stream("a star")] == [Queued, Step, Image, Summary]


FORKED = """
import os, sys, warnings
from klein_client import Client, UnusableClient
warnings.simplefilter("ignore")
used, unused = Client(sys.argv[1]), Client(sys.argv[1])
used.status()
child = os.fork()
if child == 0:
    try:
        used.status()
    except UnusableClient as error:
        print(error, flush=True)
    used.close()
    os._exit(0)
os.waitpid(child, 0)
print("parent", len(used.generate("a star")), flush=True)
"""


def run_script(script: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=inherited_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        **options,
    )


def test_a_forked_process_needs_a_client_of_its_own(target: str) -> None:
    lines = run_script(FORKED, target).stdout.splitlines()
    assert lines == ["the client was used before this process was forked; make one for each", "parent 1"]


INTERRUPTED = """
import sys
from klein_client import Client
try:
    print("called", flush=True)
    Client(sys.argv[1]).generate("a star")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_control_c_ends_a_call_and_its_request(orchestrator: Orchestrator, target: str) -> None:
    orchestrator.blocks = True
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, target],
        env=inherited_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert orchestrator.called.wait(60)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (out.split(), err) == (["called", "interrupted"], "")
    assert orchestrator.cancelled.wait(30)


def test_the_import_brings_no_large_library() -> None:
    script = (
        "import sys, klein_client;"
        "print({'torch', 'numpy', 'PIL', 'httpx2', 'cryptography', 'klein_services', 'klein_core'} & set(sys.modules))"
    )
    assert run_script(script).stdout.strip() == "set()"
