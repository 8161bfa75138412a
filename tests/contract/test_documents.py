"""Documents against the code: metrics, settings, paths, links and the form of decisions."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

import klein_services
from klein_core.checkpoint.config_keys import CONFIG_KEYS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "klein_core").rglob("*.md"),
    ]
)
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| `(?P<name>\w+)` \| [\w, -]+ \| (?P<type>\w+) \| (?P<labels>[^|]+) \| [^|]+ \|$", re.MULTILINE
)
PATH = re.compile(r"`((?:klein_core|services|protos|training|benchmarks|tests|docs)/[\w/.-]+)")
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


def source_text() -> str:
    sources = [path for folder in ("klein_core", "services") for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text(encoding="utf-8") for path in sources)


def registered_metrics() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns type and labels of every metric that a module of the services registers."""
    for module in pkgutil.walk_packages(klein_services.__path__, "klein_services."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = {}
    for collector in set(REGISTRY._collector_to_names):
        if isinstance(collector, MetricWrapperBase):
            (metric,) = collector.describe()
            suffix = "_total" if metric.type == "counter" else ""
            found[metric.name + suffix] = (metric.type, tuple(collector._labelnames))
    return found


def test_operations_lists_every_metric_with_its_type_and_labels() -> None:
    documented = {
        row["name"]: (row["type"], tuple(re.findall(r"`(\w+)`", row["labels"])))
        for row in ROW.finditer(OPERATIONS)
    }
    registered = registered_metrics()
    assert len(registered) > 20
    assert documented == registered


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_metrics_settings_paths_and_links_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = [name for name in PATH.findall(text) if not (ROOT / name.rstrip("./")).exists()]
    missing += [name for name in LINK.findall(text) if not (document.parent / name).exists()]
    metrics = registered_metrics()
    for name in re.findall(r"`(klein_\w+?|grpc_server_\w+)(?:\{[\w,]+\})?`", text):
        if name not in metrics and not any(
            (ROOT / folder / name).exists() for folder in (".", "services", "protos")
        ):
            missing.append(name)
    code = source_text()
    for setting in set(re.findall(r"\bKLEIN_[A-Z][A-Z_]+[A-Z]\b", text)):
        if setting not in code and not re.search(rf"\b{setting.removeprefix('KLEIN_').lower()}\b", code):
            missing.append(setting)
    assert missing == []


def test_the_table_of_configuration_keys_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([\w/]+\.json)` \| (honored|fixed|without effect) \| (.+) \|$", text, re.MULTILINE
    )
    documented = {(file, treatment): re.findall(r"`([^`]+)`", keys) for file, treatment, keys in rows}
    assert len(documented) == len(rows)
    expected = {}
    for file, keys in CONFIG_KEYS.items():
        fixed = [f"{key} = {json.dumps(value)}" for key, value in keys.fixed.items()]
        treated = {"honored": keys.honored, "fixed": fixed, "without effect": keys.without_effect}
        expected |= {(file, treatment): sorted(each) for treatment, each in treated.items() if each}
    assert len(expected) > 12
    assert documented == expected


def test_every_decision_has_context_decision_and_consequences() -> None:
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    entries = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [int(entry.split(".")[0]) for entry in entries] == list(range(1, len(entries) + 1))
    for entry in entries:
        assert re.findall(r"^\*\*(\w+)\.\*\* ", entry, re.MULTILINE) == [
            "Context",
            "Decision",
            "Consequences",
        ], entry


def test_the_glossary_has_each_word_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = [row.split("|")[1].strip() for row in text.splitlines() if row.startswith("| ")]
    words = [word for word in words if word != "word"]
    assert len(words) > 50
    assert sorted(words) == sorted(set(words))
