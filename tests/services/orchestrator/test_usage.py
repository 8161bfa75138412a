"""Usage of tenants: counters by name, and the log from which bills are made, through kills, rotation and full disks."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest
from prometheus_client import REGISTRY

from klein_api.v1 import image_service_pb2 as api
from klein_services.orchestrator import authentication, usage
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.orchestrator.tokens import Tenant, new_token, tenant_table
from klein_services.orchestrator.usage import UsageLog
from klein_services.runtime.errors import QueueFull
from klein_services.runtime.settings import SettingsError
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite
from tests.services.fakes.runtime_toy import until
from tests.services.fakes.tenants import TOKEN, bearer, make, refused, tokens_toml

IMAGE = 64 * 64 / 1e6
EDIT = 96 * 64 / 1e6


def metric(name, **labels):
    return REGISTRY.get_sample_value(name, labels)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(authentication, "RELOAD_SECONDS", 0.02)
    monkeypatch.setattr(usage, "RETRY_SECONDS", 0.02)


async def test_every_request_is_a_line_and_counts_for_its_tenant(tmp_path):
    path = tmp_path / "usage.jsonl"
    settings = {"tokens_file": tokens_toml(tmp_path, requests_in_flight=2), "usage_log": str(path)}
    async with FakeSuite(settings=settings).running() as suite:
        names = ("klein_usage_requests_total", "klein_usage_images_total", "klein_usage_megapixels_total")
        assert metric(names[0], caller="acme", outcome="succeeded") is not None
        before = {
            "succeeded": metric(names[0], caller="acme", outcome="succeeded"),
            "images": metric(names[1], caller="acme"),
            "input": metric(names[2], caller="acme", direction="input"),
            "output": metric(names[2], caller="acme", direction="output"),
        }
        identity = ("x-request-id", 'mine "1"')
        await make(suite, (*bearer(TOKEN), identity), image_count=2, step_count=3)
        await make(suite, references=[reference_file(96, 64)])
        await refused(suite, step_count=-1)
        await refused(suite, model="not routed")
        suite.denoiser.error = QueueFull(2)
        await refused(suite)
        suite.denoiser.error = ValueError("broken")
        await refused(suite)
        suite.denoiser.error = None
        suite.denoiser.step_gate = asyncio.Event()
        running = asyncio.create_task(make(suite))
        specs = len(suite.denoiser.specs)
        await until(lambda: len(suite.denoiser.specs) > specs)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        # What has no token is no use of any tenant.
        await refused(suite, ())
        await until(lambda: len(lines_of(path)) == 7)
        assert metric(names[0], caller="acme", outcome="succeeded") == before["succeeded"] + 2
        assert metric(names[1], caller="acme") == before["images"] + 3
        assert metric(names[2], caller="acme", direction="input") == pytest.approx(before["input"] + EDIT)
        assert metric(names[2], caller="acme", direction="output") == pytest.approx(
            before["output"] + 2 * IMAGE + EDIT
        )
    lines = lines_of(path)
    first = lines[0]
    assert first.pop("time").endswith("+00:00")
    assert first.pop("seconds") >= 0
    assert first == {
        "request_id": 'mine "1"',
        "caller": "acme",
        "model": "fake",
        "flow": "text-to-image",
        "outcome": "succeeded",
        "images": 2,
        "input_megapixels": 0.0,
        "output_megapixels": round(2 * IMAGE, 6),
        "steps": 3,
        "references": 0,
    }
    assert (lines[1]["flow"], lines[1]["references"], lines[1]["input_megapixels"]) == ("edit", 1, EDIT)
    outcomes = [line["outcome"] for line in lines]
    assert outcomes == ["succeeded", "succeeded", "rejected", "rejected", "refused", "failed", "cancelled"]
    assert [line["images"] for line in lines[2:]] == [0] * 5
    assert lines[3]["model"] == "unknown"
    text = path.read_text()
    assert TOKEN not in text
    assert "a star" not in text


async def test_images_that_were_delivered_before_a_cancellation_count(tmp_path):
    path = tmp_path / "usage.jsonl"
    settings = {"tokens_file": tokens_toml(tmp_path), "usage_log": str(path)}
    async with FakeSuite(settings=settings).running() as suite:
        suite.denoiser.image_gates[1] = asyncio.Event()
        request = api.StreamGenerateImageRequest(spec=api.ImageSpec(image_count=2))
        call = suite.images.StreamGenerateImage(request, metadata=bearer(TOKEN))
        async for event in call:
            if event.HasField("image"):
                break
        call.cancel()
        await until(lambda: path.read_text().endswith("\n"))
    (line,) = lines_of(path)
    assert (line["outcome"], line["images"], line["output_megapixels"]) == ("cancelled", 1, round(IMAGE, 6))


async def test_without_tokens_lines_have_addresses_and_no_counter_has_a_caller(tmp_path):
    path = tmp_path / "usage.jsonl"
    async with FakeSuite(settings={"usage_log": str(path)}).running() as suite:
        await make(suite, ())
    assert [line["caller"] for line in lines_of(path)] == ["127.0.0.1"]
    assert metric("klein_usage_requests_total", caller="127.0.0.1", outcome="succeeded") is None


async def test_the_counters_of_a_tenant_that_is_gone_are_gone(tmp_path):
    path = tmp_path / "tokens.toml"
    token = new_token()
    path.write_text(tenant_table(Tenant(name="leaving"), token))
    async with FakeSuite(settings={"tokens_file": str(path)}).running() as suite:
        assert metric("klein_usage_images_total", caller="leaving") == 0
        path.write_text(tenant_table(Tenant(name="coming"), token))
        await until(lambda: metric("klein_usage_images_total", caller="coming") == 0)
        assert metric("klein_usage_images_total", caller="leaving") is None
        await make(suite, bearer(token))
        assert metric("klein_usage_images_total", caller="coming") == 1


def test_a_file_that_is_moved_away_is_followed_by_a_new_one(tmp_path):
    path, moved = tmp_path / "usage.jsonl", tmp_path / "usage.jsonl.1"
    log = UsageLog(str(path))
    log.add({"line": 1})
    while not path.read_text():
        pass
    path.rename(moved)
    log.add({"line": 2})
    log.close()
    assert (lines_of(moved), lines_of(path)) == ([{"line": 1}], [{"line": 2}])


async def test_lines_wait_for_a_full_disk_and_those_beyond_the_limit_are_lost_and_counted(tmp_path, caplog):
    path = tmp_path / "usage.jsonl"
    path.symlink_to("/dev/full")
    lost = metric("klein_usage_log_lines_total", outcome="lost") or 0
    log = UsageLog(str(path), line_limit=3)
    for number in range(5):
        log.add({"line": number})
    assert metric("klein_usage_log_lines_total", outcome="lost") == lost + 2
    await until(lambda: "No space left on device" in [getattr(r, "error", "") for r in caplog.records])
    await until(lambda: metric("klein_usage_log_waiting_lines") == 3)
    path.unlink()
    await until(lambda: metric("klein_usage_log_waiting_lines") == 0)
    log.close()
    assert [line["line"] for line in lines_of(path)] == [0, 1, 2]
    assert [r.getMessage() for r in caplog.records].count(
        "the usage log cannot be written; its lines wait"
    ) == 1


async def test_requests_go_on_while_the_disk_is_full_and_the_stop_does_not_hang(tmp_path):
    path = tmp_path / "usage.jsonl"
    path.symlink_to("/dev/full")
    lost = metric("klein_usage_log_lines_total", outcome="lost") or 0
    async with FakeSuite(settings={"usage_log": str(path)}).running() as suite:
        for seed in range(3):
            assert (await make(suite, (), seed=seed)).images
    assert metric("klein_usage_log_lines_total", outcome="lost") == lost + 3


def test_a_killed_process_leaves_whole_lines_and_the_next_one_begins_a_new_line(tmp_path):
    path = tmp_path / "usage.jsonl"
    program = (
        "import itertools, sys, time\n"
        "from klein_services.orchestrator.usage import UsageLog\n"
        "log = UsageLog(sys.argv[1])\n"
        "for number in itertools.count():\n"
        "    log.add({'line': number, 'filling': 'x' * 1000})\n"
        "    time.sleep(0.001)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", program, path], env=environment)
    while not path.exists() or path.stat().st_size < 20_000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = path.read_text()
    whole = [json.loads(line) for line in written.splitlines()[:-1]]
    assert [line["line"] for line in whole] == list(range(len(whole)))
    with path.open("a") as file:
        file.write('{"line": "cut o')
    log = UsageLog(str(path))
    log.add({"line": "after"})
    log.close()
    assert json.loads(path.read_text().splitlines()[-1]) == {"line": "after"}


def test_a_dash_is_standard_output(capfd):
    log = UsageLog("-")
    log.add({"line": 1})
    log.close()
    assert capfd.readouterr().out == '{"line": 1}\n'
    sys.stdout.write("still open")


def test_a_path_that_cannot_be_used_stops_the_start(tmp_path):
    with pytest.raises(SettingsError, match=r"KLEIN_USAGE_LOG is .*; it cannot be opened: Is a directory"):
        UsageLog(str(tmp_path))
    settings = OrchestratorSettings(usage_log=str(tmp_path / "none" / "usage.jsonl"))
    assert any("its folder does not exist" in problem for problem in settings.problems())
