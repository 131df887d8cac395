"""The YAML of a recipe: read within bounds, as plain data with the line of each field, and changed in one value."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pytest_mistral_lora.chat.reading import opened
from pytest_mistral_lora.chat.reading.plain_yaml import PlainLoader
from pytest_mistral_lora.errors import RecipeError, did_you_mean, shortened
from pytest_mistral_lora.places import NOWHERE, Place

Field = tuple[str | int, ...]
"""A field of a recipe: its keys and positions, from the outside in."""

_DATA_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_MOST_BYTES = 1 << 20
_MOST_VALUES = 50_000
_DEEPEST = 32
_INT64 = 1 << 63
_TEXT = "tag:yaml.org,2002:str"
_TYPES = {_TEXT, *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))}


def read_yaml(path: Path, content: bytes | None = None) -> tuple[Any, dict[Field, int]]:
    """Return the content of a YAML file as plain JSON data, and the line of each of its fields.

    A date stays text, as in the file: JSON has no dates.

    Args:
        path: The file.
        content: Its bytes, or the first ones of a file that is too large; None to read it.

    Raises:
        RecipeError: If the file cannot be read, is not YAML, is larger or deeper than a recipe, names a key twice, or
            holds a value that JSON does not have.
    """
    if path.suffix.lower() in _DATA_SUFFIXES:
        step = f"Write a recipe for it: mistral-lora init {shlex.quote(str(path))} --base OWNER/NAME"
        raise RecipeError("this is data", place=str(path), expected="a recipe (recipe.yaml)", next_step=step)
    try:
        data = _read(path) if content is None else content
        if len(data) > _MOST_BYTES:
            raise RecipeError(f"has more than {_MOST_BYTES:,} bytes", place=str(path), expected="a recipe")
        return _parse(data.decode("utf-8-sig"), path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text: {error}"
        raise RecipeError(f"cannot be read: {reason}", place=str(path)) from error


def _read(path: Path) -> bytes:
    if not path.is_file():
        # a pipe or a device may have no end
        hint = did_you_mean(path.name, [file.name for file in path.parent.glob("*.y*ml")])
        found = "is not a file" if path.exists() else f"No such file{hint}"
        raise RecipeError(found, place=str(path), expected="a recipe")
    with opened(path) as file:
        return file.read(_MOST_BYTES + 1)


_YAML_STEPS = {
    r"'\t'": "Indent with spaces: YAML takes no tab.",
    "block end": "Indent the line as those of its list or mapping.",
    "mapping values": "Indent the line as its neighbours, or quote a text with a colon.",
}
"""What to do about a line that is not YAML, by words of PyYAML's reason."""


def _parse(text: str, path: Path) -> tuple[Any, dict[Field, int]]:
    try:
        depth = 0
        # PyYAML composes recursively, but reads events in a loop
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise _error(path, event, f"more than {_DEEPEST} levels deep")
        reader = _Reader(text, path)
        try:
            node = reader.get_single_node()
            return (None if node is None else reader.plain(node)), reader.lines
        finally:
            reader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        lines = text.splitlines()
        line = lines[mark.line] if mark and mark.line < len(lines) else ""
        step = next((step for word, step in _YAML_STEPS.items() if word in reason), "")
        raise RecipeError(
            f"not valid YAML: {reason}{line and f': {shortened(line)}'}",
            place=Place.of(path, line=mark.line + 1 if mark else None),
            next_step=step,
        ) from error


def _error(path: Path, at: Any, found: str, field: Field = (), expected: str = "") -> RecipeError:
    return RecipeError(found, place=at_field(Place.of(path, line=at.start_mark.line + 1), field), expected=expected)


class _Reader(PlainLoader):
    """Makes plain data of YAML nodes."""

    def __init__(self, text: str, path: Path) -> None:
        super().__init__(text)
        self._path = path
        self._values = 0
        self.lines: dict[Field, int] = {}

    def plain(self, node: yaml.Node, field: Field = (), above: tuple[yaml.Node, ...] = ()) -> Any:
        """Return a node's value.

        Args:
            node: The node.
            field: Its place.
            above: The nodes that hold it.

        Raises:
            RecipeError: If the node holds itself, or a value that a recipe cannot have.
        """
        self._values += 1
        self.lines.setdefault(field, node.start_mark.line + 1)
        if node in above:
            raise _error(self._path, node, "refers to itself", field)
        # aliases of aliases turn a few lines into millions of values:
        # https://en.wikipedia.org/wiki/Billion_laughs_attack
        if self._values > _MOST_VALUES:
            raise _error(self._path, node, f"more than {_MOST_VALUES:,} values, aliases included")
        above = (*above, node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, field, above)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.plain(item, (*field, index), above) for index, item in enumerate(node.value)]
        return self._scalar(node, field)

    def _mapping(self, node: yaml.MappingNode, field: Field, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        if node.tag != "tag:yaml.org,2002:map":
            raise _error(self._path, node, f"has the type {node.tag}", field, "a mapping")
        seen: set[str] = set()
        for key, _ in node.value:
            # YAML forbids equal keys, and PyYAML keeps the last of them (https://github.com/yaml/pyyaml/issues/165)
            if isinstance(key, yaml.ScalarNode) and key.tag == _TEXT and key.value in seen:
                raise _error(self._path, key, f"the key {shown(key.value)} appears twice", field)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        self.flatten_mapping(node)  # `<<: *defaults`: PyYAML puts the keys of the other mapping first
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != _TEXT:
                kind = "a text in quotes" if isinstance(key, yaml.ScalarNode) else "a text"
                text = shown(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                raise _error(self._path, key, f"the key is {text}", field, f"{kind} as key")
            self.lines[*field, key.value] = key.start_mark.line + 1
            found[key.value] = self.plain(value, (*field, key.value), above)
        return found

    def _scalar(self, node: yaml.Node, field: Field) -> Any:
        if node.tag == "tag:yaml.org,2002:timestamp":
            return node.value
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _TYPES:
            raise _error(self._path, node, f"has the type {node.tag}", field, "text, a number, true, false or null")
        try:
            value = self.construct_object(node)
        # an explicit tag on another text, such as `!!bool x`; and int() refuses thousands of digits
        except (ValueError, LookupError, yaml.MarkedYAMLError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _error(self._path, node, f"{shown(node.value)} cannot be read as {kind}", field) from error
        found = unusable(value)
        if found:
            raise _error(self._path, node, found, field)
        return value


def with_base_value(text: str, key: str, value: str, after: str) -> str:
    """Return a recipe's text with a value of its base; a missing key is put after another key of the base."""
    base = _entry_of(yaml.compose(text, Loader=yaml.SafeLoader), "base")[1]
    for name, node in base.value:
        if name.value == key:
            # the marks of an empty value point at the place after it
            before = text[: node.start_mark.index].rstrip(" ") if not node.value else text[: node.start_mark.index]
            space = "" if before.endswith(" ") else " "
            return f"{before}{space}{value}{text[node.end_mark.index :]}"
    first, node = _entry_of(base, after)
    end = node.end_mark.index
    if base.flow_style:
        return f"{text[:end]}, {key}: {value}{text[end:]}"
    # on a new line, after the comment on the other key's line
    line_end = text.find("\n", end)
    line_end = len(text) if line_end < 0 else line_end
    return f"{text[:line_end]}\n{' ' * first.start_mark.column}{key}: {value}{text[line_end:]}"


def _entry_of(mapping: Any, key: str) -> tuple[yaml.Node, yaml.MappingNode]:
    for name, node in mapping.value:
        if name.value == key:
            return name, node
    # a merge key, `<<: *base`, has the value elsewhere
    raise RecipeError(
        f"{shown(key)} is not written out", place=NOWHERE / "base", expected=f"{key}: as a key of its own, to be pinned"
    )


def unusable(value: Any) -> str:
    """Return why a recipe cannot have a scalar value in any field; empty if it can."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}: not a finite number"
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        return f"{shown(value)}: more than 64 bits"
    if isinstance(value, str) and re.search("[\\x00\\ud800-\\udfff]", value):
        return f"{shown(value)}: a null character, or half of a surrogate pair"
    return ""


def shown(value: Any) -> str:
    """Return a value as a message shows it: at most some hundred characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a number of {value.bit_length()} bits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def at_field(place: Place, field: Sequence[str | int]) -> Place:
    """Return the place of a field of a recipe, as messages name it: `recipe.yaml, data.train.0`."""
    steps = map(str, field)
    return place.within(*(step if step.isprintable() and len(step) <= 80 else shown(step) for step in steps))


def below(outer: Place, inner: Place) -> Place:
    """Return the place of an error at a value that a recipe names: `recipe.yaml, data.train.0, rows.jsonl:3`.

    Args:
        outer: The recipe, or its field.
        inner: A place in the named file, or in the recipe.
    """
    if not inner.source.name:
        return outer.within(*inner.part)
    return replace(inner, source=replace(inner.source, name=f"{outer}, {inner.source.name}"))
