"""Settings of all tests: a busy machine is slow and must not fail a property test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
# `pytest --hypothesis-profile=fuzz tests/services/runtime/test_fuzz.py`: minutes instead of seconds.
settings.register_profile("fuzz", settings.get_profile("busy"), max_examples=5_000)
