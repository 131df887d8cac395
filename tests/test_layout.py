from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import pytest_mistral_lora
from pytest_mistral_lora.conformance.collection import SUBJECT_CHECKS

PACKAGE = "pytest_mistral_lora"
FOLDER = Path(pytest_mistral_lora.__file__).parent

BASE = {"errors", "escaping", "extras", "places"}
CHAT = BASE | {"chat"}
CHECKPOINT = CHAT | {"checkpoint"}
RECORDS = CHECKPOINT | {"records"}
MAY_IMPORT = {
    "escaping": set[str](),
    "places": {"escaping"},
    "errors": {"escaping", "places"},
    "extras": {"errors"},
    "chat": BASE,
    "checkpoint": CHAT,
    "records": CHECKPOINT,
    "programs": RECORDS,
    "training": RECORDS | {"formats", "programs"},
    "field": RECORDS | {"programs", "runners", "serving", "training", "formats", "conformance", "guarding"},
    "runners": RECORDS | {"programs"},
    "formats": RECORDS | {"programs"},  # whose registry finds the importers of trainers
    "serving": RECORDS | {"programs"},
    "environment": RECORDS | {"programs"},
    "strategies": CHAT,
    "report": CHAT | {"records"},
    "conformance": RECORDS | {"formats"},
    "assertions": RECORDS | {"conformance", "formats"},
    "judging": RECORDS | {"conformance", "formats", "report"},
    "guarding": RECORDS | {"conformance", "formats", "judging", "runners", "programs"},
    "plugin": RECORDS | {"conformance", "report", "environment", "starter"},
    "starter": RECORDS | {"formats", "training", "conformance"},
    "cli": RECORDS
    | {
        "conformance",
        "report",
        "training",
        "runners",
        "formats",
        "starter",
        "environment",
        "judging",
        "programs",
        "serving",
    },
}
MAY_IMPORT_AS_ENTRY = {"training.__main__": {"cli"}}
"""Launchers such as `accelerate launch -m` start a module: it is the verb `train` under another name."""
MAY_NAME_FORMATS = {"chat.kinds.conversation": {"formats"}}
"""Formats stand on `chat`. This module alone asks them for the name of a format, for the error of a foreign row."""
MAY_IMPORT_LATE = {
    "": {
        "chat",
        "checkpoint",
        "conformance",
        "errors",
        "guarding",
        "judging",
        "records",
        "training",
    },  # the public names: for type checkers, and on first use
    "conformance": {"training", "runners", "serving", "strategies", "report", "environment", "programs"},
    # what writes an export is loaded by its name, and is of these classes
    "runners": {"training"},
    "serving": {"training"},
}
MAY_NOT_IMPORT = {
    "conformance.merged": {"training"},  # it judges what `training.merge` writes, by a sum of its own
}
"""Arrows that the picture allows for a room, and a part of it does without."""
NEVER = {
    "escaping": {"*"},
    "places": {"*"},
    "errors": {"*"},
    "extras": {"*"},
    "chat": {"torch", "pytest", "hypothesis"},
    "checkpoint": {"pytest", "hypothesis"},
    "records": {"pytest", "hypothesis"},
    "report": {"torch", "pytest", "hypothesis"},
    "strategies": {"torch", "pytest"},
    "training": {"pytest", "_pytest", "hypothesis"},
    "runners": {"pytest", "_pytest", "hypothesis"},
    "formats": {"torch", "pytest", "_pytest", "hypothesis"},
    "serving": {"torch", "pytest", "_pytest", "hypothesis"},
    "field": {"pytest", "_pytest", "hypothesis"},
    "programs": {"torch", "pytest", "_pytest", "hypothesis"},
    "starter": {"torch", "pytest", "_pytest", "hypothesis"},
    "conformance": {"pytest", "_pytest"},
    "assertions": {"pytest", "_pytest"},
    "judging": {"pytest", "_pytest"},
    "guarding": {"pytest", "_pytest", "hypothesis"},
    "plugin": {"_pytest"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors", "hypothesis", "mistral_common"}
LIGHT = ("chat", "conformance", "assertions", "judging", "plugin", "report", "cli")
ORACLE = "chat.oracle.oracle"
WHOLE = {ORACLE, "chat.oracle.quick_tekken"}
"""The oracle and what loads its files, which it imports."""
REPRODUCTIONS = "field.facts.reproductions."
"""Scripts that run in other environments, which have the libraries of a fact, and not this package."""
READERS = {"chat.oracle.answer_decoder", "chat.oracle.answer_grammar", "chat.kinds.fim.encoder"}
"""They call the decoder, the grammar and the request of a gap of mistral-common, which the oracle does without."""


@dataclass(frozen=True)
class Import:
    name: str
    late: bool
    line: int


@cache
def _imports(source: str) -> tuple[Import, ...]:
    return tuple(_walk(ast.parse(source), late=False))


def _walk(node: ast.AST, *, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, late, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = "." * child.level + (child.module or "")
            yield from (Import(f"{module}.{alias.name}", late, child.lineno) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from (found for part in child.body for found in _walk(ast.Module([part], []), late=True))
            yield from (found for part in child.orelse for found in _walk(ast.Module([part], []), late=late))
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, late=late or function)


def _violations(module: str, source: str) -> list[str]:
    """Arrows of a module (`chat.rows`) against the picture."""
    room = module.partition(".")[0]
    found = []
    for one in _imports(source):
        place = f"{module}:{one.line} imports {one.name}"
        top, _, rest = one.name.partition(".")
        if module.startswith(REPRODUCTIONS):
            found += [f"{place}: a reproduction runs where this package is not installed"] if top == PACKAGE else []
            continue
        if top == PACKAGE:
            found += _own_violations(module, one, rest.partition(".")[0], place)
        else:
            found += _foreign_violations(module, room, one, top, place)
    return found


def _own_violations(module: str, one: Import, other: str, place: str) -> Iterator[str]:
    room = module.partition(".")[0]
    if other in (room, "__version__"):
        return
    allowed = (
        MAY_IMPORT.get(room, set())
        | MAY_IMPORT_AS_ENTRY.get(module, set())
        | ((MAY_IMPORT_LATE.get(room, set()) | MAY_NAME_FORMATS.get(module, set())) if one.late else set())
    )
    for part, refused in MAY_NOT_IMPORT.items():
        if f"{module}.".startswith(f"{part}.") and other in refused:
            yield f"{place}: {part} may not import {other}"
    if other not in allowed:
        yield f"{place}: {room or 'the package itself'} may not import {other}{'' if one.late else ' at the top'}"


def _foreign_violations(module: str, room: str, one: Import, top: str, place: str) -> Iterator[str]:
    if one.name.startswith("."):
        yield f"{place}: a relative import"
    if top == "mistral_common" and module not in WHOLE | READERS:
        yield f"{place}: only {ORACLE} imports mistral_common"
    if top in NEVER.get(room, set()) or ("*" in NEVER.get(room, set()) and top not in sys.stdlib_module_names):
        yield f"{place}: {room} never imports {top}"
    if not one.late and top in HEAVY and room in LIGHT and not (module in WHOLE and top == "mistral_common"):
        yield f"{place}: {top} at the top of a light module"
    if not one.late and room == "plugin" and top not in sys.stdlib_module_names | {"pytest"}:
        yield f"{place}: an inactive plugin imports the standard library and pytest only"


@cache
def _modules() -> dict[str, str]:
    sources = {}
    for path in sorted(FOLDER.rglob("*.py")):
        parts = path.relative_to(FOLDER).with_suffix("").parts
        sources[".".join(part for part in parts if part != "__init__")] = path.read_text(encoding="utf-8")
    return sources


def test_every_room_is_in_the_picture() -> None:
    rooms = {name.partition(".")[0] for name in _modules()} - {""}
    assert {"errors", "chat", "checkpoint", "records", "conformance", "plugin", "training"} <= rooms
    assert rooms <= MAY_IMPORT.keys()


def test_no_class_name_is_used_twice() -> None:
    homes: dict[str, list[str]] = {}
    for module, source in _modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_no_import_goes_against_the_picture() -> None:
    assert [found for module, source in _modules().items() for found in _violations(module, source)] == []


def test_no_imports_run_in_a_circle() -> None:
    """Nor those within functions: such an import may save time, but a module that stands on itself has no place."""
    order = _order(_modules())
    assert order.index("errors") < order.index("chat.rows") < order.index("conformance.mask.checks")
    # the names of subjects are a table, and import each subject by its name
    assert (
        order.index("conformance.checks")
        < order.index("conformance.mask.checks")
        < order.index("conformance.collection")
    )


@pytest.mark.parametrize(
    "back",
    [
        f"import {PACKAGE}.chat.a",
        f"def f():\n    import {PACKAGE}.chat.a",
        f"def f():\n    from {PACKAGE}.chat import a",
        f"if TYPE_CHECKING:\n    from {PACKAGE}.chat.a import x",
    ],
    ids=["top", "function", "module", "types"],
)
def test_a_circle_is_found(back: str) -> None:
    modules = {"chat.a": f"from {PACKAGE}.chat.b import x", "chat.b": back}
    with pytest.raises(CycleError):
        _order(modules)
    assert _order({**modules, "chat.b": "import json"}) == ["chat.b", "chat.a"]


def test_a_circle_through_the_table_of_subjects_is_found() -> None:
    with pytest.raises(CycleError):
        _order({**_modules(), "conformance.checks": f"import {PACKAGE}.conformance.collection"})


def _order(modules: dict[str, str]) -> list[str]:
    """Return the modules in an order in which each comes after all that it imports at any time."""
    graph = {name: _imported_modules(source, modules) - {name} for name, source in modules.items()}
    if "conformance.collection" in graph:
        graph["conformance.collection"] |= {f"conformance.{module}" for module, _ in SUBJECT_CHECKS.values()}
    return list(TopologicalSorter(graph).static_order())


def _imported_modules(source: str, modules: dict[str, str]) -> set[str]:
    """Return the modules of a source's imports: the name itself if it is a module, or else the one that holds it."""
    names = {one.name.removeprefix(f"{PACKAGE}.") for one in _imports(source)}
    return {name if name in modules else name.rpartition(".")[0] for name in names} & (modules.keys() - {""})


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("chat.rows", "from pytest_mistral_lora.records.files import read_json", "chat may not import records"),
        (
            "chat.rows",
            "def f():\n    from pytest_mistral_lora.checkpoint import pins",
            "chat may not import checkpoint",
        ),
        ("chat.rows", "from pytest_mistral_lora.formats import recognition", "chat may not import formats at the top"),
        ("chat.fields", "def f():\n    import pytest_mistral_lora.formats.recognition", "chat may not import formats"),
        ("errors", "from pytest_mistral_lora.chat import rows", "errors may not import chat"),
        ("errors", "import yaml", "errors never imports yaml"),
        ("checkpoint.base", "import pytest_mistral_lora.records.files", "checkpoint may not import records"),
        ("records.verify", "from pytest_mistral_lora.conformance import rules", "records may not import conformance"),
        ("field.facts.reproductions.x", "import pytest_mistral_lora", "this package is not installed"),
        ("training.loop", "def f():\n    import pytest", "training never imports pytest"),
        ("training.loop", "def f():\n    from hypothesis import given", "training never imports hypothesis"),
        ("training.run", "from pytest_mistral_lora.plugin import options", "training may not import plugin"),
        (
            "training.run",
            "def f():\n    from pytest_mistral_lora.conformance import laws",
            "may not import conformance",
        ),
        ("training.run", "from pytest_mistral_lora.cli import main", "training may not import cli"),
        ("plugin.suite", "def f():\n    from pytest_mistral_lora.cli import main", "plugin may not import cli"),
        ("runners.trl", "from pytest_mistral_lora.training import loop", "runners may not import training"),
        ("strategies", "from pytest_mistral_lora.records import files", "strategies may not import records"),
        ("report.html", "from pytest_mistral_lora.conformance import rules", "report may not import conformance"),
        ("conformance.train", "from pytest_mistral_lora.training import run", "training at the top"),
        (
            "conformance.merged.product",
            "def f():\n    from pytest_mistral_lora.training.merge.plan import plan_merge",
            "conformance.merged may not import training",
        ),
        ("conformance.mask", "from pytest_mistral_lora.strategies import rows", "strategies at the top"),
        ("conformance.mask", "if 1:\n    try:\n        import torch\n    except E: pass", "torch at the top"),
        ("conformance.mask", "class A:\n    import hypothesis", "hypothesis at the top"),
        ("conformance.mask", "def f():\n    import pytest", "conformance never imports pytest"),
        ("conformance.mask", "def f():\n    import mistral_common", f"only {ORACLE} imports mistral_common"),
        ("chat.template", "from transformers import AutoTokenizer", "transformers at the top"),
        ("chat.oracle.answer_decoder", "import mistral_common", "mistral_common at the top"),
        (ORACLE, "import transformers", "transformers at the top"),
        (ORACLE, "def f():\n    import torch", "chat never imports torch"),
        ("assertions", "import peft", "peft at the top"),
        ("plugin.summary", "import rich", "standard library and pytest only"),
        ("plugin.items", "import torch.nn as nn", "torch at the top"),
        ("plugin.items", "from _pytest.nodes import Node", "plugin never imports _pytest"),
        ("plugin.items", "from ..chat import rows", "a relative import"),
        ("plugin.items", "if not TYPE_CHECKING:\n    import torch", "torch at the top"),
        ("plugin.items", "if TYPE_CHECKING:\n    x = 1\nelse:\n    import torch", "torch at the top"),
        ("", "from pytest_mistral_lora.chat import rows", "the package itself may not import chat at the top"),
    ],
)
def test_an_arrow_against_the_picture_is_found(module: str, source: str, words: str) -> None:
    assert any(words in violation for violation in _violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (ORACLE, "import mistral_common"),
        ("conformance.train", "def f():\n    from pytest_mistral_lora.training import run"),
        ("conformance.mask", "async def f():\n    import hypothesis"),
        ("records.goldens", "from pytest_mistral_lora.chat import rows"),
        ("records.manifest", "from pytest_mistral_lora import __version__"),
        ("plugin.items", "if TYPE_CHECKING:\n    import torch"),
        ("training.loop", "import torch"),
        ("training.__main__", "from pytest_mistral_lora.cli import main"),
        ("cli.train", "def f():\n    from pytest_mistral_lora.training.run import train"),
    ],
)
def test_an_arrow_of_the_picture_is_fine(module: str, source: str) -> None:
    assert _violations(module, source) == []


def test_no_room_has_a_name_for_a_module_and_for_something_else() -> None:
    for path in FOLDER.rglob("__init__.py"):
        room = import_module(".".join((PACKAGE, *path.parent.relative_to(FOLDER).parts)))
        for name in {module.stem for module in path.parent.glob("*.py")} - {"__init__", "__main__"}:
            # `from room import name` would give the one or the other, by the order of imports
            assert isinstance(getattr(room, name, room), ModuleType), f"{room.__name__}.{name}"


def test_each_module_of_the_tests_has_a_name_that_no_other_has() -> None:
    # pytest puts their folders on one path: of two modules, a test would import the one that was first
    names = Counter(path.stem for path in Path(__file__).parent.rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} == {"conftest"}
