"""A place is a value: no code parses its text, and none takes a finding and returns it with another text or place."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import pytest_mistral_lora

FOLDER = Path(pytest_mistral_lora.__file__).parent

OF_TEXTS = {
    *("partition", "rpartition", "split", "rsplit", "splitlines", "removeprefix", "removesuffix", "replace"),
    *("startswith", "endswith", "find", "rfind", "index", "rindex"),
}
"""Methods that take a text apart."""
OF_PATTERNS = {"match", "search", "fullmatch", "sub", "subn", "split", "findall", "finditer"}
SHOWS = {"str", "repr", "printable", "one_line", "shortened"}
"""Functions that make a text of a place, or of its text."""
COPIES = {"replace", "under"}
"""`dataclasses.replace`, and `Finding.under`."""
WORDS = {"found", "expected", "detail", "place", "others"}
"""The fields of a finding that say what it found, and where."""

PARSES = {
    "conformance/groups.py: headline": "leaves the folders of a path out of a line that is too long",
}
"""Functions that take the text of a place apart, each with its reason."""
REWRITES = {
    "conformance/known.py: _with_passed_dates": "names the deviations whose dates have passed: to be a field",
    "conformance/server/shown.py: _shown": "bounds the words of a hostile server and hides its key, wherever they are",
}
"""Functions that return a finding with other words, each with its reason."""
NO_FINDINGS = {
    "conformance/encoded/line_judge.py: _read": "a line that was read back",
    "conformance/adapter/layout.py: adapter_layout": "a layout, with the tensors that it expects",
    "conformance/encoded/lines.py: lines": "the reader of a record",
    "conformance/encoded/template_cause.py: _read": "a row that was read back",
    "records/verify.py: _base_fields": "a mismatch of a manifest",
    "runners/given_rows.py: by_line": "a row",
}
"""Functions that copy something else with a new `place`, `found` or `expected`."""


def is_place(node: ast.expr) -> bool:
    named = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return named == "place"


def is_text_of_place(node: ast.expr, texts: set[str]) -> bool:
    """Return whether an expression is the text of a place, by the names that hold such texts."""
    match node:
        case ast.Name(id=name):
            return name in texts
        case ast.Attribute(attr="name", value=ast.Attribute(attr="source")):
            return True
        case ast.Attribute(attr="place"):
            return True
        case ast.Subscript(slice=ast.Constant(value="place")):
            return True
        case ast.Subscript(value=value):
            return is_text_of_place(value, texts)
        case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name in SHOWS:
            return is_place(first) or is_text_of_place(first, texts)
        case ast.JoinedStr(values=values):
            return any(
                is_place(part.value) or is_text_of_place(part.value, texts)
                for part in values
                if isinstance(part, ast.FormattedValue)
            )
    return False


def texts_of_places(function: ast.AST) -> set[str]:
    """Return the names in a function that hold the text of a place."""
    texts: set[str] = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        pairs = [(target, node.value) for target in node.targets]
        for target, value in list(pairs):
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs += zip(target.elts, value.elts, strict=True)
        texts |= {
            target.id for target, value in pairs if isinstance(target, ast.Name) and is_text_of_place(value, texts)
        }
    return texts


def parses(function: ast.AST) -> bool:
    """Return whether a function takes the text of a place apart."""
    texts = texts_of_places(function)
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in OF_TEXTS and is_text_of_place(node.func.value, texts):
                return True
            if node.func.attr in OF_PATTERNS and any(is_text_of_place(given, texts) for given in node.args):
                return True
    return False


def rewrites(function: ast.AST) -> bool:
    """Return whether a function copies a value with another text of a finding, or another place."""
    return any(
        isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) in COPIES
        and not WORDS.isdisjoint({keyword.arg for keyword in node.keywords})
        for node in ast.walk(function)
    )


@functools.cache
def functions() -> list[tuple[str, ast.AST]]:
    """Return each function of the package that can be one of these, with its name."""
    found: list[tuple[str, ast.AST]] = []
    for file in sorted(FOLDER.rglob("*.py")):
        lines = (text := file.read_text(encoding="utf-8")).splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                if any(word in own for word in ("place", "source.name", "under(")):
                    found.append((f"{file.relative_to(FOLDER).as_posix()}: {node.name}", node))
    return found


def test_no_text_of_a_place_is_taken_apart() -> None:
    assert {name for name, function in functions() if parses(function)} == set(PARSES)


def test_no_finding_is_returned_with_other_words_or_another_place() -> None:
    assert {name for name, function in functions() if rewrites(function)} == {*REWRITES, *NO_FINDINGS}


@pytest.mark.parametrize(
    ("line", "judge"),
    [
        ("return str(finding.place).rpartition(', ')[2]", parses),
        ("text = str(place)\n    return text.removesuffix(', chosen')", parses),
        ("text, n = printable(row.place, lines=False), 1\n    return _ROW.sub('', text)", parses),
        ("return data['place'].split(':')", parses),
        ("return f'{finding.place}:'.partition(':')", parses),
        ("return path.relative_to(place.source.name.replace('x', ''))", parses),
        ("return replace(finding, found=finding.found.replace('copy', name))", rewrites),
        ("return [replace(one, place=one.place / 'x') for one in found]", rewrites),
        ("return finding.under('ML004', place=place)", rewrites),
    ],
)
def test_a_function_that_does_so_is_seen(line: str, judge: object) -> None:
    function = ast.parse(f"def function(finding):\n    {line}\n")
    assert callable(judge)
    assert judge(function)
    plain = "return replace(finding, rule='ML004', fix=str(finding.place))"
    assert not judge(ast.parse(f"def function(finding):\n    {plain}\n"))
