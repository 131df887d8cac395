"""The size of the house, in numbers: a smoke alarm for files, functions, names, comments and prose, not an aim."""

from __future__ import annotations

import ast
import io
import re
import statistics
import tokenize
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

import pytest_mistral_lora

FOLDER = Path(pytest_mistral_lora.__file__).parent
DATA_TABLES = {"chat/templates/deviations.py"}
"""Modules that are a table of data, which may be longer than others."""

AT_MOST = {
    # 150, and room for subjects that came after: merged models, recognised oracles, templates in a process of their
    # own, findings by cause, rows from other formats (data), paths that are recognised, rows as targets,
    # the sources of rows: opened (data), named in a recipe, found again by a manifest, GGUF files, servers,
    # the files that `init` writes, the look at an installation, reports and their writers
    "modules": 238,
    "lines of the longest module": 300,
    "lines of nine functions in ten": 30,
    "functions in 1,000 lines": 60,
    "class names that are defined twice": 0,
    "'what' in 1,000 words of docstrings": 2,
    "'where' in 1,000 words of docstrings": 2.5,
    "'say', 'said', 'tell' in 1,000 words of docstrings": 0.5,
}
AT_LEAST = {"comments in 100 lines": 2}


def counts(sources: Mapping[str, str]) -> dict[str, float]:
    """Return the counts of some modules, by path."""
    lines, functions, classes, docstrings, comments = 0, [], Counter[str](), [], 0
    for source in sources.values():
        lines += sum(bool(line.strip()) for line in source.splitlines())
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            comments += token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
            if isinstance(node, ast.ClassDef):
                classes[node.name] += 1
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                docstrings.append(ast.get_docstring(node) or "")
    words = Counter(re.findall(r"[a-z']+", " ".join(docstrings).lower()))
    tables = {path: source for path, source in sources.items() if path not in DATA_TABLES}

    def share(*counted: str) -> float:
        return 1000 * sum(words[word] for word in counted) / max(1, words.total())

    return {
        "modules": len(sources),
        "lines of the longest module": max(source.count("\n") for source in tables.values()),
        "lines of nine functions in ten": statistics.quantiles(functions, n=10)[-1],
        "functions in 1,000 lines": round(1000 * len(functions) / lines),
        "class names that are defined twice": sum(number > 1 for number in classes.values()),
        "'what' in 1,000 words of docstrings": share("what"),
        "'where' in 1,000 words of docstrings": share("where"),
        "'say', 'said', 'tell' in 1,000 words of docstrings": share("say", "says", "said", "tell", "tells"),
        "comments in 100 lines": 100 * comments / sum(source.count("\n") for source in sources.values()),
    }


@cache
def package_counts() -> dict[str, float]:
    return counts({path.relative_to(FOLDER).as_posix(): path.read_text("utf-8") for path in FOLDER.rglob("*.py")})


@pytest.mark.parametrize("name", AT_MOST)
def test_the_package_has_at_most(name: str) -> None:
    assert package_counts()[name] <= AT_MOST[name]


@pytest.mark.parametrize("name", AT_LEAST)
def test_the_package_has_at_least(name: str) -> None:
    assert package_counts()[name] >= AT_LEAST[name]


def test_what_is_too_much_is_counted() -> None:
    function = "def f():\n" + "    x = 1\n" * 40
    source = '"""What is said where."""\n' + 2 * "class A:\n    pass\n" + 2 * function
    found = counts({f"m{number}.py": source for number in range(int(AT_MOST["modules"]) + 1)})
    wrong = {name for name, most in AT_MOST.items() if found[name] > most} | {
        name for name, least in AT_LEAST.items() if found[name] < least
    }
    assert wrong == {*AT_MOST, *AT_LEAST} - {"lines of the longest module", "functions in 1,000 lines"}
    short = counts({"a.py": "def f(): pass\n" * 400})
    assert (short["lines of the longest module"], short["functions in 1,000 lines"]) == (400, 1000)
    assert counts({"a.py": '"""A."""\n# why\nx = 1\n' + "def f(): pass\n" * 2})["comments in 100 lines"] == 20
