"""The part of a trainer's configuration that its script gets: no key that names code, a network or an upload.

A configuration may come from somebody else, and a trainer follows it: it imports files, fetches, and uploads. So a
script gets the keys of the trainer's `keys.toml` alone, and of their values only what names no code. The user's
`--allow-code` hands the file over unchanged.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.reading import read_bounded
from pytest_mistral_lora.errors import InputError, RunnerError
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    import yaml

_KEYS = Path(__file__).with_name("keys.toml")
_DEEPEST = 32
_MOST_VALUES = 50_000
_MOST_BYTES = 1 << 20

# parsers of addresses drop white space and control characters in front, and newlines and tabs anywhere
_REMOTE = re.compile(r"[\x00-\x20]*([A-Za-z][\w+.\t\r\n-]*(:[\t\r\n]*/[\t\r\n]*/|::)|REMOTE:|ONLINE\s*$)")
_NAMES_CODE = re.compile(r".*(plugin|callback|remote_code|script|hub|url|secret|password|api_key|auth_token)s?")


@dataclass
class Configuration:
    """The configuration that a script gets.

    Attributes:
        data: Its keys and values.
        left_out: The keys that may name code, a network or an upload, or that are not known here.
    """

    data: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def note(self) -> str:
        """A line about the keys that were left out; empty without one."""
        if not self.left_out:
            return ""
        return (
            f"left out of the configuration: {', '.join(self.left_out)} (may name code, a network or an upload, or is "
            "not known; if you trust the file, --allow-code, in pytest --mistral-allow-code, uses it unchanged)"
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """The configuration of a user, as its keys are taken over.

    Attributes:
        made: What the script gets.
        file: The user's file.
        lines: The line of each key at its top.
        own_data: Whether the trainer keeps the data that the configuration names.
    """

    made: Configuration
    file: Path
    lines: Mapping[str, int]
    own_data: bool

    def refusal(self, key: str, found: str) -> RunnerError:
        """Return the error about a key at the top of the file."""
        step = "Leave it out; if you trust the file, --allow-code (in pytest --mistral-allow-code) uses it unchanged."
        return RunnerError(found, place=Place.of(self.file, line=self.lines.get(key)) / key, next_step=step)

    def require_local(self, value: Any, key: str) -> None:
        """Refuse a value that names data of a network, or a script.

        Raises:
            RunnerError: With the key and its line.
        """
        for text in values_in(value):
            if isinstance(text, str) and _REMOTE.match(text):
                raise self.refusal(key, f"`{short(text)}` names a network")
            if isinstance(text, str) and Path(text).suffix == ".py":
                raise self.refusal(key, f"`{short(text)}` names code, on which ids and labels can depend")


def safe_configuration(
    file: Path, keys: Keys, require_no_code: Callable[[Reading], None], *, own_data: bool = False
) -> Configuration:
    """Return what the script of a trainer gets of a configuration.

    Args:
        file: The configuration.
        keys: The keys of the trainer.
        require_no_code: Refuses the values of kept keys that name code in the trainer's own way.
        own_data: Whether the trainer keeps the data that the configuration names.

    Raises:
        RunnerError: If the file is not plain YAML within bounds, or names code that ids and labels can depend on.
    """
    data, lines = read_configuration(file)
    made = Configuration()
    reading = Reading(made, file, lines, own_data)
    for key, value in data.items():
        if keys.refused.fullmatch(key) and is_set(value):
            raise reading.refusal(key, f"`{key}: {short(value)}` names code, on which ids and labels can depend")
        if keys.own_data.fullmatch(key):
            if own_data:
                reading.require_local(value, key)
                made.data[key] = value
        elif keys.kept.fullmatch(key):
            made.data[key] = _without_code(value, key, made.left_out)
        elif is_set(value) and not keys.quiet.fullmatch(key):
            made.left_out.append(key)
    for key, value in made.data.items():
        for text in values_in(value):
            # a URL is opened wherever a path is, also of a template
            if isinstance(text, str) and _REMOTE.match(text) and " " not in text.strip():
                raise reading.refusal(key, f"`{short(text)}` names a network")
    require_no_code(reading)
    return made


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a trainer's configuration, as patterns of whole keys.

    Attributes:
        kept: Those that decide ids and labels, and those that its command asks for: the script gets them.
        own_data: Those that name data, which the script gets if the user's own rows are judged.
        refused: Those that name code on which ids and labels can depend.
        quiet: Those of training, which change no id: they are left out without a word.
    """

    kept: re.Pattern[str]
    own_data: re.Pattern[str]
    refused: re.Pattern[str]
    quiet: re.Pattern[str]

    @classmethod
    def read(cls, file: Path | None) -> Keys:
        """Return the keys of a trainer's table; without one, the script gets nothing."""
        of_all: dict[str, str] = tomllib.loads(_KEYS.read_text(encoding="utf-8"))
        table: dict[str, str] = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
        quiet = f"{of_all['quiet']} {table.get('quiet', '')}"
        kept, own_data, refused = (_any_of(table.get(name, "")) for name in ("kept", "own_data", "refused"))
        return cls(kept, own_data, refused, _any_of(quiet))


def _any_of(words: str) -> re.Pattern[str]:
    # without a word, nothing matches
    return re.compile("|".join(words.split()) or r"(?!)")


def is_set(value: Any) -> bool:
    """Return whether a value asks for anything: `push_to_hub: false` and `report_to: none` do not."""
    return value not in (None, False, "", "none", [], {})


def short(value: Any) -> str:
    """Return a value for a message, cut."""
    return f"{value!r:.80}" if not isinstance(value, str) else f"{value:.80}"


def as_written(value: Any) -> str:
    """Return a value in the letters of YAML, on one line."""
    import yaml

    return " ".join(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").split())


def read_configuration(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the keys and values of a YAML file, and the line of each key at its top.

    Raises:
        RunnerError: If it is not plain YAML with text keys, or is too large.
    """
    import yaml

    from pytest_mistral_lora.chat.reading.plain_yaml import PlainLoader

    place = Place.of(file)
    try:
        content = read_bounded(file)
        if len(content) > _MOST_BYTES:
            raise RunnerError(f"has more than {_MOST_BYTES:,} bytes", place=place, expected="a configuration")
        text = content.decode("utf-8-sig")
        depth = 0
        # PyYAML composes recursively, but reads events in a loop
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise RunnerError(f"more than {_DEEPEST} levels deep", place=place, expected="a configuration")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_merges(node, place)
        data = yaml.load(text, Loader=PlainLoader)
    except yaml.constructor.ConstructorError as error:
        mark = error.problem_mark
        found = f"not plain YAML: {error.problem or error}"
        expected = "plain values: a tag such as !function or !!python names code"
        raise RunnerError(
            found, place=replace(place, line=mark.line + 1) if mark else place, expected=expected
        ) from error
    # a date that does not exist, an integer of thousands of digits, or a list as a key
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunnerError(f"not valid YAML: {' '.join(str(error).split()):.200}", place=place) from error
    except InputError as error:
        raise RunnerError(error.found, place=error.place, expected="a configuration") from error
    if data is None:
        return {}, {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RunnerError("no keys at its top", place=place, expected="a mapping of names to values")
    # aliases of aliases turn a few lines into millions of values, and an alias may hold itself
    if sum(1 for _ in values_in(data)) > _MOST_VALUES:
        found = f"more than {_MOST_VALUES:,} values, aliases included"
        raise RunnerError(found, place=place, expected="a configuration")
    return data, {key.value: key.start_mark.line + 1 for key, _ in getattr(node, "value", ())}


def _refuse_merges(node: yaml.Node | None, place: Place) -> None:
    """Refuse mappings that merge others (`<<`) into too many keys: PyYAML copies them before anybody can count.

    Raises:
        RunnerError: If a mapping would have more keys than a configuration, or merges itself.
    """
    import yaml

    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: tuple[int, ...] = ()) -> int:
        if id(node) in above:
            raise RunnerError(
                "refers to itself", place=replace(place, line=node.start_mark.line + 1), expected="plain values"
            )
        if id(node) not in sizes:
            inner = (*above, id(node))
            if isinstance(node, yaml.MappingNode):
                merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
                sizes[id(node)] = len(node.value) + sum(size(value, inner) for value in merged)
                for key, value in node.value:
                    size(key, inner)
                    size(value, inner)
            elif isinstance(node, yaml.SequenceNode):
                sizes[id(node)] = sum(size(value, inner) for value in node.value)
            else:
                sizes[id(node)] = 1
        if sizes[id(node)] > _MOST_VALUES:
            found = f"more than {_MOST_VALUES:,} values, aliases included"
            raise RunnerError(found, place=replace(place, line=node.start_mark.line + 1), expected="a configuration")
        return sizes[id(node)]

    if node is not None:
        size(node)


def values_in(value: Any) -> Iterator[Any]:
    """Yield each value within a value, at most one more than a configuration may have."""
    waiting, seen = [value], 0
    while waiting and seen <= _MOST_VALUES:
        value = waiting.pop()
        seen += 1
        yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value


def _without_code(value: Any, path: str, left_out: list[str]) -> Any:
    """Return a value without the keys in it that name code, a network or a secret; their paths go to a list."""
    if isinstance(value, list):
        return [_without_code(item, f"{path}[{index}]", left_out) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if _NAMES_CODE.fullmatch(str(key)):
            left_out += [f"{path}.{key}"] if is_set(item) else ()
        else:
            kept[key] = _without_code(item, f"{path}.{key}", left_out)
    return kept
