"""Record the rules, severities and bounds of this version: `python scripts/record_rules.py`.

It writes `conformance/rules/VERSION.json` for `--rules VERSION`. Run it for a release; from then on the table stays as
it is. `changes_without_since` compares the code with the last table.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest_mistral_lora
from pytest_mistral_lora.conformance.finding import FORMER_RULES, RULES, Rule, version_key
from pytest_mistral_lora.conformance.rule_set import RECORDED, recorded_versions
from pytest_mistral_lora.records.files import write_text

ROOT = Path(__file__).parents[1]
CHECKS = RECORDED.parent
VERSION = ".".join(pytest_mistral_lora.__version__.split(".")[:2])
"""The version whose rules are written: a patch changes no rule."""

NOT_BOUNDS = re.compile(
    r"SHOWN|NAMED|CHUNK|BLOCK|MOST_(TRIES|NAMES|CAUSES|ROWS|CHARACTERS|WORDS|ERRORS|POSITIONS|SEQUENCES)|^_?(MOST|KEPT)$"
    r"|SECONDS|WIDTH|BYTES|BITS|HEAD|SAMPLE|ROUND$|ROW_CHARACTERS|LONGEST(_SHOWN|_BEGINNING|_OPENING)?$|FORMAT|DAYS"
    r"|UNSETTLED|^_?LARGE$|DIGITS$|PAIRS|BINS|BEHIND_ALL|^_WORDS$|LAYERS_READ|^_?SMALL$"
)
"""Names of numbers that decide how much is shown, or how it is read, and not what is found."""

LOOSER: frozenset[str] = frozenset()
"""Bounds, as the table names them, that find less than in the last version: no run turns red by them."""


def main() -> int:
    """Write the table of this version, unless it is released."""
    if not re.search(rf"^## {re.escape(VERSION)}(\.\d+)? \(unreleased\)$", changelog(), flags=re.MULTILINE):
        print(f"{VERSION} is released, or is not in CHANGELOG.md: its rules stay as they are recorded", file=sys.stderr)
        return 1
    write_text(RECORDED / f"{VERSION}.json", json.dumps(table(), indent=1) + "\n")
    return 0


def changelog() -> str:
    """Return the changelog."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def table() -> dict[str, Any]:
    """Return the rules and bounds of the code, as plain JSON data."""
    rules = {
        rule.id: {"since": rule.since, "severity": rule.severity}
        | ({"error_since": rule.error_since} if rule.error_since else {})
        for rule in RULES.values()
    }
    former = {name: list(former.rules) for name, former in FORMER_RULES.items()}
    return {"rules": rules, "former": former, "bounds": dict(bounds(CHECKS))}


def bounds(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield each number that the checks of a folder compare with, by its module and its name.

    These are the constants of modules that are numbers or tables of numbers, and the numbers of a call that names a
    rule, such as `FileFault("rendered", "ML639", Bound(10, 0.1))`. A number within a function is not seen.
    """
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if not isinstance(target, ast.Name) or value is None or NOT_BOUNDS.search(target.id):
                continue
            if _is_number(value):
                yield f"{module}:{target.id}", ast.unparse(value)
            for call in (part for part in ast.walk(value) if isinstance(part, ast.Call)):
                words = [str(part.value) if isinstance(part, ast.Constant) else ast.unparse(part) for part in call.args]
                last = max((at for at, word in enumerate(words) if re.fullmatch(r"ML\d{3}", word)), default=-1)
                numbers = [part for part in ast.walk(call) if isinstance(part, ast.Constant) and _is_number(part)]
                if numbers and last >= 0:
                    given = [*call.args, *(word.value for word in call.keywords)]
                    found = [ast.unparse(part) for part in given if any(map(_is_number, ast.walk(part)))]
                    yield f"{module}:{' '.join(words[: last + 1])}", ", ".join(found)


def _is_number(node: ast.AST) -> bool:
    """Return whether an expression is a number, a calculation with numbers, or a table or a tuple of them."""
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.BinOp):
        return _is_number(node.left) and _is_number(node.right)
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand)
    if isinstance(node, ast.Dict):
        return bool(node.values) and all(map(_is_number, node.values))
    return isinstance(node, ast.Tuple) and bool(node.elts) and all(map(_is_number, node.elts))


def marked_versions(module: str, folder: Path = CHECKS) -> set[str]:
    """Return the versions that a module gives its findings: the texts of `since=`."""
    path = folder.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        return set()
    return {
        word.value.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg == "since" and isinstance(word.value, ast.Constant)
    }


def changes_without_since(
    version: str,
    recorded: Mapping[str, Any],
    rules: Iterable[Rule],
    numbers: Mapping[str, Any],
    *,
    looser: Iterable[str] = (),
    folder: Path = CHECKS,
) -> list[str]:
    """Return each change since a version that a run by its rules would not notice as one.

    Args:
        version: The version of the table.
        recorded: The table.
        rules: The rules now.
        numbers: The bounds now.
        looser: The names of bounds that find less than before, which turns no run red.
        folder: The folder of the modules that have the bounds.
    """

    def is_new(since: str) -> bool:
        return version_key(since) > version_key(version)

    now, found = {rule.id: rule for rule in rules}, list[str]()
    before: Mapping[str, Any] = recorded["rules"]
    for name, rule in now.items():
        if name not in before:
            if not is_new(rule.since):
                found.append(
                    f"{name}: since = {rule.since!r}, and {version} does not have it; expected a later version"
                )
            continue
        if rule.since != before[name]["since"]:
            found.append(f"{name}: since = {rule.since!r}; {version} recorded {before[name]['since']!r}")
        is_stronger = (before[name]["severity"], rule.severity) == ("note", "error")
        if is_stronger and not (rule.error_since and is_new(rule.error_since)):
            found.append(f"{name}: a note became an error; expected error_since, a version after {version}")
    gone = before.keys() - now.keys() - FORMER_RULES.keys()
    found += [f"{name}: it is gone, and FORMER_RULES does not name what replaces it" for name in sorted(gone)]
    for name, value in recorded["bounds"].items():
        module = name.partition(":")[0]
        if numbers.get(name) == value or name in looser or any(map(is_new, marked_versions(module, folder))):
            continue
        found.append(
            f"{name}: {numbers.get(name)}; {version} recorded {value}. Expected a finding with since= a later version "
            "for what the old bound would not have found, in that module"
        )
    return found


def last_recorded() -> tuple[str, dict[str, Any]]:
    """Return the last recorded version and its table."""
    version = recorded_versions()[-1]
    return version, json.loads((RECORDED / f"{version}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
