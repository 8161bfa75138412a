"""`klein top`: rates between two scrapes, processes that restart or do not answer, output for scripts."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console
from typer.testing import CliRunner

from klein_services.cli.app import app
from klein_services.cli.errors import CliError
from klein_services.cli.top import run_top
from klein_services.runtime.scrape import (
    MAX_TARGETS,
    Change,
    MalformedTarget,
    Scrape,
    TargetsError,
    check_targets,
    quantile,
    resolved_targets,
    scrape,
)
from klein_services.runtime.suite_load import suite_load

DENOISER = """\
process_start_time_seconds {start}
klein_serving{{stage="denoiser"}} {serving}
klein_stage_info{{stage="denoiser",model="pico",device="cuda:0",dtype="bf16",version="1"}} 1.0
klein_queue_depth{{stage="denoiser"}} 3.0
klein_queue_depth{{stage="denoiser-preparation"}} 9.0
klein_running_requests{{stage="denoiser"}} 2.0
klein_stage_duration_seconds_count{{stage="denoiser",operation="denoise"}} {requests}
klein_stage_duration_seconds_sum{{stage="denoiser",operation="denoise"}} {requests}
klein_denoise_step_seconds_count{{stage="denoiser"}} {steps}
klein_denoise_step_seconds_sum{{stage="denoiser"}} {step_seconds}
klein_denoise_step_occupancy_ratio{{stage="denoiser"}} 0.75
klein_request_rejected_total{{stage="denoiser",reason="queue_full"}} {refused}
klein_device_memory_bytes{{stage="denoiser",kind="reserved"}} 2147483648.0
"""
ZERO = {"start": 1, "serving": 1, "requests": 0, "steps": 0, "step_seconds": 0, "refused": 0}
ORCHESTRATOR = """\
process_start_time_seconds 1
klein_serving{{stage="orchestrator"}} 1.0
grpc_server_started_total{{grpc_type="unary",grpc_service="klein_api.v1.ImageService",grpc_method="GenerateImage"}} 7.0
grpc_server_handled_total{{grpc_type="unary",\
grpc_service="klein_api.v1.ImageService",grpc_method="GenerateImage",grpc_code="OK"}} 5.0
klein_images_total{{model="pico",flow="edit",outcome="succeeded"}} {images}
klein_images_total{{model="pico",flow="edit",outcome="failed"}} 50
klein_pixels_total{{model="pico",flow="edit"}} {pixels}
klein_cache_requests_total{{kind="prompt_embedding",outcome="hit"}} {images}
klein_cache_requests_total{{kind="prompt_embedding",outcome="miss"}} {images}
"""


class Page(http.server.BaseHTTPRequestHandler):
    """Answers with the server's text, or with an error when it has none."""

    def do_GET(self):
        text = self.server.pages.pop(0) if len(self.server.pages) > 1 else self.server.pages[0]
        self.send_response(200 if text else 503)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@contextmanager
def serving(*pages: str) -> Iterator[str]:
    """Serves one page after the other, the last one from then on."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.pages = list(pages)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def page(at: float, text: str) -> Scrape:
    with serving(text) as target:
        found = scrape(target)
    assert not found.problem
    return Scrape("a:1", at, found.samples)


def denoiser(at: float, **values: float) -> Scrape:
    return page(at, DENOISER.format(**ZERO | values))


def test_rates_are_differences_between_two_scrapes():
    before = denoiser(10, requests=5, steps=100, step_seconds=20, refused=1)
    after = denoiser(14, requests=7, steps=110, step_seconds=22, refused=3)
    (load,) = suite_load([Change(before, after)]).processes
    assert (load.stage, load.model, load.device) == ("denoiser", "pico", "cuda:0 bf16")
    assert (load.queued, load.running) == (3, 2)
    assert load.requests_per_second == pytest.approx(0.5)
    assert load.step_seconds == pytest.approx(0.2)
    assert load.busy_ratio == pytest.approx(0.5)
    assert load.refused_per_second == pytest.approx(0.5)
    assert load.step_occupancy_ratio == 0.75
    assert load.memory_bytes == 2 << 30


def test_a_single_scrape_has_gauges_and_no_rates():
    only = denoiser(10, requests=5, steps=100)
    load = suite_load([Change(only, only)])
    assert load.interval_seconds is None
    assert load.processes[0].queued == 3
    assert load.processes[0].requests_per_second is None
    assert load.processes[0].step_seconds is None


@pytest.mark.parametrize(
    ("start", "requests", "rate"),
    [(1, 2, 0.5), (2, 2, 0.5), (2, 60, 15.0)],
    ids=["a counter that fell", "a process that restarted", "one that has counted further since"],
)
def test_counters_of_a_restarted_process_count_from_zero(start, requests, rate):
    change = Change(denoiser(10, requests=50), denoiser(14, requests=requests, start=start))
    assert change.rate("klein_stage_duration_seconds_count") == pytest.approx(rate)


def test_a_process_that_does_not_answer_keeps_its_name_and_has_no_rates():
    change = Change(denoiser(10), Scrape("a:1", 12, problem="connection refused"))
    load = suite_load([change])
    assert (load.processes[0].stage, load.processes[0].problem) == ("denoiser", "connection refused")
    assert load.images_per_second is None


def test_totals_are_of_the_public_api():
    before = page(10, ORCHESTRATOR.format(images=0, pixels=0))
    after = page(12, ORCHESTRATOR.format(images=4, pixels=8e6))
    load = suite_load([Change(before, after), Change(denoiser(10), denoiser(12, refused=4))])
    assert load.images_per_second == pytest.approx(2)
    assert load.megapixels_per_second == pytest.approx(4)
    assert load.in_progress == 2
    assert load.cache_hit_ratio == pytest.approx(0.5)
    assert load.refused_per_second == {"queue_full": 2.0}
    assert [each.stage for each in load.processes] == ["denoiser", "orchestrator"]


def test_quantiles_are_interpolated_over_all_replicas():
    text = 'klein_serving{{stage="orchestrator"}} 1\n' + "".join(
        f'h_bucket{{{{le="{bound}"}}}} {{{name}}}\n'
        for bound, name in (("1", "a"), ("2", "b"), ("+Inf", "c"))
    )
    zero = page(0, text.format(a=0, b=0, c=0))
    changes = [
        Change(zero, page(1, text.format(a=1, b=2, c=2))),
        Change(zero, page(1, text.format(a=1, b=2, c=2))),
    ]
    assert quantile(changes, 0.5, "h") == pytest.approx(1.0)
    assert quantile(changes, 0.75, "h") == pytest.approx(1.5)
    beyond = [Change(zero, page(1, text.format(a=0, b=0, c=5)))]
    assert quantile(beyond, 0.5, "h") == 2.0
    assert quantile([Change(zero, zero)], 0.5, "h") is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "answers 503"),
        ("<html>hello</html>", "is no metrics page"),
        ("up 1\n", "is no process of klein-suite"),
        ("x" * (8 << 20) + "x", "its page has more than 8 MiB"),
    ],
    ids=["error", "page of text", "another program", "endless"],
)
def test_other_pages_are_named_as_such(text, problem):
    with serving(text) as target:
        assert scrape(target).problem == problem


def test_targets_are_addresses_urls_or_all_addresses_of_a_name():
    assert resolved_targets(["a:1", "http://a:1/metrics", "[::1]:2"], "--metrics") == ["a:1", "[::1]:2"]
    assert "127.0.0.1:3" in resolved_targets(["dns:///localhost:3"], "--metrics")
    for bad in ("a", "a:0", "a:70000", "https://a:1", "a:1/x", ""):
        for check in (resolved_targets, check_targets):
            with pytest.raises(MalformedTarget, match="--metrics"):
                check([bad], "--metrics")
    unknown = "dns:///no-such-name.invalid:1"
    check_targets([unknown], "--metrics")
    with pytest.raises(TargetsError, match="--metrics"):
        resolved_targets([unknown], "--metrics")
    with pytest.raises(TargetsError, match=str(MAX_TARGETS)):
        resolved_targets([f"a:{port}" for port in range(1, MAX_TARGETS + 2)], "--metrics")


@pytest.mark.parametrize("target", ["a", "dns:///no-such-name.invalid:1"])
def test_a_target_that_cannot_be_used_is_an_error_of_the_command(target):
    result = CliRunner().invoke(app, ["top", "--once", "-m", target])
    assert isinstance(result.exception, CliError)
    assert f"--metrics {target}" in str(result.exception)


def test_nothing_that_answers_is_an_error_with_each_reason(free_port):
    result = CliRunner().invoke(app, ["top", "--once", "-m", f"127.0.0.1:{free_port}"])
    assert isinstance(result.exception, CliError)
    assert f"127.0.0.1:{free_port}: connection refused" in str(result.exception)


def test_once_prints_a_table_and_json_an_object(free_port, capsys):
    pages = [DENOISER.format(**ZERO), DENOISER.format(**ZERO | {"requests": 3, "serving": 0})]
    arguments = ["--interval", "0.1", "-m", f"127.0.0.1:{free_port}"]
    with serving(*pages) as target:
        result = CliRunner().invoke(app, ["top", "--once", "-m", target, *arguments])
    assert result.exit_code == 0
    assert "not ready" in result.output
    assert "no answer" in result.output
    with serving(*pages) as target:
        result = CliRunner().invoke(app, ["top", "--once", "--json", "-m", target, *arguments])
    load = json.loads(result.output)
    assert load["processes"][0]["requests_per_second"] > 0
    assert load["processes"][1]["problem"] == "connection refused"


def test_the_live_view_survives_a_process_that_goes_and_comes_back(monkeypatch):
    running, gone, back = DENOISER.format(**ZERO), "", DENOISER.format(**ZERO | {"start": 9, "requests": 4})
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("klein_services.cli.top.time.sleep", sleep)
    console = Console(force_terminal=True, width=120, record=True, file=None)
    with console.capture() as capture, serving(running, gone, back) as target:
        assert run_top([target], 0.5, console, once=False, as_json=False) == 0
    screen = capture.get()
    assert slept == [0.5] * 4
    assert screen.index("serving") < screen.index("no answer") < screen.rindex("serving")
