"""Pages name tests that are there: a promise whose test was renamed or taken away shows nothing any more."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FEATURES = ROOT / "docs" / "features.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

NAMED = re.compile(r"(?:tests/)?((?:\w+/)?test_\w+\.py)(?:::(\w+))?")
TEST = r"`tests/(?:\w+/)?test_\w+\.py::test_\w+`"
ROW = re.compile(rf"\| [^|]+ \| {TEST}(?:, {TEST}){{0,2}} \|")


@cache
def names_in(file: str) -> frozenset[str] | None:
    """Names of the test functions of a file of ``tests/``; ``None`` where there is no such file."""
    path = ROOT / "tests" / file
    if not path.is_file():
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(part.name for part in tree.body if isinstance(part, ast.FunctionDef) and part.name[:5] == "test_")


def missing(text: str) -> list[str]:
    """Tests, and files of tests, that ``text`` names and that are not there."""
    found = []
    for file, name in NAMED.findall(text):
        tests = names_in(file)
        if tests is None:
            found.append(file)
        elif name and name not in tests:
            found.append(f"{file}::{name}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8")) == []


def test_a_test_that_is_not_there_would_be_seen() -> None:
    here = "tests/test_features.py"
    named = f"`{here}::test_a_test_that_is_not_there_would_be_seen`, `{here}::test_gone`, `tests/test_gone.py::test_a`"
    assert missing(f"{named}, {here}, test_lost.py, {here}::missing") == [
        "test_features.py::test_gone",
        "test_gone.py",
        "test_lost.py",
        "test_features.py::missing",
    ]


def test_every_promise_has_one_to_three_tests() -> None:
    """And is made once."""
    lines = FEATURES.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|") and line not in ("| promise | tests |", "|---|---|")]
    assert len(rows) > 100
    assert [row for row in rows if not ROW.fullmatch(row)] == []
    promises = [row.split(" | ")[0] for row in rows]
    assert len(set(promises)) == len(promises)
