"""Order of starts on a shared GPU: the denoiser, which measures what is left of it, comes last."""

from __future__ import annotations

import pytest

from klein_services.cli.probes import StartupPhase
from klein_services.cli.suite import Suite, SuiteOptions
from tests.e2e.running_suite import READY_SECONDS


@pytest.mark.parametrize(
    ("device", "has_gpu"), [("cuda", True), ("cuda:1", True), ("cpu", False), ("mps", False)]
)
def test_stages_share_a_gpu_on_cuda(device: str, has_gpu: bool) -> None:
    suite = Suite(SuiteOptions(device=device))
    try:
        assert suite.shares_gpu is has_gpu
    finally:
        suite.stop()


def test_the_denoiser_starts_when_the_other_stages_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Suite, "shares_gpu", True)
    seen: list[tuple[bool, StartupPhase, StartupPhase]] = []
    with Suite(SuiteOptions(device="cpu", threads=1)) as suite:
        assert "denoiser" not in suite.children
        suite.wait_until_ready(
            timeout_seconds=READY_SECONDS,
            on_change=lambda phases: seen.append(
                ("denoiser" in suite.children, phases["text-encoder"], phases["vae-decoder"])
            ),
        )
    for is_started, *others in seen:
        assert not is_started or others == [StartupPhase.READY] * 2
    assert seen[0][0] is False
    assert seen[-1][0] is True
