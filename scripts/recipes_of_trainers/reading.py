"""Reads the keys of a recipe with their lines: of YAML, of the calls of a notebook or script, of a shell's options."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

Keys = dict[str, dict[str, Any]]
"""The value and the line of each key, by its dotted name: `{"peft.dim": {"value": 8, "line": 53}}`."""


def keys_of(path: str, text: str) -> Keys:
    """Return the keys of a file: the first occurrence of each.

    Args:
        path: Its path, by whose ending it is read.
        text: Its text.
    """
    if path.endswith((".yml", ".yaml")):
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return {} if node is None else dict(_of_node(node, ""))
    if path.endswith(".sh"):
        return _of_shell(text)
    found: Keys = {}
    for source, lines in _sources(path, text):
        for name, value, line in _of_source(source):
            found.setdefault(name, {"value": value, "line": lines[line - 1]})
    return found


def _of_node(node: yaml.Node, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{name}.{key.value}" if name else str(key.value)
            if isinstance(value, yaml.ScalarNode) or _is_flat(value):
                yield inner, {"value": _plain(value), "line": key.start_mark.line + 1}
            else:
                yield from _of_node(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _of_node(item, f"{name}[{index}]")
    else:
        yield name, {"value": _plain(node), "line": line}


def _is_flat(node: yaml.Node) -> bool:
    return isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value)


def _plain(node: yaml.Node) -> Any:
    return yaml.SafeLoader("").construct_object(node, deep=True)


def _of_shell(text: str) -> Keys:
    found: Keys = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = shlex.split(line.rstrip("\\ "), comments=True) if "--" in line else []
        for index, word in enumerate(words):
            if word.startswith("--"):
                following = words[index + 1] if index + 1 < len(words) else ""
                value = True if not following or following.startswith("--") else following
                found.setdefault(word.removeprefix("--"), {"value": value, "line": number})
    return found


def _sources(path: str, text: str) -> Iterator[tuple[str, list[int]]]:
    """Yield each Python source of a file, with the file's line of each of its lines."""
    if path.endswith(".py"):
        yield text, list(range(1, text.count("\n") + 2))
        return
    # each line of a cell is a string on a line of the file
    written = [(number, _as_string(line)) for number, line in enumerate(text.split("\n"), start=1)]
    following = iter([(number, string) for number, string in written if string is not None])
    for cell in json.loads(text)["cells"]:
        parts = cell["source"] if isinstance(cell["source"], list) else [cell["source"]]
        places = []
        for part in parts:
            number = next(number for number, string in following if string == part)
            places += [number] * max(1, len(part.splitlines()))
        if cell["cell_type"] == "code":
            # a magic is not Python; its line stays, so that the lines of the others are right
            yield re.sub(r"^([ \t]*)[%!].*", r"\1pass", "".join(parts), flags=re.MULTILINE), places


def _as_string(line: str) -> str | None:
    line = line.strip().removeprefix('"source": ').removeprefix("[").removesuffix("]").strip().removesuffix(",")
    if not line.startswith('"'):
        return None
    try:
        return str(json.loads(line))
    except ValueError:
        return None


def _of_source(source: str) -> Iterator[tuple[str, Any, int]]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return  # a cell of another language, or text
    constants: dict[str, Any] = {}
    for node in _nodes(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                name = ast.unparse(target)
                if isinstance(target, ast.Name) and _is_constant(node.value):
                    constants[name] = ast.literal_eval(node.value)
                    yield name, constants[name], node.lineno
                elif isinstance(node.value, ast.Attribute) or isinstance(target, ast.Attribute | ast.Subscript):
                    yield name, ast.unparse(node.value), node.lineno
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            yield called, _positional(node, constants), node.lineno
            for keyword in node.keywords:
                if keyword.arg is not None:
                    value = keyword.value
                    known = constants.get(value.id, value.id) if isinstance(value, ast.Name) else None
                    if known is None:
                        known = ast.literal_eval(value) if _is_constant(value) else None
                    yield f"{called}({keyword.arg})", known, value.lineno
        if isinstance(node, ast.Dict):
            yield from _of_dict(node)


def _of_dict(node: ast.Dict) -> Iterator[tuple[str, Any, int]]:
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and _is_constant(value):
            yield f"{{{key.value}}}", ast.literal_eval(value), value.lineno


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes in the order of the text, but for those below `if False:`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and not node.test.value:
            continue
        yield node
        yield from _nodes(node)


def _positional(call: ast.Call, constants: Mapping[str, Any]) -> Any:
    """Return the first argument of a call that is no keyword, if it is a constant."""
    if not call.args:
        return None
    first = call.args[0]
    if isinstance(first, ast.Name):
        return constants.get(first.id)
    return ast.literal_eval(first) if _is_constant(first) else None


def _is_constant(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return False
    return True
