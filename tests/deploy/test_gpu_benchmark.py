"""Rehearsal of the GPU benchmark on a CPU: every part runs and is in the report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.record import read_lines
from benchmarks.gpu.report import PREDICTED_MS

pytestmark = pytest.mark.deploy
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(900)
def test_every_part_runs_and_is_in_the_report(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--variant", "tiny"]
    answer = subprocess.run(
        [*line, "--output", str(tmp_path)],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=True,
    )
    cases = read_lines(tmp_path / "cases.jsonl")
    assert {case["part"] for case in cases} == set(PARTS), answer.stderr[-2000:]
    assert [case for case in cases if "error" in case] == []
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part, name in PREDICTED_MS:
        assert f"| {part} | {name} |" in report
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_a_part_is_killed_at_its_deadline_and_the_report_written(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--variant", "tiny"]
    answer = subprocess.run(
        [*line, "--output", str(tmp_path), "--parts", "steps", "--budget", "1.5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "killed at its deadline" in answer.stdout
    assert (tmp_path / "report.md").exists()
