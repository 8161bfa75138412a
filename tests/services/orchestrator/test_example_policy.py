"""The example content policy: its process, its rules, and the orchestrator in front of it."""

from __future__ import annotations

import hashlib

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from klein_api.v1 import content_policy_service_pb2 as pb
from tests.services.fakes.example_policy import FOLDER, example, failed_start
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite, generate, refusal

DENIED_FILE = reference_file(64, 64, "denied")
RULES = f"""
words = ["Forbidden  Word", "ß"]
patterns = ['\\bfake .* passports?\\b']
file_digests = ["{hashlib.sha256(DENIED_FILE).hexdigest().upper()}"]
maximum_file_bytes = 4096
maximum_pixels = 8192
"""


async def test_its_rules_guard_an_orchestrator(tmp_path):
    async with example(tmp_path, RULES) as target:
        settings = {"content_policy_target": target, "content_policy_timeout_seconds": 60.0}
        async with FakeSuite(settings=settings).running() as suite:
            for prompt, code in {
                "a FORBIDDEN\nword, please": "DENIED_WORD",
                "SS and ß": "DENIED_WORD",
                "ｆｏｒｂｉｄｄｅｎ word": "DENIED_WORD",
                "a fake French passport": "DENIED_PATTERN",
            }.items():
                details = await refusal(suite, prompt=prompt)
                assert (details.reason, dict(details.metadata)["reason_code"]) == ("CONTENT_DENIED", code), (
                    prompt
                )
            for reference, code in {
                DENIED_FILE: "DENIED_FILE",
                reference_file(64, 64, "x" * 4096): "FILE_TOO_LARGE",
            }.items():
                details = await refusal(suite, references=[reference])
                assert dict(details.metadata)["reason_code"] == code
            assert [stage.calls for stage in suite.stages] == [0, 0, 0]
            details = await refusal(suite, prompt="fox", width_px=128, height_px=128)
            assert dict(details.metadata)["reason_code"] == "IMAGE_TOO_LARGE"
            response = await generate(
                suite, prompt="unforbidden words", seed=1, references=[reference_file(64, 64)]
            )
            assert len(response.images) == 1
        async with grpc.aio.insecure_channel(target) as channel:
            check = health_pb2.HealthCheckRequest(service="klein_api.v1.ContentPolicyService")
            state = await health_pb2_grpc.HealthStub(channel).Check(check)
            assert state.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ("word = []", "has the key 'word'"),
        ("words = [1]", "words must be a list"),
        ("words = ['']", "words must be a list"),
        ("patterns = ['(']", "patterns has '('"),
        ("file_digests = ['abc']", "must be 64 hexadecimal digits"),
        ("maximum_pixels = 0", "maximum_pixels is 0"),
        ("words = [", "cannot be read"),
    ],
)
async def test_rules_that_cannot_be_used_are_named(tmp_path, monkeypatch, rules, error):
    monkeypatch.syspath_prepend(FOLDER)
    from policy_server import Rules, RulesError

    path = tmp_path / "rules.toml"
    path.write_text(rules)
    with pytest.raises(RulesError) as caught:
        Rules.read(path)
    assert error in str(caught.value)


async def test_rules_that_cannot_be_used_stop_the_start(tmp_path):
    assert "has the key 'word'" in await failed_start(tmp_path, "word = []")


def test_the_rules_that_are_shipped_can_be_used(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    from policy_server import ALLOW, Rules

    rules = Rules.read(FOLDER / "rules.toml")
    assert rules.check_request(pb.CheckRequestRequest(prompt="a red circle")) == ALLOW
    assert rules.check_request(pb.CheckRequestRequest(prompt="A forbidden word")) != ALLOW
