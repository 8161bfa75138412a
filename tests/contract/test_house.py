"""The numbers that `tests.contract.house` prints, and that they hold."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.contract.house import ENFORCED, MAX_FILES, Measurement, SourceFile, measure, read_product

OVER_A_LIMIT = (
    '''"""What a module holds."""

def _once() -> None:
    """Returns nothing."""

def _twice() -> None:
    """How it returns nothing."""

def public() -> None:
    _once()
    _twice()
    _twice()
'''
    + "\n" * 400
)


def measured(*texts: str) -> dict[str, Measurement]:
    files = [SourceFile(Path(f"{i}.py"), text, ast.parse(text)) for i, text in enumerate(texts)]
    return {measurement.name: measurement for measurement in measure(files)}


def test_everything_over_a_limit_is_found_with_its_line() -> None:
    numbers = measured(OVER_A_LIMIT)
    assert not numbers["longest file"].holds
    [single] = numbers["private with one call site"].findings
    assert (single.line, single.text) == (3, "_once has one call site")
    assert numbers["private with one call site"].value == "1 of 3, 33.3%"
    [module] = numbers["headless module docstrings"].findings
    assert (module.path, module.line) == (Path("0.py"), 1)
    [function] = numbers["headless other docstrings"].findings
    assert function.line == 7


def test_a_call_in_another_file_counts() -> None:
    numbers = measured("def _shared():\n    pass\n_shared()\n", "from m import _shared\n")
    assert numbers["private with one call site"].findings == ()


def test_a_short_median_and_too_many_files_are_over() -> None:
    numbers = measured(*["def f():\n    pass\n"] * (MAX_FILES + 1))
    assert not numbers["product files"].holds
    assert not numbers["median lines"].holds


def test_the_product_is_within_the_enforced_limits() -> None:
    numbers = {measurement.name: measurement for measurement in measure(read_product())}
    assert numbers.keys() >= ENFORCED
    assert [numbers[name] for name in ENFORCED if not numbers[name].holds] == []
