"""Report of a run: predictions next to measurements as Markdown, and a plot of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import read_lines

# Milliseconds of a step by a roofline of an H200: products 670 (fp8 1170) and attention 580 TFLOP/s, 4.1 TB/s.
PREDICTED_MS: Mapping[tuple[str, str], float] = {
    ("steps", "bf16 compiled 512², 0 references"): 16,
    ("steps", "bf16 compiled 512², 1 references"): 71,
    ("steps", "bf16 compiled 512², 4 references"): 337,
    ("steps", "bf16 compiled 1024², 0 references"): 57,
    ("steps", "bf16 compiled 1024², 1 references"): 124,
    ("steps", "bf16 compiled 1024², 4 references"): 429,
    ("steps", "bf16 compiled 2048², 0 references"): 319,
    ("steps", "bf16 compiled 2048², 1 references"): 439,
    ("steps", "bf16 compiled 2048², 4 references"): 900,
    ("steps", "fp8 compiled 512², 0 references"): 10,
    ("steps", "fp8 compiled 512², 1 references"): 49,
    ("steps", "fp8 compiled 512², 4 references"): 267,
    ("steps", "fp8 compiled 1024², 0 references"): 38,
    ("steps", "fp8 compiled 1024², 1 references"): 90,
    ("steps", "fp8 compiled 1024², 4 references"): 347,
    ("steps", "fp8 compiled 2048², 0 references"): 251,
    ("steps", "fp8 compiled 2048², 1 references"): 355,
    ("steps", "fp8 compiled 2048², 4 references"): 769,
    ("prompts", "compiled 1 prompts"): 5.5,
    ("images", "decode compiled 1024²"): 29,
    ("images", "encode compiled 1024²"): 15,
    ("suite", "compile on: 1024² JPEG"): 270,
}
_SHOWN = ("tera_per_second", "images_per_second", "relative_difference", "peak_gib", "first_ms")


def write_report(cases: Path, folder: Path, command: str) -> str:
    """Writes `report.md` and, with matplotlib, `steps.png`; returns the report's text."""
    lines = read_lines(cases)
    text = "\n".join([f"`{command}`", "", *_facts(lines), "", *_table(lines)])
    (folder / "report.md").write_text(f"{text}\n", encoding="utf-8")
    _plot(lines, folder / "steps.png")
    return text


def _facts(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the versions, and what was not measured with its reason."""
    facts = [line for line in lines if line["part"] in ("versions", "tests")]
    missing = [line for line in lines if "error" in line or "skipped" in line]
    shown = [f"- {line['case']}: {_values(line, ())}" for line in facts if line not in missing]
    return [
        *shown,
        *(
            f"- NOT MEASURED {line['part']}, {line['case']}: {line.get('error') or line['skipped']}"
            for line in missing
        ),
    ]


def _table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ["| part | case | predicted ms | measured ms | least | more |", "|---|---|---|---|---|---|"]
    seen = set()
    for line in lines:
        if "ms" not in line and "images_per_second" not in line:
            continue
        key = (line["part"], line["case"])
        seen.add(key)
        more = ", ".join(f"{name} {line[name]}" for name in _SHOWN if name in line)
        cells = (*key, PREDICTED_MS.get(key, ""), line.get("ms", ""), line.get("least_ms", ""), more)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    rows += [
        f"| {part} | {case} | {predicted} | | | |"
        for (part, case), predicted in PREDICTED_MS.items()
        if (part, case) not in seen
    ]
    return rows


def _values(line: Mapping[str, Any], left_out: Sequence[str]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in line.items() if name not in ("part", "case", *left_out)
    )


def _plot(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    measured = {line["case"]: line["ms"] for line in lines if line["part"] == "steps" and "ms" in line}
    if not measured:
        return
    figure = Figure(figsize=(9, 0.3 * len(measured) + 1), layout="constrained")
    axes = figure.subplots()
    names = list(measured)
    axes.barh(names, [measured[name] for name in names], color="#4c78a8", label="measured")
    predicted = {name: PREDICTED_MS[("steps", name)] for name in names if ("steps", name) in PREDICTED_MS}
    axes.scatter(
        list(predicted.values()), list(predicted), color="#e45756", zorder=3, label="predicted for an H200"
    )
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")
    axes.legend()
    figure.savefig(file, dpi=110)
