"""Render rows by templates of this package's own making: in a faster sandbox, and rows of plain texts by their roles.

mistral-common generates these templates from a closed set of settings, and they place texts without looking at them.
So a sequence of roles that comes often is rendered with marks, and the rows after it put their texts between the parts.
Probes with texts that templates do look at verify for each sequence that the result is the same, and one row in a
hundred is verified again. A foreign template is never rendered here.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.rebinding import rebound
from pytest_mistral_lora.errors import LibraryError

Rendered = tuple[str, list[tuple[int, int]] | None]
"""A text, and the spans of its generation blocks, if they are requested and do not change the text."""
Render = Callable[[Mapping[str, Any]], Rendered]

_SHAPES = 512
_SEQUENCES = 10_000
_OFTEN = 8
"""Rows of one sequence that are rendered in full before it is probed, which takes as long as ten rows."""
_CHECKED = 100
_SURROGATE = re.compile("[\ud800-\udfff]")
_DATA = frozenset((str, int, bool, list, dict))
_PROBES = (
    "5",
    "-0.5",
    "null",
    "true",
    "a" * 3000,
    " a ",
    "\n",
    '{"a": [1]}',
    "[]",
    "# é\n\n- ☃ 'a' \"b\" & <c>",
    "<think>a</think>b",
    "[THINK]a[/THINK]b",
    "[INST] a [/INST] b</s>",
    "[TOOL_CALLS]a",
    "{{ a }}{% b %}",
)


class _Edge(NamedTuple):
    """A place in a rendered text: the number of template characters and of texts before it."""

    characters: int
    texts: int


class _Shape(NamedTuple):
    """The rendering of a sequence of roles.

    Attributes:
        parts: The template's own text before, between and after the texts.
        order: The message of each text.
        spans: The generation blocks.
    """

    parts: tuple[str, ...]
    order: tuple[int, ...]
    spans: tuple[tuple[_Edge, _Edge], ...] | None

    @classmethod
    def of(cls, text: str, spans: Sequence[tuple[int, int]] | None, marks: Sequence[str]) -> _Shape | None:
        """Return the shape of a rendering of marks, or None unless each mark occurs once and whole."""
        if any(text.count(mark) != 1 for mark in marks):
            return None
        places = sorted((text.index(mark), number) for number, mark in enumerate(marks))
        ends = [0, *(place + len(marks[number]) for place, number in places)]
        starts = [*(place for place, _ in places), len(text)]
        if any(start < end for start, end in zip(starts, ends, strict=True)):
            return None

        def edge(place: int) -> _Edge | None:
            before = sum(end <= place for end in ends[1:])
            inside = before < len(places) and place > starts[before]
            return None if inside else _Edge(place - sum(len(marks[number]) for _, number in places[:before]), before)

        edges: list[tuple[_Edge, _Edge]] = []
        for first, last in ((edge(start), edge(end)) for start, end in spans or ()):
            if first is None or last is None:
                return None
            edges.append((first, last))
        parts = tuple(text[end:start] for end, start in zip(ends, starts, strict=True))
        return cls(parts, tuple(number for _, number in places), None if spans is None else tuple(edges))

    def fill(self, texts: Sequence[str]) -> Rendered:
        """Return the rendering of a row with these texts."""
        ordered = [texts[number] for number in self.order]
        text = "".join(itertools.chain.from_iterable(zip(self.parts, ordered, strict=False))) + self.parts[-1]
        if self.spans is None:
            return text, None
        lengths = [0, *itertools.accumulate(map(len, ordered))]
        return text, [
            (start.characters + lengths[start.texts], end.characters + lengths[end.texts]) for start, end in self.spans
        ]


class OwnRows:
    """Renders rows by one template of this package's own."""

    def __init__(self, render: Render) -> None:
        """Use `render`, which renders any row in full."""
        self._render = render
        self._seen: Counter[Any] = Counter()
        self._shapes: dict[Any, _Shape | None] = {}

    def rendered(self, question: Mapping[str, Any]) -> Rendered:
        """Return the text and the spans of a row, as `render` does.

        Raises:
            LibraryError: If the template looks at texts in a way that no probe has shown.
            Exception: Any error of the template.
        """
        messages = question["messages"]
        texts = [message.get("content") for message in messages]
        plain = question["tools"] is None and all(
            len(message) == 2 and type(text) is str and text and message["role"] != "tool"
            for message, text in zip(messages, texts, strict=True)
        )
        if not plain:
            return self._render(question)
        variables = repr(question["variables"])
        key = (question["asked"], variables, *[message["role"] for message in messages])
        self._seen[key] += 1
        if self._seen[key] < _OFTEN:
            if len(self._seen) > _SEQUENCES:
                self._seen.clear()
            return self._render(question)
        if key not in self._shapes:
            if len(self._shapes) >= _SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._probed(question, len(texts))
        shape = self._shapes[key]
        if shape is None or any(map(_SURROGATE.search, texts)):
            return self._render(question)
        found = shape.fill(texts)
        if self._seen[key] % _CHECKED == _OFTEN and found != self._render(question):
            raise LibraryError(
                "a chat template that mistral-common generates looks at the texts of a row",
                next_step="Please report it with the row; until then use another mistral-common version.",
            )
        return found

    def _probed(self, question: Mapping[str, Any], count: int) -> _Shape | None:
        """Return the shape of a row's roles, or None if a text changes more than its own place."""

        def render(texts: Sequence[str]) -> Rendered:
            messages = [{**message, "content": text} for message, text in zip(question["messages"], texts, strict=True)]
            return self._render({**question, "messages": messages})

        marks = [f" <\"mark'\\ &é☃ {number} of\n{count}> " for number in range(count)]
        try:
            shape = _Shape.of(*render(marks), marks)
            same = shape is not None and all(
                shape.fill([probe] * count) == render([probe] * count) for probe in _PROBES
            )
        except Exception:
            # the row itself is rendered in full, and raises its error
            return None
        return shape if same else None


@functools.cache
def own_renderer() -> Callable[..., Any]:
    """Return transformers' renderer with a sandbox that looks at each attribute of a type once: it is twice as fast."""
    from transformers.utils import chat_template_utils as theirs

    # a rendering takes 55 % less CPU time: benchmarks/patches.py, sandbox
    return rebound(theirs.render_jinja_template, _compile_jinja_template=_compiled)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # a separate template, because transformers caches the compiled ones
    compiled = _compile_jinja_template.__wrapped__(source)
    environment: Any = compiled.environment
    plain, judge = environment.getattr, environment.is_safe_attribute
    verdicts: dict[tuple[type, str], bool] = {}

    def is_safe(value: Any, name: str, attribute: Any) -> bool:
        # Jinja judges by type and name only
        key = type(value), name
        if key not in verdicts:
            verdicts[key] = judge(value, name, attribute)
        return verdicts[key]

    def attribute_of(value: Any, name: str) -> Any:
        # data has no format method for Jinja to wrap; everything else goes Jinja's own way
        if verdicts.get((type(value), name)):
            found = getattr(value, name, None)
            if type(found) in _DATA:
                return found
        return plain(value, name)

    environment.is_safe_attribute, environment.getattr = is_safe, attribute_of
    return compiled
