"""Size and prose limits of the product's files: `python -m tests.contract.house [--list]`."""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("klein_core", "services/klein_client", "services/klein_services")

ENFORCED = frozenset(
    {
        "product files",
        "longest file",
        "median lines",
        "private with one call site",
        "headless module docstrings",
        "headless other docstrings",
    }
)
"""Numbers that fail `make lint`; the others are printed. Add a name when the product is within its limit."""

MAX_FILES = 300
MAX_LINES = 400
MIN_MEDIAN_LINES = 90
MAX_SINGLE_USE_SHARE = 0.10
_HEADLESS = re.compile(
    r"(?:what|how|who|whom|whose|whoever|whatever|where|when|which|why|of|the same|nobody|somebody)\b",
    re.IGNORECASE,
)
_HEADLESS_MODULE = re.compile(rf"{_HEADLESS.pattern}|whether\b", re.IGNORECASE)
"""`Whether …` is the usual docstring of a boolean property, and no name for a module."""

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A product file and its syntax tree."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        return self.text.count("\n")


@dataclass(frozen=True, slots=True)
class Finding:
    """A place that a limit counts."""

    path: Path
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number of the house, its limit, and the places that make it up."""

    name: str
    value: str
    limit: str
    holds: bool
    """Whether the value is within the limit."""
    findings: tuple[Finding, ...] = ()


def read_product(root: Path = ROOT) -> list[SourceFile]:
    """Returns the product's files that are neither empty nor generated."""
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    texts = ((path.relative_to(root), path.read_text(encoding="utf-8")) for path in paths)
    return [SourceFile(path, text, ast.parse(text)) for path, text in texts if text.strip()]


def measure(files: Sequence[SourceFile]) -> list[Measurement]:
    """Returns every number of the house; `files` are read by `read_product`."""
    median = statistics.median(file.lines for file in files)
    long = tuple(Finding(f.path, f.lines, f"{f.lines} lines") for f in files if f.lines > MAX_LINES)
    functions = sum(1 for file in files for _ in _functions(file))
    single = tuple(_single_use(files))
    share = len(single) / functions
    headless = tuple(_headless(files, modules=True))
    others = tuple(_headless(files, modules=False))
    return [
        Measurement("product files", str(len(files)), f"<= {MAX_FILES}", len(files) <= MAX_FILES),
        Measurement("longest file", str(max(f.lines for f in files)), f"<= {MAX_LINES}", not long, long),
        Measurement("median lines", f"{median:g}", f">= {MIN_MEDIAN_LINES}", median >= MIN_MEDIAN_LINES),
        Measurement(
            "private with one call site",
            f"{len(single)} of {functions}, {share:.1%}",
            f"<= {MAX_SINGLE_USE_SHARE:.0%}",
            share <= MAX_SINGLE_USE_SHARE,
            single,
        ),
        Measurement("headless module docstrings", str(len(headless)), "0", not headless, headless),
        Measurement("headless other docstrings", str(len(others)), "0", not others, others),
    ]


def _functions(file: SourceFile) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _single_use(files: Sequence[SourceFile]) -> Iterator[Finding]:
    """Yields private functions whose name occurs twice in the product: the definition and one use."""
    names = Counter(name for file in files for name in _names(file))
    for file in files:
        for function in _functions(file):
            name = function.name
            if name.startswith("_") and not name.endswith("__") and names[name] == 2:
                yield Finding(file.path, function.lineno, f"{name} has one call site")


def _names(file: SourceFile) -> Iterator[str]:
    for node in ast.walk(file.tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                yield name


def _headless(files: Sequence[SourceFile], *, modules: bool) -> Iterator[Finding]:
    for file in files:
        for node in ast.walk(file.tree):
            if not isinstance(node, _Documented) or isinstance(node, ast.Module) is not modules:
                continue
            docstring = ast.get_docstring(node) or ""
            if (_HEADLESS_MODULE if modules else _HEADLESS).match(docstring):
                line = node.body[0].lineno
                yield Finding(file.path, line, repr(docstring.splitlines()[0]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.contract.house", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the file and line of everything counted")
    parser.add_argument("--strict", action="store_true", help="fail when any limit is exceeded")
    options = parser.parse_args()
    failed = False
    for measurement in measure(read_product()):
        mark = "ok" if measurement.holds else "OVER"
        print(f"house: {measurement.name:30}{measurement.value:>22}  {measurement.limit:>6}  {mark}")
        fails = not measurement.holds and (options.strict or measurement.name in ENFORCED)
        failed |= fails
        if options.list or fails:
            for finding in measurement.findings:
                print(f"  {finding.path}:{finding.line}: {finding.text}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
