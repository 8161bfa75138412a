"""Picture of a dashboard from the data of a running Prometheus: `python -m deploy.observability.picture URL FILE`."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from deploy.observability.panel import Board, Panel
from deploy.observability.panels import BOARDS, OVERVIEW

_COLUMNS = 3
_STEPS = 240


def draw(board: Board, prometheus: str, minutes: float, file: Path) -> None:
    """Draws every panel of a dashboard over the last minutes."""
    rows = math.ceil(len(board.panels) / _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(19, 2.6 * rows), layout="constrained")
    for axis, panel in zip(axes.flat, board.panels, strict=False):
        _draw_panel(axis, panel, prometheus, minutes)
    for axis in axes.flat[len(board.panels) :]:
        axis.set_axis_off()
    figure.suptitle(board.title)
    figure.savefig(file, dpi=65)
    pyplot.close(figure)


def _draw_panel(axis: Any, panel: Panel, prometheus: str, minutes: float) -> None:
    axis.set_title(panel.title, fontsize=10)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.set_ylabel(
        {"s": "seconds", "short": "", "percentunit": "ratio"}.get(panel.unit, panel.unit), fontsize=8
    )
    now = time.time()
    for query in panel.queries:
        for series in _series(prometheus, query.expression, now, minutes):
            points = _points(series["values"], now, minutes)
            if not any(value for _, value in points if math.isfinite(value)):
                continue  # a line at 0 is one more in the legend and nothing else
            label = query.legend
            for name in re.findall(r"{{(\w+)}}", label):
                label = label.replace(f"{{{{{name}}}}}", series["metric"].get(name, ""))
            # Dashes of different lengths, so that equal lines are seen.
            index = len(axis.lines)
            style = (0, (6, 2 * index)) if index else "-"
            axis.plot(*zip(*points, strict=True), label=label or None, linewidth=1.6, linestyle=style)
    axis.set_xlim(-minutes, 0)
    axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _points(values: list[list[Any]], now: float, minutes: float) -> list[tuple[float, float]]:
    """Returns minutes from now and values; a point that is no number breaks the line where samples are missing."""
    points: list[tuple[float, float]] = []
    for at, value in values:
        minute = (float(at) - now) / 60
        if points and minute - points[-1][0] > 1.5 * minutes / _STEPS:
            points.append((minute, math.nan))
        points.append((minute, float(value)))
    return points


def _series(prometheus: str, expression: str, now: float, minutes: float) -> list[dict[str, Any]]:
    asked = expression.replace("$__rate_interval", "1m").replace("$namespace", ".*")
    span = minutes * 60
    parameters = {"query": asked, "start": now - span, "end": now, "step": max(span / _STEPS, 1)}
    address = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(address, timeout=60) as response:
        result: list[dict[str, Any]] = json.load(response)["data"]["result"]
    return result


def main(arguments: Sequence[str]) -> int:
    """Draws one dashboard; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.observability.picture", description=__doc__)
    parser.add_argument("prometheus", help="address of Prometheus, http://HOST:PORT")
    parser.add_argument("file", type=Path, help="PNG file")
    parser.add_argument("--dashboard", choices=[board.uid for board in BOARDS], default=OVERVIEW.uid)
    parser.add_argument("--minutes", type=float, default=15.0, help="length of the time axis (15)")
    options = parser.parse_args(arguments)
    board = next(board for board in BOARDS if board.uid == options.dashboard)
    draw(board, options.prometheus.rstrip("/"), options.minutes, options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
