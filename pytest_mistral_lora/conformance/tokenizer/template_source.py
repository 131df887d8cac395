"""What a chat template would do, read from its syntax tree and from one rendering that notes what it misses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_CLOCK = ("strftime_now", "now", "datetime", "date_today")
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


def clock_reads(source: str) -> list[str]:
    """Return the names by which a template asks for the time, in order.

    Raises:
        jinja2.TemplateError: If it is not a template.
    """
    from jinja2 import nodes

    calls = (call.node for call in _tree(source).find_all(nodes.Call))
    return sorted({call.name for call in calls if isinstance(call, nodes.Name) and call.name in _CLOCK})


def forbidden_access(source: str) -> list[str]:
    """Return what a template asks for that no chat template needs: private attributes, other templates.

    Raises:
        jinja2.TemplateError: If it is not a template.
    """
    from jinja2 import nodes

    tree = _tree(source)
    loads = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    found = [f"the attribute {name!r}" for name in _attributes(tree) if name.startswith("__")]
    return [*dict.fromkeys(found), *("another template" for _ in tree.find_all(loads))]


def _attributes(tree: Any) -> Iterator[str]:
    from jinja2 import nodes

    for get in tree.find_all(nodes.Getattr):
        yield get.attr
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str):
            yield item.arg.value
    for one in tree.find_all(nodes.Filter):
        if one.name in ("attr", "map"):
            yield from (arg.value for arg in one.args if isinstance(arg, nodes.Const) and isinstance(arg.value, str))


def printed_unknowns(source: str, renderings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names that a template prints though nothing gives them, which leaves a hole in the text.

    Only for a template that has been rendered within bounds with the same variables.
    """
    from jinja2 import Undefined

    missing: list[str] = []

    class Noting(Undefined):
        """Notes that it was printed."""

        def __str__(self) -> str:
            if self._undefined_obj is _missing_object():
                missing.append(str(self._undefined_name))
            return ""

    environment = _environment().overlay(undefined=Noting)
    template = environment.from_string(source)
    for variables in renderings:
        template.render({**dict.fromkeys(_GIVEN), **variables})
    return sorted(set(missing))


def _missing_object() -> Any:
    from jinja2.utils import missing

    return missing


def _environment() -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment


def _tree(source: str) -> Any:
    return _environment().parse(source)
