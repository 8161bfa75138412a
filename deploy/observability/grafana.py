"""Dashboards of Grafana, made from the table of panels, and the table metric → panel of the documents."""

from __future__ import annotations

import json
import re
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendPlacement
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, GridPos

from deploy.observability.panel import Board, Panel
from deploy.observability.panels import BOARDS

FOLDER = Path("deploy/observability/dashboards")
DOCUMENT = Path("docs/dashboards.md")
METRIC = re.compile(r"\b(?:klein_(?!api)|grpc_server_|process_|kube_|ALERTS)\w*")
_DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24
_BEGIN, _END = "<!-- generated: metrics -->\n", "<!-- end -->\n"


def dashboard_files(root: Path) -> dict[Path, str]:
    """Returns the text of each generated file, by its path in the repository.

    Args:
        root: the checkout, whose document has prose around the generated table.
    """
    files = {FOLDER / f"{board.uid}.json": dashboard_json(board) for board in BOARDS}
    text = (root / DOCUMENT).read_text(encoding="utf-8")
    begin, end = text.index(_BEGIN) + len(_BEGIN), text.index(_END)
    return {**files, DOCUMENT: text[:begin] + metric_table() + text[end:]}


def dashboard_json(board: Board) -> str:
    """Returns a dashboard as Grafana imports it."""
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["klein"])
        .timezone("browser")
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("namespace")
            .label("Namespace")
            .datasource(_DATASOURCE)
            .query("label_values(klein_serving, namespace)")
            .include_all(True)
            .all_value(".*")
            .multi(True)
        )
    )
    for index, panel in enumerate(board.panels):
        left, top = index * _WIDTH % _COLUMNS, index * _WIDTH // _COLUMNS * _HEIGHT
        position = GridPos(h=_HEIGHT, w=_WIDTH, x=left, y=top)
        builder = builder.with_panel(_panel(panel).id(index + 1).grid_pos(position))
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _panel(panel: Panel) -> stat.Panel | timeseries.Panel:
    made: stat.Panel | timeseries.Panel
    if panel.is_number:
        made = stat.Panel()
    else:
        legend = common.VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM)
        made = timeseries.Panel().legend(legend)
    made = made.title(panel.title).description(panel.description).unit(panel.unit).datasource(_DATASOURCE)
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(letter)
        is_histogram = "_bucket{" in query.expression
        made = made.with_target(target.exemplar(is_histogram).datasource(_DATASOURCE))
    return made


def metrics_of(expression: str) -> list[str]:
    """Returns the names of the metrics in a query; a histogram's series have its name."""
    return [re.sub(r"_(bucket|sum|count)$", "", name) for name in METRIC.findall(expression)]


def metric_table() -> str:
    """Returns the table of metrics and the panels that show them."""
    places: dict[str, dict[str, list[str]]] = {}
    for board in BOARDS:
        for panel in board.panels:
            for metric in dict.fromkeys(
                name for query in panel.queries for name in metrics_of(query.expression)
            ):
                boards = places.setdefault(metric, {}).setdefault(panel.title, [])
                boards.append(board.title.removeprefix("Klein "))
    rows = [f"| `{metric}` | {_listed(panels)} |" for metric, panels in sorted(places.items())]
    return "\n".join(["| metric | panels (dashboards) |", "|---|---|", *rows, ""])


def _listed(panels: dict[str, list[str]]) -> str:
    return "; ".join(f"{title} ({', '.join(boards)})" for title, boards in panels.items())
