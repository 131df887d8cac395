"""Texts: plain ones, and texts that break careless renderers and masks."""

from __future__ import annotations

import json
import string
from functools import partial
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pytest_mistral_lora.chat.chunks.thinking import THINKING
from pytest_mistral_lora.chat.tool_arguments import argument_faults, argument_object

TextStrategy = SearchStrategy[str]

CONTROL_LITERALS = (
    "[INST]",
    "[/INST]",
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CONTENT]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[MODEL_SETTINGS]",
    "[/MODEL_SETTINGS]",
    "[ARGS]",
    "[CALL_ID]",
    "[THINK]",
    "[/THINK]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[AUDIO]",
    "[BEGIN_AUDIO]",
    "[TRANSCRIBE]",
    "[STREAMING_PAD]",
    "[STREAMING_WORD]",
    "[NEXT_AUDIO_TEXT]",
    "[REPEAT_AUDIO_TEXT]",
    "[control_12]",
    "<SPECIAL_20>",
)
"""The spellings of the control tokens of all versions: in a row's text they are text."""

_SPACES = (" ", "  ", "\n", "\t", "\r\n", "\n\n", "    ", "\u00a0", "\u2003", "\u2028", "\u3000", "\u2581", " " * 17)
_INVISIBLE = ("\x00", "\x07", "\x1b[0m", "\x7f", "\u200b", "\u200d", "\u200e", "\u202e", "\u2060", "\ufeff", "\ufffd")
_SCRIPTS = (
    "e\u0301",
    "\u1e9b\u0323",
    "Z\u0351\u036b\u0343",
    "한국어",
    "你好\uff0c世界",
    "日本語テキスト",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते",
    "👩\u200d👩\u200d👧",
    "🏳\ufe0f\u200d🌈",
    "👍🏽",
    "🇫🇷",
    "\U0001d518\U0001d52b",
    "\U0001f600",
    # the code points beside the surrogates
    "\ud7ff\ue000",
    "\U0010ffff",
)
_SNIPPETS = (
    "def f(x):\n    if x:\n        return  x\n",
    "End.  Next  sentence.",
    '{"a": [1, 2.5, null], "b": "\\u00e9"}',
    "<b>&amp;</b> {{ x }} {% if y %}",
    "C:\\new\\table",
    "'quoted' \"twice\"",
    "don't",
    "1234567890",
    "-0.5e10",
)


def plain_text() -> TextStrategy:
    """Generate text that no known renderer gets wrong: not empty, no control literal, no space at either end.

    Example:
        >>> from hypothesis import given
        >>> @given(plain_text())
        ... def law(text):
        ...     assert text and text == text.strip()
        >>> law()
    """
    words = st.text(string.ascii_letters + string.digits + ".,!?'éß你", min_size=1, max_size=8)
    return st.lists(words, min_size=1, max_size=8).map(" ".join)


def hostile_text() -> TextStrategy:
    """Generate text that breaks careless renderers and masks; it may be empty, and holds no lone surrogate.

    Control literals of every version, white space of all kinds at both ends and inside, SentencePiece's own space
    character, control and format characters, combining marks, emoji sequences, right-to-left and CJK scripts,
    astral characters, very long words, code and JSON.

    Example:
        >>> from hypothesis import given
        >>> @given(hostile_text())
        ... def law(text):
        ...     assert text.encode().decode() == text
        >>> law()
    """
    fragment = st.one_of(
        st.text(string.ascii_lowercase, max_size=4),
        st.sampled_from(CONTROL_LITERALS),
        st.sampled_from(_SPACES),
        st.sampled_from(_SNIPPETS),
        st.sampled_from(_SCRIPTS),
        st.sampled_from(_INVISIBLE),
        # the characters of UTF-8; codec="utf-8" means the same set, but takes seconds to compute in a fresh folder,
        # which on a busy machine fails Hypothesis's health check for slow data.
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        st.builds(str.__mul__, st.sampled_from("a1_é漢"), st.integers(30, 600)),
    )
    return st.lists(fragment, max_size=6).map("".join)


_WORDS = string.ascii_letters + string.digits + "_-"
_STRANGE_JSON = (
    '{"a": 1, "a": 2}',
    '{"a": {"b": 1, "b": [2]}, "a": {"b": 3}}',
    '{"a": 1.0, "b": 2.50, "c": 1e5, "d": -0.0, "e": 1E-7}',
    '{"a": 123456789012345678901234567890, "b": 0.1000000000000000055511151231257827}',
    '{ "a" :\t[ 1 ,\n2 ] }',
    '{"a": "\\u00e9\\/\\ud83d\\ude00"}',
    "[]",
    "null",
    "",
)
# 53 bits: every reader of JSON keeps such whole numbers; NaN and infinity are not JSON
_SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)


# mistral-common refuses any other length from v3 on
CALL_IDS: TextStrategy = st.text("0123456789" + string.ascii_letters, min_size=9, max_size=9)
# from v13 on no id is written, so any text can be one; "null" is mistral-common's value for a missing id
FREE_IDS: TextStrategy = st.text(_WORDS + ".:/", min_size=1, max_size=40).filter(lambda text: text != "null")
NAMES: TextStrategy = st.text(_WORDS, min_size=1, max_size=12)
"""Names of tools and of their parameters."""


def _objects(text: TextStrategy) -> SearchStrategy[dict[str, Any]]:
    dicts = partial(st.dictionaries, NAMES, max_size=3)
    # few leaves, because deep values take long to generate and to shrink
    values = st.recursive(text | _SCALARS, lambda inner: st.lists(inner, max_size=2) | dicts(inner), max_leaves=4)
    return dicts(values)


def any_arguments(text: TextStrategy) -> SearchStrategy[Any]:
    """Generate arguments: an object, or a text: its JSON, JSON within JSON, unusual JSON, or not JSON."""
    as_json = st.builds(json.dumps, _objects(text), ensure_ascii=st.booleans())
    not_json = st.sampled_from(("{'a': 1}", "a=1", "{} {}"))
    return st.one_of(_objects(text), as_json, as_json.map(json.dumps), st.sampled_from(_STRANGE_JSON), not_json)


def any_result(text: TextStrategy) -> TextStrategy:
    """Generate results of tools: a text, a number, or JSON, encoded once or twice."""
    numbers = st.integers(-(10**6), 10**6).map(str) | st.sampled_from(("0.50", "1e3", "-0", "1E400", "1_0", " 7"))
    as_json = st.builds(json.dumps, _objects(text), ensure_ascii=st.booleans())
    return st.one_of(text, numbers, as_json, as_json.map(json.dumps), st.sampled_from(_STRANGE_JSON))


_KINDS = ("string", "integer", "number", "boolean")
"""Types of the parameters of a tool."""


def values_by_kind(text: TextStrategy) -> dict[str, SearchStrategy[Any]]:
    """Return a strategy for the values of each type that a parameter of a tool may have."""
    whole, floats = st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False)
    return dict(zip(_KINDS, (text, whole, whole | floats, st.booleans()), strict=True)) | {"null": st.none()}


def fits_tool(arguments: Any, tool: dict[str, Any]) -> bool:
    """Return whether arguments are valid by the schema of their tool, without a null that it does not take.

    A text that is not an object fits each tool: its schema cannot judge it.
    """
    found, _ = argument_object(arguments)
    return found is None or not any(argument_faults(found, tool["function"]["parameters"]))


def any_tool(text: TextStrategy) -> SearchStrategy[dict[str, Any]]:
    """Generate tools, with and without a description and `strict`; a parameter may be null if its type says so."""
    extras: SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({}, optional={"strict": st.booleans()})
    described: SearchStrategy[dict[str, str]] = st.builds(dict, description=text) | st.just({})
    kinds: SearchStrategy[Any] = st.sampled_from(_KINDS)
    kinds = kinds | st.sampled_from(_KINDS).map(lambda kind: [kind, "null"])
    properties = st.dictionaries(NAMES, st.fixed_dictionaries({"type": kinds, "description": text}), max_size=2)
    functions = st.builds(
        lambda name, described, properties, extras: {
            "name": name,
            **described,
            "parameters": {"type": "object", "properties": properties},
            **extras,
        },
        NAMES,
        described,
        properties,
        extras,
    )
    return functions.map(lambda function: {"type": "function", "function": function})


def any_format(text: TextStrategy) -> SearchStrategy[dict[str, Any]]:
    """Generate response formats: text, JSON, or JSON of a schema whose keys are in any order."""
    kinds = st.sampled_from(_KINDS)
    properties = st.dictionaries(NAMES, st.fixed_dictionaries({"type": kinds, "description": text}), max_size=3)
    schemas = properties.map(lambda found: {"type": "object", "properties": found, "required": sorted(found)})
    named = st.builds(lambda name, schema: {"name": name, "schema": schema}, NAMES, schemas)
    plain = st.sampled_from(({"type": "text"}, {"type": "json_object"}))
    return plain | named.map(lambda schema: {"type": "json_schema", "json_schema": schema})


def name_of(tool: dict[str, Any]) -> str:
    """Return the name of a tool."""
    return str(tool["function"]["name"])


# "null" is mistral-common's own value for a missing id
_IDS = ("abcdefgh1", "abcdefgh2", "short", "null", "", None)
_TURNS = ("system", "user", "assistant", "calls", "tool")


@st.composite
def messy_rows(draw: st.DrawFn) -> dict[str, Any]:
    """Generate rows with any order of roles, and ids, names, schemas, contents and settings that may be wrong."""
    turns = draw(st.lists(st.sampled_from(_TURNS), max_size=6))
    last = draw(st.sampled_from(("assistant", "calls", "user", "tool")))
    messages = [draw(_message(turn)) for turn in (*turns, last)]
    # without an assistant's message a row has nothing to train on, and is refused before mistral-common sees it
    if not any(message["role"] == "assistant" for message in messages):
        messages.append({"role": "assistant", "content": "x"})
    row: dict[str, Any] = {"messages": messages}
    if draw(st.booleans()):
        schemas = st.sampled_from(({}, {"type": "object"}, {"type": "thing"}))
        function = st.fixed_dictionaries({"name": st.sampled_from(("f", "no name")), "parameters": schemas})
        row["tools"] = [{"type": "function", "function": draw(function)}]
    if draw(st.integers(0, 9)) == 9:
        row["reasoning_effort"] = draw(st.sampled_from(("none", "max", "much")))
    return row


def _message(turn: str) -> SearchStrategy[dict[str, Any]]:
    text = st.sampled_from(("x", "", "  ", "[INST]"))
    if turn == "tool":
        return st.fixed_dictionaries(
            {"role": st.just("tool"), "content": text, "tool_call_id": st.sampled_from(_IDS)},
            optional={"name": st.sampled_from(("f", "no name"))},
        )
    contents: SearchStrategy[Any] = text | st.just([]) | st.just([{"type": "text", "text": "x"}])
    if turn in ("assistant", "system"):
        contents = contents | st.just([THINKING.chunk("x")])
    if turn != "calls":
        return st.fixed_dictionaries({"role": st.just(turn), "content": contents})
    function = st.fixed_dictionaries({"name": st.sampled_from(("f", "no name")), "arguments": st.just({})})
    call = {"id": st.sampled_from(_IDS), "type": st.just("function"), "function": function}
    calls = st.lists(st.fixed_dictionaries(call), min_size=1, max_size=2)
    return st.fixed_dictionaries(
        {"role": st.just("assistant"), "tool_calls": calls}, optional={"content": contents, "weight": st.just(0)}
    )


def text_chunk(text: str) -> dict[str, Any]:
    """Return a content chunk of type `text`."""
    return {"type": "text", "text": text}


def tool_message(content: Any, call_id: str, name: str | None) -> dict[str, Any]:
    """Return a tool's result as a message, without a name if it is None."""
    return {"role": "tool", "content": content, "tool_call_id": call_id} | ({"name": name} if name else {})
