"""Bounds for a chat template: steps, characters and seconds, counted while an instrumented copy of it renders.

A template is foreign code. Jinja's sandbox, which transformers uses, keeps it from attributes and files, but not from
nested loops, from doubling a text forty times, or from a number with a billion digits, which Jinja would even work out
while it compiles. The copy runs in transformers' own Jinja environment and stops most of these early, with a reason.
It cannot count everything that Python does: the operating system's limits (`isolated`) stop the rest. Its text is a
second opinion, which must be that of transformers' own renderer (`renderer`).
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_mistral_lora.errors import RenderError

STEPS = 500_000
CHARACTERS = 10_000_000
SECONDS = 10.0
_SOURCE_CHARACTERS = 1_000_000
_GROWS = frozenset(
    (
        *("batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust"),
        *("round", "slice", "tojson", "truncate", "urlize", "wordwrap", "xmlattr", "zfill"),
    )
)
_RANDOM = frozenset(("lipsum", "generate_lorem_ipsum", "random", "do_random"))
_FORMATS = frozenset(("format", "format_map"))
_WIDTH = re.compile(r"\d{5,}")


class OverrunError(RenderError):
    """A template that does more than a chat template ever needs."""

    def __init__(self, found: str) -> None:
        super().__init__(found, kind="overrun")


@dataclass
class RenderBudget:
    """The steps, characters and seconds that are left to one rendering.

    Attributes:
        characters: Characters that may still be made, in all intermediate results together.
        steps: Loop steps and calls that may still be made.
        deadline: Its end on the monotonic clock, in seconds.
    """

    characters: int
    steps: int = STEPS
    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)

    def spend(self, characters: int) -> None:
        """Count a step that made so many characters.

        Raises:
            OverrunError: If a bound is passed.
        """
        self.steps -= 1
        self.characters -= characters
        if self.steps < 0:
            raise OverrunError(f"the chat template takes more than {STEPS:,} steps for one row")
        if self.characters < 0:
            raise OverrunError("the chat template makes far more text than a row can need")
        if self.steps % 256 == 0 and time.monotonic() > self.deadline:
            raise OverrunError(f"the chat template takes more than {SECONDS:.0f} seconds for one row")

    def check(self, characters: int) -> None:
        """Refuse a step that would make so many characters, before it is done.

        Raises:
            OverrunError: If they are more than the characters that are left.
        """
        if characters > self.characters:
            raise OverrunError("the chat template makes far more text than a row can need")


class BoundedTemplate:
    """The instrumented copy of a template."""

    def __init__(self, source: str) -> None:
        """Compile a template.

        Raises:
            OverrunError: If it is too long, or its constants are too large to work out.
            jinja2.TemplateError: If it is not a template.
        """
        from jinja2 import nodes
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if len(source) > _SOURCE_CHARACTERS:
            raise OverrunError(f"the chat template has more than {_SOURCE_CHARACTERS:,} characters")
        self._budget = RenderBudget(CHARACTERS)
        environment: Any = _compile_jinja_template("").environment.overlay(optimized=False)
        environment.intercepted_binops = frozenset(("+", "*", "**", "%"))
        environment.call_binop = self._binop
        environment.call = functools.partial(self._call, environment.call)
        environment.finalize = self._output
        environment.filters = {name: self._filter(name, one) for name, one in environment.filters.items()}
        # an attribute of the environment, because a template can ask for the names of filters
        environment.count_literal = self._count_literal
        self._environment = environment
        tree: Any = environment.parse(source)
        # each step of a loop and each call of a macro is counted, and texts are joined by a filter
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            counter = nodes.EnvironmentAttribute("count_literal")
            tick = nodes.Call(counter, [nodes.Const(written)], [], None, None)
            node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        _join_by_filter(tree)
        tree.set_environment(environment)
        for expression in _constants(tree):
            self._work_out(expression)
        self._template = self._compiled(tree)

    def run(self, variables: Mapping[str, Any]) -> str:
        """Render once within the bounds.

        Raises:
            OverrunError: If a bound is passed.
            Exception: Any error that the template raises.
        """
        self._budget = RenderBudget(CHARACTERS + 200 * _size(variables))
        texts = []
        for text in self._template.generate(**variables):
            self._budget.spend(len(text))
            texts.append(text)
        return "".join(texts)

    def _compiled(self, tree: Any) -> Any:
        environment = self._environment
        return environment.template_class.from_code(environment, environment.compile(tree), environment.globals, None)

    def _work_out(self, expression: Any) -> None:
        # Jinja works constant expressions out while it compiles, without any bound.
        from jinja2 import nodes

        template = self._compiled(nodes.Template([nodes.Output([expression], lineno=1)], lineno=1))
        try:
            for text in template.generate():
                self._budget.spend(len(text))
        except OverrunError:
            raise
        except Exception:
            # A constant that cannot be worked out fails again when the rendering reaches it, and is reported there.
            return

    def _count_literal(self, characters: int) -> None:
        self._budget.spend(characters)

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        # one by one, so that as many are left to the next reader as without counting
        for value in values:
            self._budget.spend(_size(value))
            yield value

    def _output(self, value: Any) -> Any:
        self._budget.spend(_size(value))
        return value

    def _binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            # left ** right has at most bits(left) * right bits: an upper bound of its digits.
            bits = left.bit_length() if isinstance(left, int) else 1
            self._budget.check(bits * max(1, abs(right)) if isinstance(right, int) else 0)
        elif operator == "%" and isinstance(left, str):
            self._budget.check(_grown(left, (right,), formats=True))
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            self._budget.check(_size(left) + _size(right))
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            by_left, by_right = (abs(n) if isinstance(n, int) else 1 for n in (left, right))
            self._budget.check(max(_size(left) * by_right, _size(right) * by_left))
        result = _BINOPS[operator](left, right)
        self._budget.spend(_cost(result))
        return result

    def _call(self, plain: Callable[..., Any], context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        if called == self._count_literal:
            return called(*args)
        name = getattr(called, "__name__", "")
        self._before(name, getattr(getattr(called, "__wrapped__", called), "__self__", ""), (*args, *kwargs.values()))
        result = plain(context, called, *args, **kwargs)
        self._budget.spend(_cost(result))
        return result

    def _filter(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        skipped = int(hasattr(plain, "jinja_pass_arg"))

        @functools.wraps(plain)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            before, value, rest = args[:skipped], args[skipped], args[skipped + 1 :]
            value = self._counted(value) if isinstance(value, Iterator) else value
            self._before(name, value, (*rest, *kwargs.values()))
            result = plain(*before, value, *rest, **kwargs)
            self._budget.spend(_cost(result))
            return result

        return bounded

    def _before(self, name: str, value: Any, args: tuple[Any, ...]) -> None:
        if name in _RANDOM:
            raise OverrunError(f"the chat template uses {name!r}, so that no two renderings are alike")
        self._budget.check(_size(value))
        if name in _GROWS:
            self._budget.check(_grown(value, args, formats=name in _FORMATS))


def _grown(value: Any, args: Iterable[Any], *, formats: bool = False) -> int:
    """Return more characters than a text-building call can make: its value's size times the most an argument adds."""
    most = max((max(_size(arg), _largest(arg)) for arg in args), default=0)
    if formats and isinstance(value, str):
        most = max([most, *(int(width[:18]) for width in _WIDTH.findall(value))])
    return (1 + _size(value)) * (1 + most)


def _largest(value: Any) -> int:
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return max((_largest(item) for item in value), default=0) if isinstance(value, list | tuple) else 0


_BINOPS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda left, right: left + right,
    "*": lambda left, right: left * right,
    "**": lambda left, right: left**right,
    "%": lambda left, right: left % right,
}


def _cost(value: Any) -> int:
    """Return about how many characters of memory a new value takes: the items of a list are not new."""
    if isinstance(value, int):
        return _size(value)
    return len(value) if isinstance(value, str | Mapping | list | tuple) else 1


def _size(value: Any, seen: dict[int, int] | None = None) -> int:
    """Return about how many characters a value has when it is written out; an item that it holds twice counts twice."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    if isinstance(value, range):
        return 7 * len(value)
    if hasattr(type(value), "_fail_with_undefined_error"):
        # An undefined variable prints as nothing, and raises if it is asked for an attribute.
        return 1
    value = getattr(value, "_Namespace__attrs", value)
    if not isinstance(value, Mapping | list | tuple):
        return 1
    seen = {} if seen is None else seen
    if id(value) not in seen:
        items = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        seen[id(value)] = 1  # until it is known: a namespace can hold itself
        seen[id(value)] = 1 + sum(_size(item, seen) + 1 for item in items)
    return seen[id(value)]


def _join_by_filter(node: Any) -> Any:
    """Replace `a ~ b` by a filter, so that it is counted."""
    from jinja2 import nodes

    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_join_by_filter(one) if isinstance(one, nodes.Node) else one for one in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _join_by_filter(value))
    if not isinstance(node, nodes.Concat):
        return node
    parts = nodes.List(node.nodes).set_lineno(node.lineno)
    return nodes.Filter(parts, "join", [], [], None, None).set_lineno(node.lineno)


def _constants(node: Any) -> list[Any]:
    """Return the largest expressions that name no variable."""
    from jinja2 import nodes

    if isinstance(node, nodes.BinExpr | nodes.Filter) and node.find(nodes.Name) is None:
        return [node]
    return [found for child in node.iter_child_nodes() for found in _constants(child)]
